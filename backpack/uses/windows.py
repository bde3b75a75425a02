"""Patches of images, which convolutions multiply with a kernel, and faster ways to sums over patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack.memory import contiguous, product
from backpack.uses.base import accumulate
from backpack.uses.second_moments import scaled_product, second_moment

Size = int | Sequence[int]

SMALL = 2**19, 2**26
"""Entries of patches, and multiplications with each other, up to which one product is faster than many smaller ones."""


def each(size: Size, dims: int) -> list[int]:
    """One number for each spatial dimension."""
    sizes = [size] if isinstance(size, int) else list(size)
    return sizes * dims if len(sizes) == 1 else sizes


@dataclass(frozen=True)
class Windows:
    """The places of a kernel on an image: one number for each spatial dimension, ``padding`` as ``F.pad`` takes it.

    Axes: ``b`` images, ``c`` channels in ``g`` groups.
    """

    kernel: Sequence[int]
    out: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    def padded(self, x: Tensor) -> Tensor:
        """The image with its borders."""
        return F.pad(x, list(self.padding)) if any(self.padding) else x

    def view(self, x: Tensor) -> Tensor:
        """The patches ``[b, c, *kernel, *out]`` of padded images ``[b, c, *spatial]``, as a view of their memory."""
        x = x.contiguous()
        steps = x.stride()[2:]
        dilated = [step * d for step, d in zip(steps, self.dilation, strict=True)]
        strided = [step * s for step, s in zip(steps, self.stride, strict=True)]
        return x.as_strided([*x.shape[:2], *self.kernel, *self.out], [*x.stride()[:2], *dilated, *strided])

    def columns(self, x: Tensor, groups: int) -> Tensor:
        """The patches of ``[b, c, *spatial]``, ``[b, g, c/g * kernel, out]``."""
        patches = self.view(self.padded(x))  # of a 1x1 convolution, they are the input
        patches = patches if patches.is_contiguous() else contiguous(patches)
        return patches.reshape(len(x), groups, -1, prod(self.out))

    def gram(self, x: Tensor, groups: int) -> Tensor:
        """Dot products of these columns, ``[b, g, out, out]``; of several images a sample if there are.

        Pixels of two patches are as far apart as the patches: what is summed, over the kernel's axes one by one, are
        dot products of single pixels.
        """
        dims = len(self.kernel)
        x = self.padded(x)
        x = x.transpose(1, 2) if x.dim() > dims + 2 else x
        images, sizes = x.shape[2:-dims], x.shape[2:]
        pixels = x.reshape(len(x), groups, -1, prod(sizes))
        gram = product(torch.matmul, pixels.transpose(2, 3), pixels, (*pixels.shape[:2], prod(sizes), prod(sizes)))
        gram = gram.reshape(*pixels.shape[:2], *sizes, *sizes)
        for axis, (size, step, gap) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            terms: list[Tensor] = []
            places: list[slice] = [slice(None)] * gram.dim()
            for start in range(0, size * gap, gap):
                window = slice(start, start + step * (self.out[axis] - 1) + 1, step)
                places[axis - dims] = places[axis - dims - len(sizes)] = window
                accumulate(terms, gram[tuple(places)] if terms else contiguous(gram[tuple(places)]))
            gram = terms[0]
        return gram.reshape(*pixels.shape[:2], prod(images) * prod(self.out), -1)

    def moments(self, x: Tensor, scale: float) -> Tensor:
        """``scale`` times the sum over images and positions of outer products of the columns, ``[i, i]``.

        For stride 1 along the last axis, unless these are few: patches are formed along the others only, and what pairs
        of entries of the kernel that are equally far apart have in common is multiplied once.
        """
        kernel, out, dims = self.kernel, self.out, len(self.kernel)
        size = x.shape[1] * prod(kernel)
        entries = size * len(x) * prod(out)
        if self.stride[-1] > 1 or kernel[-1] == 1 or (entries <= SMALL[0] and entries * size <= SMALL[1]):
            patches = contiguous(self.view(self.padded(x)).movedim(0, dims + 1))  # [c, *kernel, b, *out]
            return second_moment(patches.reshape(size, -1).T, scale)
        order = 1, x.dim() - 1, 0, *range(2, x.dim() - 1)
        *pads, before, _ = *self.padding[2:], *self.padding[:2]
        x = F.pad(x.permute(order), pads) if any(pads) else x.permute(order)  # [c, last axis, b, *other axes]
        width, size = x.shape[1], kernel[-1]
        others = Windows(kernel[:-1], out[:-1], self.stride[:-1], (), self.dilation[:-1])
        rows = contiguous(others.view(x.flatten(1, 2)).movedim(1, dims))
        rows = rows.reshape(-1, width, len(x[0, 0]) * prod(out[:-1]))
        inputs = len(rows)
        result = rows.new_zeros(inputs, size, inputs, size)
        for distance, apart, start, stop, pairs in _shared(size, out[-1], self.dilation[-1], before, width):
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
