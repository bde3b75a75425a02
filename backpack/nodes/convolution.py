"""Convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack.nodes.registry import Place, form
from backpack.uses import DenseUse, ElementwiseUse, Use
from backpack.uses.windows import Size, Windows, each


@form("Convolution")
def convolution(place: Place) -> Use | None:
    if place.layout.axes != [0]:
        return None
    if place.k == 2:
        return ElementwiseUse(place.channels())
    if place.k != 1:
        return None
    input = place.saved("input")
    stride, padding, dilation = (tuple(place.saved(name)) for name in ("stride", "padding", "dilation"))
    groups = place.saved("groups")
    if place.saved("transposed"):
        return transposed_use(place.out, input, place.shape, stride, padding, groups, dilation)
    own = Convolution.of(tuple(input.shape), tuple(place.shape), place.out, stride, padding, dilation, groups)
    return DenseUse(
        (input,),
        own.columns,
        own.channels,
        moments=own.moments,
        gram=(own.gram, own.share),
        direct=own.individual if own.is_small_depthwise else None,
        summed=own.total,
        apply=partial(own.apply, input),
    )


def _padding(padding: Size, dims: int) -> list[int]:
    """The padding as ``F.pad`` takes it: last dimension first, before and behind."""
    return [side for size in reversed(each(padding, dims)) for side in (size, size)]


@dataclass(frozen=True)
class Convolution:
    """A convolution, described by its sizes alone.

    ``kernel`` is the shape of the weight, ``image`` that of padded images, without channels; ``given``: stride,
    padding, dilation and groups.
    """

    kernel: Sequence[int]
    image: Sequence[int]
    windows: Windows
    groups: int
    given: tuple[Any, ...]

    @classmethod
    @lru_cache(2**12)
    def of(
        cls,
        image: Sequence[int],
        kernel: Sequence[int],
        out: Sequence[int],
        stride: Size,
        padding: Size,
        dilation: Size,
        groups: int,
    ) -> Convolution:
        """The convolution with an input, a weight and an output of these shapes."""
        dims = len(kernel) - 2
        gaps = each(dilation, dims)
        pads = _padding(padding, dims)
        padded = [sum(sizes) for sizes in zip(image[2:], pads[-2::-2], pads[-1::-2], strict=True)]
        windows = Windows(kernel[2:], out[2:], each(stride, dims), pads, gaps)
        return cls(kernel, padded, windows, groups, (stride, padding, dilation, groups))

    @property
    def dims(self) -> int:
        return len(self.image)

    def columns(self, x: Tensor) -> Tensor:
        """The patches of ``[n, ..., c, *image]``, ``[n, g, s, i]``."""
        batch = x.flatten(0, x.dim() - self.dims - 2)
        return _positions(self.windows.columns(batch, self.groups), len(x))

    def channels(self, grad: Tensor) -> Tensor:
        """A cotangent ``[v, n, ..., c, *spatial]`` as ``[v, n, g, s, o]``."""
        v, n = grad.shape[:2]
        return _channels(grad, v * n, self.dims, self.groups).unflatten(0, (v, n))

    def moments(self, x: Tensor, scale: float) -> Tensor:
        """A multiple of the patches' second moment, as ``Dense`` has it."""
        batch = x.reshape(-1, self.kernel[1], *x.shape[x.dim() - self.dims :])  # the mean over groups is wanted
        return self.windows.moments(batch, scale / self.groups)[None]

    def gram(self, x: Tensor) -> Tensor:
        """Dot products of the patches of a sample."""
        return self.windows.gram(x, self.groups)

    def share(self) -> float:
        """The time that ``gram`` takes, relative to products of patches.

        To add one product of pixels to another takes as long as eight multiplications in a matrix product.
        """
        pixels, places = prod(self.image), prod(self.windows.out)
        sums = 8 * sum(self.kernel[2:]) * places
        return (pixels * self.kernel[1] + sums) * pixels / (places**2 * max(1, prod(self.kernel[1:])))

    @property
    def is_small_depthwise(self) -> bool:
        """Whether each channel has one kernel, for which PyTorch has fast code."""
        small = max(self.kernel[2:]) <= 3 and self.dims == 2
        symmetric = self.windows.padding[::2] == self.windows.padding[1::2]
        return small and symmetric and self.kernel[1] == 1 and self.kernel[0] == self.groups

    def individual(self, x: Tensor, grad: Tensor) -> Tensor:
        """Individual gradients of small kernels, one for each channel, ``[n c, 1, *kernel]``.

        They come from one convolution in which samples are channels, too.
        """
        channels, windows = len(x) * self.groups, self.windows
        return torch.ops.aten.convolution_backward(
            grad.reshape(1, channels, *windows.out),
            x.reshape(1, channels, *x.shape[2:]),
            x.new_empty(channels, 1, *windows.kernel),  # of which no values are needed
            None,
            windows.stride,
            windows.padding[::-2],
            windows.dilation,
            False,
            [0, 0],
            channels,
            [False, True, False],
        )[1]

    def total(self, x: Tensor, grad: Tensor) -> Tensor:
        """The gradient of the weight, from the cotangents ``[n, g, s, o]`` of all images."""
        stride, padding, dilation, groups = self.given
        images = x.flatten(0, x.dim() - self.dims - 2)
        rows = grad.unflatten(2, (len(images) // len(grad), -1)).permute(0, 2, 1, 4, 3)
        own = torch.ops.aten.convolution_backward(
            rows.reshape(len(images), -1, *self.windows.out),
            images,
            x.new_empty(()).expand(tuple(self.kernel)),  # of which no values are needed
            None,
            each(stride, self.dims),
            each(padding, self.dims),
            each(dilation, self.dims),
            False,
            [0] * self.dims,
            groups,
            [False, True, False],
        )
        return own[1]

    def apply(self, input: Tensor, matrix: Tensor) -> Tensor:
        """The convolution itself, of another matrix."""
        return (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1](input, matrix, None, *self.given)


def _positions(batch: Tensor, n: int) -> Tensor:
    """``k`` images of each sample, ``[n k, g, c, s]``, as further positions of one image, ``[n, g, k s, c]``."""
    if len(batch) != n:
        batch = batch.unflatten(0, (n, -1)).permute(0, 2, 3, 1, 4).flatten(3)
    return batch.transpose(2, 3)


def _channels(images: Tensor, n: int, dims: int, groups: int) -> Tensor:
    """The channels at each position of ``n`` samples' images ``[..., c, *spatial]``, ``[n, g, s, c/g]``."""
    channels, *spatial = images.shape[-dims - 1 :]
    return _positions(images.reshape(-1, groups, channels // groups, prod(spatial)), n)


def transposed_use(
    out: Sequence[int],
    input: Tensor,
    weight: Sequence[int],
    stride: Size,
    padding: Size,
    groups: int,
    dilation: Size,
) -> DenseUse:
    """The use of the weight of a transposed convolution; ``out`` and ``weight`` are shapes."""
    kernel = weight[2:]
    dims = len(kernel)
    spatial, steps, gaps = input.shape[2:], each(stride, dims), each(dilation, dims)
    # The output, padded as the transposed map crops it, is convolved to the input's size.
    windows = Windows(kernel, spatial, steps, _padding(padding, dims), gaps)

    def rows(x: Tensor) -> Tensor:
        return _channels(x, len(x), dims, groups)

    def columns(grad: Tensor) -> Tensor:
        v, n = grad.shape[:2]
        batch = grad.reshape(-1, *grad.shape[-dims - 1 :])
        return _positions(windows.columns(batch, groups), v * n).unflatten(0, (v, n))

    # For Kronecker factors, the map with the matrix ``weight.transpose(0, 1)``: the input, with zeros between its
    # entries, is convolved with the reversed kernel.
    starts = [d * (k - 1) - p for d, k, p in zip(gaps, kernel, each(padding, dims), strict=True)]

    def spread(x: Tensor) -> Tensor:
        batch = x.flatten(0, x.dim() - dims - 2)
        sides: list[int] = []
        for axis in range(dims):
            batch = _with_gaps(batch, 2 + axis, steps[axis])
            needed = out[2 + axis] + gaps[axis] * (kernel[axis] - 1)
            sides = [starts[axis], needed - starts[axis] - batch.shape[2 + axis], *sides]
        reversed_kernel = Windows(kernel, out[2:], each(1, dims), sides, gaps)
        patches = reversed_kernel.view(reversed_kernel.padded(batch)).flip(list(range(2, 2 + dims)))
        return _positions(patches.reshape(len(batch), groups, -1, prod(out[2:])), len(x))

    def channels(grad: Tensor) -> Tensor:
        v, n = grad.shape[:2]
        return _channels(grad, v * n, dims, groups).unflatten(0, (v, n))

    return DenseUse((input,), rows, columns, flipped=True, other=(spread, channels))


def _with_gaps(x: Tensor, axis: int, step: int) -> Tensor:
    """A tensor with zeros between its entries along an axis, which are then ``step`` apart."""
    if step == 1:
        return x
    apart = torch.stack([x, *[torch.zeros_like(x)] * (step - 1)], axis + 1).flatten(axis, axis + 1)
    return apart.narrow(axis, 0, apart.shape[axis] - step + 1)
