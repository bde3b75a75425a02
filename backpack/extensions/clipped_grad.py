"""The sum of clipped individual gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.merge_batches import Summed
from backpack.uses import Individual


class ClippedGrad(BackpropExtension[Tensor]):
    """Sum of the individual gradients, each clipped to a norm over all parameters, ``grad_clipped`` of shape ``p``.

    Sample ``n``'s gradient, as ``BatchGrad`` scales it, is multiplied by ``min(1, max_norm / norm_n)``, where
    ``norm_n`` is its Euclidean norm over all parameters that receive a gradient. (With a loss that averages over
    ``N`` samples the gradients carry ``1/N``: clip to ``bound / N`` to bound the gradients of the samples' own
    losses.) The individual gradients are not stored; inputs and cotangents of all layers are held until the backward
    pass ends. The clipping of DP-SGD (Abadi et al., 2016, Algorithm 1).

    Raises:
        ValueError: ``max_norm`` is not positive.
    """

    savefield = "grad_clipped"
    reads = ("norms",)
    needs_all_parameters = True
    bounds_influence = True
    batches = Summed(1)
    fixes_scale = True

    def __init__(self, max_norm: float, subsampling: Any = None, savefield: str | None = None) -> None:
        super().__init__(savefield, subsampling=subsampling)
        if not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}.")
        self.max_norm = max_norm

    def measure(self, grads: Individual) -> Tensor:
        return grads.norms()[0]

    def combine(self, measures: list[Tensor]) -> Tensor:
        norms = torch.stack([squared.to(measures[0].dtype) for squared in measures]).sum(0).sqrt()
        return self.max_norm / norms.clamp(min=self.max_norm)

    def compute_jointly(self, grads: Individual, joint: Tensor) -> Tensor:
        return grads.scaled(joint).total()

    def on_batch(self, rows: list[int] | None, factor: float) -> ClippedGrad:
        part = super().on_batch(rows, factor)
        assert isinstance(part, ClippedGrad)
        part.max_norm = self.max_norm / factor
        return part
