"""Rules for layers that are one node: normalization, pooling, attention, recurrent layers."""

from __future__ import annotations

import torch

from backpack.graph import kind
from backpack.samples.layout_rules.elementwise import broadcast, broadcast_from
from backpack.samples.layout_rules.registry import Output, Unknown, rule
from backpack.samples.layouts import AnyLayout, Layout


@rule("NativeLayerNorm FusedRmsNorm")
def layer_norm(out: Output) -> list[AnyLayout | None]:
    dim = len(out.shape)
    return [out.unless_along(range(dim - len(out.saved("normalized_shape")), dim))]


@rule("NativeGroupNorm")
def group_norm(out: Output) -> list[AnyLayout | None]:
    return [out.unless_along(range(1, len(out.shape)))]


@rule("NativeBatchNorm CudnnBatchNorm MiopenBatchNorm BatchNormWithUpdate")
def batch_norm(out: Output) -> list[AnyLayout | None]:
    """With statistics of the batch, channels stay apart, and several samples in one channel are mixed."""
    layout = out.layout
    if not layout.occupies([axis for axis in range(len(out.shape)) if axis != 1]):
        channels = layout.moved([1])
        return [layout, channels, channels]
    has_stored_statistics = kind(out.node) == "NativeBatchNorm" and not out.saved("training")
    is_one_sample = isinstance(layout, Layout) and layout.n == 1
    return [layout if has_stored_statistics or is_one_sample else None]


@rule("PreluKernel")
def prelu(out: Output) -> list[AnyLayout | None]:
    return [out.layout, None if out.edges[1][0] is None else broadcast(out, 1)]


_SIZES = ("1D", "2D", "3D")
_POOLED = """
MaxPool*WithIndices AvgPool* AdaptiveAvgPool* AdaptiveMaxPool* MkldnnMaxpool* UpsampleNearest* UpsampleNearestExact*
UpsampleLinear* UpsampleBilinear* UpsampleBicubic* UpsampleTrilinear*
"""


@rule(" ".join(_POOLED.replace("*", size) for size in _SIZES) + " MaxPool2D PixelShuffle PixelUnshuffle")
def pooled(out: Output) -> AnyLayout:
    """Positions are mixed, channels and images are not."""
    mixed = next((int(size[0]) for size in _SIZES if size in kind(out.node)), 3)
    return out.unless_along(range(len(out.shape) - mixed, len(out.shape)))


@rule(
    "ScaledDotProductFlashAttentionForCpu ScaledDotProductEfficientAttention ScaledDotProductFlashAttention "
    "ScaledDotProductCudnnAttention ScaledDotProductFusedAttentionOverrideable",
    several_axes=True,
)
def attention(out: Output) -> list[AnyLayout | None]:
    """``[b, heads, positions, channels]`` of query, key and value; a bias is expanded."""
    if out.layout.occupies([2]) and not out.layout.occupies([1, 3]):
        return _attention_along_positions(out)
    layout, shape = out.unless_along(range(1, len(out.shape))), (*out.shape[:3], 0)
    return out.each(lambda k: layout if k < 3 else broadcast_from((*out.input_shape(k)[:-1], 0), layout, shape))


def _attention_along_positions(out: Output) -> list[AnyLayout | None]:
    """Samples along the queries' positions: a key belongs to that of all queries from which no mask keeps it apart."""
    if any(other is not None for other, _ in out.edges[3:]) or kind(out.node) != "ScaledDotProductFlashAttentionForCpu":
        raise Unknown
    queries, keys = out.shape[2], out.input_shape(1)[2]
    is_seen = torch.ones(1, queries, keys, dtype=torch.bool)
    if out.saved("is_causal"):
        is_seen = is_seen.tril()
    if out.saved("attn_mask") is not None:
        (mask,) = out.indices("attn_mask")
        allowed = mask if mask.dtype == torch.bool else mask > -torch.inf
        is_seen = is_seen & (allowed.reshape(-1, *allowed.shape[-3:]).any(1) if allowed.dim() > 2 else allowed)
    owner = out.owner[:, 0, :, 0].expand(-1, queries)
    rows = max(len(owner), len(is_seen))
    is_seen = is_seen.expand(rows, -1, -1)
    given = owner.expand(rows, -1).unsqueeze(2).expand_as(is_seen)
    largest = given.where(is_seen, -1).amax(1)
    smallest = given.where(is_seen & (given >= 0), out.layout.n).amin(1)
    if bool(((largest >= 0) & (smallest != largest)).any()):
        raise Unknown  # numbers that are small enough mask as well
    layout = out.layout_of(largest[:, None, :, None])
    return [out.layout, layout, layout]


@rule("MkldnnRnnLayer")
def recurrent(out: Output) -> list[AnyLayout | None]:
    """One direction of a layer, ``[t, n, ...]``: input, weights, and states ``[..., n, h]``."""
    layout = out.layout
    if out.number != 0 or layout.axes != [1]:
        raise Unknown
    states = out.each(lambda k: layout.moved([None, 1, None][3 - len(out.input_shape(k)) :]) if k > 4 else None)
    return [layout, *states[1:]]
