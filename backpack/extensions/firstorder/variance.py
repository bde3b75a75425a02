"""An import path of the original."""

from backpack.extensions.variance import Variance as Variance
