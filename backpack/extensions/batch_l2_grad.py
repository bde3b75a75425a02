"""Squared norms of individual gradients."""

from __future__ import annotations

from torch import Tensor

from backpack.extensions.backprop_extension import BuiltInExtension
from backpack.extensions.merge_batches import Joined
from backpack.uses import Individual


class BatchL2Grad(BuiltInExtension[Tensor]):
    """Squared Euclidean norms of the individual gradients, ``batch_l2`` of shape ``[N]``, per parameter.

    Of the gradients as ``BatchGrad`` scales them; real, also of complex parameters. They are not stored: norms come
    from the factors of each use, by Gram matrices of positions where these are smaller (Goodfellow, 2015, for one
    position; Rochette et al., 2019).
    """

    savefield = "batch_l2"
    reads = ("norms",)
    batches = Joined(2)

    def compute(self, grads: Individual) -> Tensor:
        return grads.norms()[0]
