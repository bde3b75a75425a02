"""An import path of the original."""

from backpack.extensions.matrix_products import GGNMP, HMP, PCHMP

__all__ = ["GGNMP", "HMP", "PCHMP"]
