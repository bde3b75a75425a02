"""An import path of the original."""

from backpack.extensions.hbp import HBP, BackpropStrategy, Curvature, ExpectationApproximation, LossHessianStrategy
from backpack.extensions.kfac import KFAC
from backpack.extensions.kflr import KFLR
from backpack.extensions.kfra import KFRA

__all__ = [
    "HBP",
    "KFAC",
    "KFLR",
    "KFRA",
    "BackpropStrategy",
    "Curvature",
    "ExpectationApproximation",
    "LossHessianStrategy",
]
