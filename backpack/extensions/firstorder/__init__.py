"""Import paths of the original that scripts use: quantities of first order."""

from backpack.extensions.batch_grad import BatchGrad
from backpack.extensions.batch_l2_grad import BatchL2Grad
from backpack.extensions.sum_grad_squared import SumGradSquared
from backpack.extensions.variance import Variance

__all__ = ["BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"]
