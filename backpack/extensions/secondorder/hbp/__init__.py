"""An import path of the original."""

from backpack.extensions.hbp import HBP as HBP
from backpack.extensions.kfac import KFAC as KFAC
from backpack.extensions.kflr import KFLR as KFLR
from backpack.extensions.kfra import KFRA as KFRA
from backpack.extensions.strategies import BackpropStrategy as BackpropStrategy
from backpack.extensions.strategies import Curvature as Curvature
from backpack.extensions.strategies import ExpectationApproximation as ExpectationApproximation
from backpack.extensions.strategies import LossHessianStrategy as LossHessianStrategy
