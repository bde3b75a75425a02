"""Normalizations: the scale multiplies the normalized input, the shift is added to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backpack.nodes.registry import Place, form
from backpack.uses import ElementwiseUse, Use


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
    return ElementwiseUse(own, place.saved("input"), _standardized, more=statistics) if place.k == 1 else None


def _standardized(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return (x - mean) * scale


def _channels(place: Place) -> tuple[int, ...]:
    return tuple(place.out[1] if axis == 1 else 1 for axis in range(len(place.out)))


@form("NativeGroupNorm")
def group_norm(place: Place) -> Use | None:
    if place.layout.axes != [0]:
        return None
    if place.k == 2:
        return ElementwiseUse(_channels(place))
    axis = 1 - len(place.out)

    def standardized(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        groups = mean.shape[-1]
        apart = x.unflatten(axis, (groups, -1))
        tail = [1] * (-axis)
        return ((apart - mean.reshape(*mean.shape, *tail)) * scale.reshape(*scale.shape, *tail)).reshape(x.shape)

    statistics = tuple(place.saved(name).reshape(place.out[0], -1) for name in ("result1", "result2"))
    return ElementwiseUse(_channels(place), place.saved("input"), standardized, more=statistics)


@form("NativeBatchNorm")
def batch_norm(place: Place) -> Use | None:
    """By stored statistics, or by those of the batch, which are constants for the scale."""
    if place.layout.axes != [0]:
        return None
    if place.k == 2:
        return ElementwiseUse(_channels(place))
    if place.k != 1:
        return None
    shape = [-1] + [1] * (len(place.out) - 2)
    if place.saved("training"):
        center, scale = place.saved("result1").reshape(shape), place.saved("result2").reshape(shape)
    else:
        mean, variance = place.saved("running_mean"), place.saved("running_var")
        if mean is None or variance is None:
            return None
        center, scale = mean.reshape(shape), torch.rsqrt(variance + place.saved("eps")).reshape(shape)

    def standardized(x: Tensor, *_: Any) -> Tensor:
        return (x - center) * scale

    return ElementwiseUse(_channels(place), place.saved("input"), standardized)
