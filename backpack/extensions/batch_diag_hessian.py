"""The diagonals of the samples' Hessians."""

from __future__ import annotations

from torch import Tensor

from backpack.extensions.diag_hessian import DiagHessian
from backpack.extensions.merge_batches import Joined
from backpack.uses import Individual


class BatchDiagHessian(DiagHessian):
    """Diagonal of the Hessian of each sample's term of the loss, ``diag_h_batch`` of shape ``[N, *p]``.

    Scaled as the loss scales its samples, so that the sum over ``N`` is ``diag_h``. With ``subsampling``, of shape
    ``[len(subsampling), *p]`` in the order given.
    """

    savefield = "diag_h_batch"
    reads = ("sample_squares",)
    batches = Joined(1)

    def compute(self, grads: Individual) -> Tensor:
        return grads.sample_squares()
