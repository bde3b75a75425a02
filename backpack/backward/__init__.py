"""One backward pass: how it begins, what arrives at the parameters, and when a parameter is complete."""

from backpack.backward.call import STARTS
from backpack.backward.first_order import FirstOrderPass
from backpack.backward.start import differentiate

__all__ = ["STARTS", "FirstOrderPass", "differentiate"]
