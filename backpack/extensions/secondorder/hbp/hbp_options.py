"""An import path of the original."""

from backpack.extensions.strategies import BackpropStrategy as BackpropStrategy
from backpack.extensions.strategies import ExpectationApproximation as ExpectationApproximation
from backpack.extensions.strategies import LossHessianStrategy as LossHessianStrategy
