"""An import path of the original."""

from backpack.extensions.matrix_products import HMP as HMP
