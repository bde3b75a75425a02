"""An import path of the original."""

from backpack.extensions.sqrt_ggn import SqrtGGNExact as SqrtGGNExact
from backpack.extensions.sqrt_ggn import SqrtGGNMC as SqrtGGNMC
