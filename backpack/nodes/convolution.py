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
        apply=partial(own.apply, input),
    )


def _padding(padding: Size | str, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """In the form of ``F.pad``: last dimension first, before and behind."""
    dims = len(kernel)
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        pairs = [(t // 2, t - t // 2) for t in total]
    else:
        pairs = [(p, p) for p in each(padding, dims)]
    return [side for pair in reversed(pairs) for side in pair]


@dataclass(frozen=True)
class Convolution:
    """What follows from the sizes of a convolution alone.

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
        padding: Size | str,
        dilation: Size,
        groups: int,
    ) -> Convolution:
        """That of an input, a weight and an output of these shapes."""
        dims = len(kernel) - 2
        gaps = each(dilation, dims)
        pads = _padding(padding, kernel[2:], gaps)
        padded = [sum(sizes) for sizes in zip(image[2:], pads[-2::-2], pads[-1::-2], strict=True)]
        windows = Windows(kernel[2:], out[2:], each(stride, dims), pads, gaps)
        return cls(kernel, padded, windows, groups, (stride, padding, dilation, groups))

    @property
    def dims(self) -> int:
        return len(self.image)

    def columns(self, x: Tensor) -> Tensor:
        """The patches of ``[n, ..., c, *image]``, ``[n, g, s, i]``."""
        batch = x.flatten(0, x.dim() - self.dims - 2)
        return _positions(self.windows.columns(batch, self.groups), len(x)).transpose(2, 3)

    def channels(self, grad: Tensor) -> Tensor:
        """A cotangent ``[v, n, ..., c, *spatial]`` as ``[v, n, g, s, o]``."""
        v, n = grad.shape[:2]
        batch = grad.reshape(-1, self.groups, self.kernel[0] // self.groups, prod(self.windows.out))
        return _positions(batch, v * n).transpose(2, 3).unflatten(0, (v, n))

    def moments(self, x: Tensor, scale: float) -> Tensor:
        """A multiple of the patches' second moment, as ``Dense`` has it."""
        batch = x.reshape(-1, self.kernel[1], *x.shape[x.dim() - self.dims :])  # the mean over groups is wanted
        return self.windows.moments(batch, scale / self.groups)[None]

    def gram(self, x: Tensor) -> Tensor:
        """Dot products of the patches of a sample."""
        return self.windows.gram(x, self.groups)

    def share(self) -> float:
        """What these take, relative to the patches' own: adding a product of pixels is as long as eight of numbers."""
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
        """Those of small kernels, one for each channel, ``[n c, 1, *kernel]``: as if samples were channels too."""
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

    def apply(self, input: Tensor, matrix: Tensor) -> Tensor:
        """The convolution itself, of another matrix."""
        return (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1](input, matrix, None, *self.given)


def _positions(batch: Tensor, n: int) -> Tensor:
    """Bring ``k`` images of each sample, ``[n k, g, c, s]``, to further positions of one image, ``[n, g, c, k s]``."""
    if len(batch) == n:
        return batch
    return batch.unflatten(0, (n, -1)).permute(0, 2, 3, 1, 4).flatten(3)


def transposed_use(
    out: Sequence[int],
    input: Tensor,
    weight: Sequence[int],
    stride: Size,
    padding: Size,
    groups: int,
    dilation: Size,
) -> DenseUse:
    """That of the weight of a transposed convolution; ``out`` and ``weight`` are shapes."""
    kernel = weight[2:]
    dims = len(kernel)
    spatial, steps, gaps = input.shape[2:], each(stride, dims), each(dilation, dims)
    # The output, padded as the transposed map crops it, is convolved to the input's size.
    windows = Windows(kernel, spatial, steps, _padding(padding, kernel, gaps), gaps)

    def rows(x: Tensor) -> Tensor:
        batch = x.flatten(0, x.dim() - dims - 2)
        return _positions(batch.reshape(len(batch), groups, -1, prod(spatial)), len(x)).transpose(2, 3)

    def columns(grad: Tensor) -> Tensor:
        v, n = grad.shape[:2]
        batch = grad.reshape(-1, *grad.shape[-dims - 1 :])
        return _positions(windows.columns(batch, groups), v * n).transpose(2, 3).unflatten(0, (v, n))

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
        return _positions(patches.reshape(len(batch), groups, -1, prod(out[2:])), len(x)).transpose(2, 3)

    def channels(grad: Tensor) -> Tensor:
        v, n = grad.shape[:2]
        batch = grad.reshape(-1, groups, weight[1], prod(out[2:]))
        return _positions(batch, v * n).transpose(2, 3).unflatten(0, (v, n))

    return DenseUse((input,), rows, columns, flipped=True, other=(spread, channels))


def _with_gaps(x: Tensor, axis: int, step: int) -> Tensor:
    """Zeros between the entries along an axis, which are then ``step`` apart."""
    if step == 1:
        return x
    apart = torch.stack([x, *[torch.zeros_like(x)] * (step - 1)], axis + 1).flatten(axis, axis + 1)
    return apart.narrow(axis, 0, apart.shape[axis] - step + 1)
