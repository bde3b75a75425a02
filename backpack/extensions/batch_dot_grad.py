"""Dot products of individual gradients."""

from __future__ import annotations

from torch import Tensor

from backpack.extensions.backprop_extension import BuiltInExtension
from backpack.extensions.batch_grad import BatchGrad
from backpack.uses import Individual
from backpack.uses.complex_numbers import as_real


class BatchDotGrad(BuiltInExtension[Tensor]):
    """Pairwise dot products of the individual gradients, ``batch_dot`` of shape ``[N, N]``, per parameter.

    Of the gradients as ``BatchGrad`` scales them, and of their real and imaginary parts; the diagonal is ``batch_l2``.
    The sum over all parameters is the Gram matrix of the gradients (the empirical neural tangent kernel of the
    loss). Over a data set, individual gradients of all samples are kept until the end.
    """

    savefield = "batch_dot"

    def compute(self, grads: Individual) -> Tensor:
        return grads.dots(grads)[0, :, 0]

    def on_batch(self, rows: list[int] | None, factor: float) -> BatchGrad:
        return BatchGrad(rows, self.savefield)

    def of_whole(self, name: str, merged: Tensor) -> Tensor:
        flat = as_real(merged.flatten(1))
        return flat @ flat.T
