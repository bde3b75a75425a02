"""Normalizations: the scale multiplies the normalized input, the shift is added to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack.operations.registry import REPLACED, Operation, rule
from backpack.uses import ElementwiseUse


def _affine(
    axes: tuple[int, ...],
    own: Sequence[int],
    x: Tensor,
    normalize: Callable[[Tensor], Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
) -> Operation:
    return Operation(axes, [(weight, ElementwiseUse(tuple(own), x, normalize)), (bias, ElementwiseUse(tuple(own)))])


def _channels(out: Tensor) -> list[int]:
    return [out.shape[1] if axis == 1 else 1 for axis in range(out.dim())]


def _over(normalize: Callable[[Tensor], Tensor], dims: int) -> Callable[[Tensor], Tensor]:
    """For inputs ``[n, k, ...]`` whose ``dims`` are counted with one batch axis."""

    def normalized(x: Tensor) -> Tensor:
        return normalize(x.flatten(0, x.dim() - dims)).reshape(x.shape)

    return normalized


@rule(F.layer_norm)
def layer_norm(
    out: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Operation:
    free = out.dim() - len(normalized_shape)

    def normalize(x: Tensor) -> Tensor:
        return F.layer_norm(x, normalized_shape, eps=eps)

    own = [1] * free + list(normalized_shape)
    return _affine(tuple(range(free)), own, input, normalize, weight, bias)


@rule(F.rms_norm)
def rms_norm(
    out: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Operation:
    free = out.dim() - len(normalized_shape)

    def normalize(x: Tensor) -> Tensor:
        return F.rms_norm(x, normalized_shape, eps=eps)

    return _affine(tuple(range(free)), [1] * free + list(normalized_shape), input, normalize, weight, None)


@rule(F.group_norm)
def group_norm(
    out: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Operation:
    normalize = _over(lambda x: F.group_norm(x, num_groups, eps=eps), out.dim())
    return _affine((0,), _channels(out), input, normalize, weight, bias)


@rule(F.instance_norm)
def instance_norm(
    out: Tensor,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Operation | None:
    if not use_input_stats:
        return _running(out, input, running_mean, running_var, weight, bias, eps)
    normalize = _over(lambda x: F.instance_norm(x, eps=eps), out.dim())
    return _affine((0,), _channels(out), input, normalize, weight, bias)


def _instance_norm_by_groups(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """PyTorch joins samples and channels to one axis, in which the samples are hard to find."""
    if not use_input_stats or running_mean is not None:
        return NotImplemented
    return F.group_norm(input, input.shape[1], weight, bias, eps)


REPLACED[F.instance_norm] = _instance_norm_by_groups


@rule(F.batch_norm)
def batch_norm(
    out: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Operation | None:
    if training or running_mean is None:
        return Operation(
            (0,),
            [],
            "normalizes with statistics of the batch, so that samples are mixed and no gradient belongs to one "
            "of them. Call .eval() on this layer, or replace it by GroupNorm, InstanceNorm or LayerNorm",
        )
    return _running(out, input, running_mean, running_var, weight, bias, eps)


def _running(
    out: Tensor,
    input: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Operation:
    """Normalization by stored statistics, ``[c]``."""
    assert mean is not None and variance is not None
    shape = [-1] + [1] * (out.dim() - 2)
    center, scale = mean.reshape(shape), torch.rsqrt(variance + eps).reshape(shape)
    return _affine((0,), _channels(out), input, lambda x: (x - center) * scale, weight, bias)


@rule(F.prelu, torch.prelu, Tensor.prelu)
def prelu(out: Tensor, input: Tensor, weight: Tensor) -> Operation:
    own = _channels(out) if weight.numel() > 1 else [1] * out.dim()
    axes = (0,) if weight.numel() > 1 else tuple(range(out.dim()))
    return Operation(axes, [(weight, ElementwiseUse(tuple(own), input, lambda x: x.clamp(max=0)))])
