"""An import path of the original."""

from backpack.extensions.batch_grad import BatchGrad as BatchGrad
