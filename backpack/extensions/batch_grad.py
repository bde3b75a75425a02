"""Individual gradients."""

from __future__ import annotations

from torch import Tensor

from backpack.extensions.backprop_extension import BuiltInExtension
from backpack.extensions.merge_batches import Joined
from backpack.uses import Individual


class BatchGrad(BuiltInExtension[Tensor]):
    """Individual gradients, ``grad_batch`` of shape ``[N, *p]``.

    Entry ``n`` is sample ``n``'s contribution to the gradient: with a loss that averages over ``N`` samples, ``1/N``
    times the gradient of its own loss, so that ``p.grad_batch.sum(0)`` is ``p.grad``. With ``subsampling``, of shape
    ``[len(subsampling), *p]`` in the order given.
    """

    savefield = "grad_batch"
    reads = ("dense",)
    batches = Joined(1)

    def compute(self, grads: Individual) -> Tensor:
        return grads.dense()[0]
