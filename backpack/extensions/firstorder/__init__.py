"""Import paths of the original that scripts use: quantities of first order."""

from backpack.extensions.batch_grad import BatchGrad as BatchGrad
from backpack.extensions.batch_l2_grad import BatchL2Grad as BatchL2Grad
from backpack.extensions.sum_grad_squared import SumGradSquared as SumGradSquared
from backpack.extensions.variance import Variance as Variance
