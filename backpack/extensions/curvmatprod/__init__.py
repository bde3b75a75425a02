"""An import path of the original."""

from backpack.extensions.matrix_products import GGNMP as GGNMP
from backpack.extensions.matrix_products import HMP as HMP
from backpack.extensions.matrix_products import PCHMP as PCHMP
