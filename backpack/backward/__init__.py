"""One backward pass of first order: how it begins, what has arrived, when a parameter is complete."""

from backpack.backward.first_order import FirstOrderPass
from backpack.backward.start import STARTS, differentiate

__all__ = ["STARTS", "FirstOrderPass", "differentiate"]
