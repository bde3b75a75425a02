"""The variance of individual gradients."""

from __future__ import annotations

from torch import Tensor

from backpack.extensions.backprop_extension import BuiltInExtension
from backpack.extensions.merge_batches import BatchShare, Moments
from backpack.uses import Individual
from backpack.uses.complex_numbers import squared


class Variance(BuiltInExtension[Tensor]):
    """Population variance of the individual gradients over the samples, ``variance`` of shape ``p``.

    Of the gradients as ``BatchGrad`` scales them: mean of the squares minus square of the mean, over all samples or
    the selected ones; never negative, whatever the rounding. Of complex parameters, that of the real parts plus that of
    the imaginary ones.
    """

    savefield = "variance"
    reads = ("total", "sum_squares")

    def compute(self, grads: Individual) -> Tensor:
        n, total = max(1, grads.size[1]), grads.total()
        return grads.sum_squares().sub(squared(total), alpha=1 / n).div_(n).clamp_(min=0)

    def on_batch(self, share: BatchShare) -> _SumAndSquares:
        return _SumAndSquares(share.rows, self.savefield)


class _SumAndSquares(Variance):
    """The sums from which the variance of several batches follows."""

    batches = Moments()

    def compute(self, grads: Individual) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grads.total(), grads.sum_squares()
