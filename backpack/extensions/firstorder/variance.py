"""An import path of the original."""

from backpack.extensions.variance import Variance

__all__ = ["Variance"]
