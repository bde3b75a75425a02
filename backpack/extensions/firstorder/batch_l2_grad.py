"""An import path of the original."""

from backpack.extensions.batch_l2_grad import BatchL2Grad as BatchL2Grad
