"""The second moment of individual gradients, up to a factor."""

from __future__ import annotations

from torch import Tensor

from backpack.extensions.backprop_extension import BuiltInExtension
from backpack.extensions.merge_batches import Summed
from backpack.uses import Individual


class SumGradSquared(BuiltInExtension[Tensor]):
    """Sum over samples of the squared individual gradients, ``sum_grad_squared`` of shape ``p``.

    Of the gradients as ``BatchGrad`` scales them: with a loss that averages over ``N`` samples, ``1/N^2`` times the
    sum of the squared gradients of the samples' own losses. Of complex parameters: of squared absolute values, real.
    """

    savefield = "sum_grad_squared"
    reads = ("sum_squares",)
    batches = Summed(2)

    def compute(self, grads: Individual) -> Tensor:
        return grads.sum_squares()
