"""An import path of the original."""

from backpack.extensions.sqrt_ggn import SqrtGGNExact, SqrtGGNMC

__all__ = ["SqrtGGNExact", "SqrtGGNMC"]
