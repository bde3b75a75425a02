"""An import path of the original."""

from backpack.extensions.sum_grad_squared import SumGradSquared as SumGradSquared
