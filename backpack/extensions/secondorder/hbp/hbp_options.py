"""An import path of the original."""

from backpack.extensions.hbp import BackpropStrategy, ExpectationApproximation, LossHessianStrategy

__all__ = ["BackpropStrategy", "ExpectationApproximation", "LossHessianStrategy"]
