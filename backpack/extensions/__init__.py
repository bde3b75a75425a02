"""The quantities that a backward pass can compute."""

from backpack.extensions.batch_grad import BatchGrad

__all__ = ["BatchGrad"]
