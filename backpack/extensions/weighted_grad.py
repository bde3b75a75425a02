"""The weighted sum of individual gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.merge_batches import BatchShare, Summed
from backpack.samples import Subset
from backpack.uses import Individual


class WeightedGrad(BackpropExtension[Tensor]):
    """Sum of the individual gradients, each multiplied by a weight, ``grad_weighted`` of shape ``p``.

    It is the gradient of the loss with its samples weighted, for weights that are known only after the forward pass or
    that the loss does not take, beside the gradient itself. Of the gradients as ``BatchGrad`` scales them; none of them
    is stored.

    Args:
        weights: One for each selected sample, of any sign, ``[N]``. Over a data set, in the order of its samples.

    Raises:
        ValueError: ``weights`` has not one axis. In the backward pass: it has not one entry for each sample.
    """

    savefield = "grad_weighted"
    batches = Summed(1)

    def __init__(
        self, weights: Tensor | Sequence[float], subsampling: Any = None, savefield: str | None = None
    ) -> None:
        super().__init__(savefield, subsampling=subsampling)
        self.weights = torch.as_tensor(weights).detach()
        if self.weights.dim() != 1 or self.weights.is_complex():
            raise ValueError(
                f"WeightedGrad: weights must be real numbers with one axis, one for each sample; they have shape "
                f"{list(self.weights.shape)} and type {self.weights.dtype}."
            )

    def check(self, parameters: Sequence[Tensor], samples: int) -> None:
        rows = self.subset.rows(samples, torch.device("cpu"))
        count = samples if rows is None else len(rows)
        if count != len(self.weights):
            raise ValueError(
                f"WeightedGrad has {len(self.weights)} weights for {count} samples: give one for each sample of the "
                f"batch, or for each that subsampling selects."
            )

    def compute(self, grads: Individual) -> Tensor:
        like = grads.parameter.real if grads.parameter.is_complex() else grads.parameter
        return grads.weighted_total(self.weights.to(like))

    def on_batch(self, share: BatchShare) -> WeightedGrad:
        part = self.with_subset(Subset(share.rows))
        if len(share.places) and int(share.places.max()) >= len(self.weights):
            raise ValueError(
                f"WeightedGrad has {len(self.weights)} weights, and the data set has more samples: give one for each "
                f"sample, or for each that subsampling selects."
            )
        part.weights = self.weights[share.places]
        return part
