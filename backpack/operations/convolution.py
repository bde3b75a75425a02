"""Convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack.memory import contiguous, product
from backpack.operations.linear import shift
from backpack.operations.registry import Operation, rule
from backpack.uses import DenseUse
from backpack.uses.base import accumulate
from backpack.uses.linear_map import scaled_product, second_moment

Size = int | Sequence[int]


def _each(size: Size, dims: int) -> list[int]:
    """One number a spatial dimension."""
    sizes = [size] if isinstance(size, int) else list(size)
    return sizes * dims if len(sizes) == 1 else sizes


def unfold(x: Tensor, kernel: Sequence[int], out: Sequence[int], stride: Size, dilation: Size) -> Tensor:
    """The patches of a padded input ``[b, c, *spatial]``, as ``[b, c, *kernel, *out]``."""
    dims = len(kernel)
    x = x.contiguous()
    steps = x.stride()[2:]
    dilated = [step * d for step, d in zip(steps, _each(dilation, dims), strict=True)]
    strided = [step * s for step, s in zip(steps, _each(stride, dims), strict=True)]
    return x.as_strided([*x.shape[:2], *kernel, *out], [*x.stride()[:2], *dilated, *strided])


def _patches(
    x: Tensor,
    kernel: Sequence[int],
    out: Sequence[int],
    stride: Size,
    padding: Sequence[int],
    dilation: Size,
    groups: int,
) -> Tensor:
    """Patches of ``[b, c, *spatial]`` as columns, ``[b, g, c/g * kernel, out]``; ``padding`` as ``F.pad`` takes it."""
    if any(padding):
        x = F.pad(x, list(padding))
    columns = contiguous(unfold(x, kernel, out, stride, dilation))
    return columns.reshape(len(x), groups, -1, prod(out))


def _gram(
    x: Tensor,
    kernel: Sequence[int],
    out: Sequence[int],
    stride: Size,
    padding: Sequence[int],
    dilation: Size,
    groups: int,
) -> Tensor:
    """Dot products of the columns of ``_patches``, ``[b, g, out, out]``; of several images a sample if there are.

    Pixels of two patches are as far apart as the patches: what is summed, over the kernel's axes one by one, are dot
    products of single pixels.
    """
    dims = len(kernel)
    x = F.pad(x, list(padding)) if any(padding) else x
    x = x.transpose(1, 2) if x.dim() > dims + 2 else x
    images, sizes = x.shape[2:-dims], x.shape[2:]
    pixels = x.reshape(len(x), groups, -1, prod(sizes))
    gram = product(torch.matmul, pixels.transpose(2, 3), pixels, (*pixels.shape[:2], prod(sizes), prod(sizes)))
    gram = gram.reshape(*pixels.shape[:2], *sizes, *sizes)
    for axis, (size, step, gap) in enumerate(zip(kernel, _each(stride, dims), _each(dilation, dims), strict=True)):
        terms: list[Tensor] = []
        places: list[slice] = [slice(None)] * gram.dim()
        for start in range(0, size * gap, gap):
            window = slice(start, start + step * (out[axis] - 1) + 1, step)
            places[axis - dims] = places[axis - dims - len(sizes)] = window
            accumulate(terms, gram[tuple(places)] if terms else contiguous(gram[tuple(places)]))
        gram = terms[0]
    return gram.reshape(*pixels.shape[:2], prod(images) * prod(out), -1)


def _moments(
    x: Tensor,
    kernel: Sequence[int],
    out: Sequence[int],
    stride: Size,
    padding: Sequence[int],
    dilation: Size,
    scale: float,
) -> Tensor:
    """``scale`` times the sum over samples and positions of outer products of the columns of ``_patches``, ``[i, i]``.

    For stride 1 along the last axis: patches are formed along the others only, and what pairs of entries of the kernel
    that are equally far apart have in common is multiplied once.
    """
    dims, strides, gaps = len(kernel), _each(stride, len(kernel)), _each(dilation, len(kernel))
    if strides[-1] > 1 or kernel[-1] == 1:
        x = F.pad(x, list(padding)) if any(padding) else x
        patches = contiguous(unfold(x, kernel, out, stride, dilation).movedim(0, dims + 1))  # [c, *kernel, b, *out]
        return second_moment(patches.reshape(x.shape[1] * prod(kernel), -1).T, scale)
    order = 1, x.dim() - 1, 0, *range(2, x.dim() - 1)
    *pads, before, _ = *padding[2:], *padding[:2]
    x = F.pad(x.permute(order), pads) if any(pads) else x.permute(order)  # [c, last axis, b, *other axes]
    width, size = x.shape[1], kernel[-1]
    rows = unfold(x.flatten(1, 2), kernel[:-1], out[:-1], strides[:-1], gaps[:-1])
    rows = contiguous(rows.movedim(1, dims)).reshape(-1, width, len(x[0, 0]) * prod(out[:-1]))
    inputs = len(rows)
    result = rows.new_zeros(inputs, size, inputs, size)
    for distance, apart, start, stop, pairs in _shared(size, out[-1], gaps[-1], before, width):
        left, right = rows[:, start:stop].flatten(1), rows[:, start + apart : stop + apart].flatten(1)
        moment = scaled_product(left, right.T, scale) if distance else second_moment(left.T, scale)
        for place in pairs:
            result[:, place, :, place + distance] += moment
            if distance:
                result[:, place + distance, :, place] += moment.T
    return result.reshape(inputs * size, inputs * size)


def _shared(size: int, out: int, gap: int, before: int, width: int) -> Iterator[tuple[int, int, int, int, list[int]]]:
    """Where entries ``a`` and ``a + distance`` of a kernel's axis meet the same pairs of entries of the input.

    Gives the distance, that in the input, a range of the input without its padding, and all such ``a``.
    """
    for distance in range(size):
        apart = distance * gap
        windows = [
            (max(0, a * gap - before), min(a * gap - before + out, width - apart)) for a in range(size - distance)
        ]
        for start, stop in pairwise(sorted({end for window in windows for end in window})):
            pairs = [a for a, (first, last) in enumerate(windows) if first <= start and stop <= last]
            if pairs:
                yield distance, apart, start, stop, pairs


def _padding(padding: Size | str, kernel: Sequence[int], dilation: Size) -> list[int]:
    """In the form of ``F.pad``: last dimension first, before and behind."""
    dims = len(kernel)
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(_each(dilation, dims), kernel, strict=True)]
        pairs = [(t // 2, t - t // 2) for t in total]
    else:
        pairs = [(p, p) for p in _each(padding, dims)]
    return [side for pair in reversed(pairs) for side in pair]


@rule(torch.conv1d, torch.conv2d, torch.conv3d)
def convolution(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Operation | None:
    kernel = weight.shape[2:]
    spatial = out.shape[2:]
    if out.dim() != weight.dim():  # a single sample without a batch axis
        return None
    pads = _padding(padding, kernel, dilation)

    def columns(x: Tensor) -> Tensor:
        batch = x.flatten(0, x.dim() - len(kernel) - 2)
        patches = _patches(batch, kernel, spatial, stride, pads, dilation, groups)
        return _positions(patches, len(x)).transpose(2, 3)

    def moments(x: Tensor, scale: float) -> Tensor:
        batch = x.reshape(-1, weight.shape[1], *x.shape[x.dim() - len(kernel) :])  # the mean over groups is wanted
        return _moments(batch, kernel, spatial, stride, pads, dilation, scale / groups)[None]

    def gram(x: Tensor) -> Tensor:
        return _gram(x, kernel, spatial, stride, pads, dilation, groups)

    def share() -> float:  # to add a dot product of two pixels takes as long as eight multiplications
        pixels, places = prod(map(sum, zip(input.shape[2:], pads[-2::-2], pads[-1::-2], strict=True))), prod(spatial)
        return (pixels * weight.shape[1] + 8 * sum(kernel) * places) * pixels / (places**2 * max(1, weight[0].numel()))

    def channels(grad: Tensor) -> Tensor:
        v, n = grad.shape[:2]
        batch = grad.reshape(-1, groups, weight.shape[0] // groups, prod(spatial))
        return _positions(batch, v * n).transpose(2, 3).unflatten(0, (v, n))

    def apply(matrix: Tensor) -> Tensor:
        function = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
        return function(input, matrix, None, stride, padding, dilation, groups)

    use = DenseUse((input,), columns, channels, moments=moments, gram=(gram, share), apply=apply)
    return Operation((0,), [(weight, use), (bias, shift(out, bias, 1))])


def _positions(batch: Tensor, n: int) -> Tensor:
    """``[n k, g, c, s]`` to ``[n, g, c, k s]``: several images of one sample are further positions."""
    if len(batch) == n:
        return batch
    return batch.unflatten(0, (n, -1)).permute(0, 2, 3, 1, 4).flatten(3)


@rule(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def transposed_convolution(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Operation | None:
    kernel = weight.shape[2:]
    dims = len(kernel)
    if out.dim() != weight.dim():
        return None
    spatial = input.shape[2:]
    # The output, padded as the transposed map crops it, is convolved to the input's size.
    pads = _padding(padding, kernel, dilation)

    def rows(x: Tensor) -> Tensor:
        batch = x.flatten(0, x.dim() - dims - 2)
        return _positions(batch.reshape(len(batch), groups, -1, prod(spatial)), len(x)).transpose(2, 3)

    def columns(grad: Tensor) -> Tensor:
        v, n = grad.shape[:2]
        batch = grad.reshape(-1, *grad.shape[-dims - 1 :])
        patches = _patches(batch, kernel, spatial, stride, pads, dilation, groups)
        return _positions(patches, v * n).transpose(2, 3).unflatten(0, (v, n))

    # For Kronecker factors, the map with the matrix ``weight.transpose(0, 1)``: the input, with zeros between its
    # entries, is convolved with the reversed kernel.
    steps, gaps = _each(stride, dims), _each(dilation, dims)
    starts = [d * (k - 1) - p for d, k, p in zip(gaps, kernel, _each(padding, dims), strict=True)]

    def spread(x: Tensor) -> Tensor:
        batch = x.flatten(0, x.dim() - dims - 2)
        sides: list[int] = []
        for axis in range(dims):
            batch = _with_gaps(batch, 2 + axis, steps[axis])
            needed = out.shape[2 + axis] + gaps[axis] * (kernel[axis] - 1)
            sides = [starts[axis], needed - starts[axis] - batch.shape[2 + axis], *sides]
        patches = unfold(F.pad(batch, sides), kernel, out.shape[2:], 1, dilation).flip(list(range(2, 2 + dims)))
        return _positions(patches.reshape(len(batch), groups, -1, prod(out.shape[2:])), len(x)).transpose(2, 3)

    def channels(grad: Tensor) -> Tensor:
        v, n = grad.shape[:2]
        batch = grad.reshape(-1, groups, weight.shape[1], prod(out.shape[2:]))
        return _positions(batch, v * n).transpose(2, 3).unflatten(0, (v, n))

    def apply(matrix: Tensor) -> Tensor:
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return function(input, matrix, None, stride, padding, output_padding, groups, dilation)

    use = DenseUse((input,), rows, columns, flipped=True, other=(spread, channels), apply=apply)
    return Operation((0,), [(weight, use), (bias, shift(out, bias, 1))])


def _with_gaps(x: Tensor, axis: int, step: int) -> Tensor:
    """Zeros between the entries along an axis, which are then ``step`` apart."""
    if step == 1:
        return x
    apart = torch.stack([x, *[torch.zeros_like(x)] * (step - 1)], axis + 1).flatten(axis, axis + 1)
    return apart.narrow(axis, 0, apart.shape[axis] - step + 1)
