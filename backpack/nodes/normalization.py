"""Normalizations: the scale multiplies the normalized input, the shift is added to it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from backpack.nodes.registry import Place, form
from backpack.uses import ElementwiseUse, GroupNormScaleUse, Use


@form("NativeLayerNorm")
def layer_norm(place: Place) -> Use | None:
    normalized = len(place.saved("normalized_shape"))
    free = len(place.out) - normalized
    own = (*[1] * free, *place.shape)
    if place.layout.occupies(range(free, len(place.out))):
        return None
    if place.k == 2:
        return ElementwiseUse(own)
    statistics = place.saved("result1"), place.saved("result2")
    factor = partial(_standardized, normalized=normalized)
    return ElementwiseUse(own, place.saved("input"), factor, more=statistics) if place.k == 1 else None


def _standardized(x: Tensor, mean: Tensor, scale: Tensor, normalized: int) -> Tensor:
    if torch.is_grad_enabled():  # what was saved has no history
        mean, scale = _with_history(x, scale, list(range(x.dim() - normalized, x.dim())))
    return (x - mean) * scale


def _with_history(x: Tensor, scale: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal deviation over some axes, differentiable; ``scale`` is the value of the second."""
    mean, variance = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
    eps = (scale.reshape(variance.shape).pow(-2) - variance).detach()
    return mean, torch.rsqrt(variance + eps)


@form("NativeGroupNorm")
def group_norm(place: Place) -> Use | None:
    if place.layout.axes != [0]:
        return None
    if place.k == 2:
        return ElementwiseUse(place.channels())
    axis = 1 - len(place.out)

    def standardized(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        groups = mean.shape[-1]
        apart = x.unflatten(axis, (groups, -1))
        tail = [1] * (-axis)
        return ((apart - mean.reshape(*mean.shape, *tail)) * scale.reshape(*scale.shape, *tail)).reshape(x.shape)

    statistics = tuple(place.saved(name).reshape(place.out[0], -1) for name in ("result1", "result2"))
    return GroupNormScaleUse(place.channels(), place.saved("input"), standardized, more=statistics)


@form("NativeBatchNorm")
def batch_norm(place: Place) -> Use | None:
    """The statistics are stored ones, or those of the batch, which do not depend on the scale."""
    if place.layout.axes != [0]:
        return None
    if place.k == 2:
        return ElementwiseUse(place.channels())
    if place.k != 1:
        return None
    shape = [-1] + [1] * (len(place.out) - 2)
    if place.saved("training") and torch.is_grad_enabled():
        x = place.saved("input")
        center, scale = _with_history(x, place.saved("result2"), [axis for axis in range(x.dim()) if axis != 1])
        center, scale = center.reshape(shape), scale.reshape(shape)
    elif place.saved("training"):
        center, scale = place.saved("result1").reshape(shape), place.saved("result2").reshape(shape)
    else:
        mean, variance = place.saved("running_mean"), place.saved("running_var")
        if mean is None or variance is None:
            return None
        center, scale = mean.reshape(shape), torch.rsqrt(variance + place.saved("eps")).reshape(shape)

    def standardized(x: Tensor, *_: Any) -> Tensor:
        return (x - center) * scale

    return ElementwiseUse(place.channels(), place.saved("input"), standardized)
