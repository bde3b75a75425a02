"""Layouts say which entries of a tensor belong to which sample, and bring the tensor to one row for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """``n`` samples lie along ``axis``, which has ``outer * n * inner`` entries.

    Entry ``k`` along the axis belongs to sample ``(k // inner) % n``: with ``inner > 1`` the entries of a sample lie
    side by side, with ``outer > 1`` a block of all samples is repeated.
    """

    n: int
    axis: int = 0
    outer: int = 1
    inner: int = 1

    @property
    def factor(self) -> int:
        """How many entries along the axis a sample has."""
        return self.outer * self.inner

    @property
    def is_plain(self) -> bool:
        """Whether the first axis counts the samples."""
        return self.axis == 0 and self.factor == 1

    def split(self, tensor: Tensor, leading: int = 0) -> Tensor:
        """Move the samples to the front, behind ``leading`` further axes: ``[*leading, n, ...]``.

        Where a sample has several entries along its axis, they stay there.
        """
        place = leading + self.axis
        if self.factor == 1:
            return tensor.movedim(place, leading) if self.axis else tensor
        if self.outer > 1 and self.inner > 1:
            tensor = tensor.unflatten(place, (self.outer, self.n, self.inner))
            return tensor.movedim(place + 1, leading).flatten(place + 1, place + 2)
        parts = [self.outer, self.n] if self.outer > 1 else [self.n, self.inner]
        tensor = tensor.unflatten(place, parts)
        return tensor.movedim(place + (self.outer > 1), leading)

    def join(self, tensor: Tensor, leading: int = 0) -> Tensor:
        """Undo ``split``."""
        place = leading + self.axis
        if self.factor == 1:
            return tensor.movedim(leading, place) if self.axis else tensor
        if self.outer > 1 and self.inner > 1:
            tensor = tensor.unflatten(place + 1, (self.outer, self.inner)).movedim(leading, place + 1)
            return tensor.flatten(place, place + 2)
        return tensor.movedim(leading, place + (self.outer > 1)).flatten(place, place + 1)

    def owners(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """The sample each entry belongs to, broadcastable to ``shape``."""
        index = torch.arange(self.n, device=device)
        if self.inner > 1:
            index = index.repeat_interleave(self.inner)
        if self.outer > 1:
            index = index.repeat(self.outer)
        return index.reshape([-1 if a == self.axis else 1 for a in range(len(shape))])

    @property
    def axes(self) -> list[int]:
        """The axis along which the samples lie."""
        return [self.axis]

    def split_sizes(self, sizes: Sequence[int]) -> list[int]:
        """The sizes of one sample's row after ``split``, if the tensor has one entry along the axis of the samples."""
        return [size for axis, size in enumerate(sizes) if axis != self.axis or self.factor > 1]

    def occupies(self, axes: Sequence[int]) -> bool:
        """Whether samples lie along one of these axes."""
        return self.axis in axes

    def moved(self, sources: Sequence[int | None]) -> Layout | None:
        """The layout of a tensor whose axis ``k`` was ``sources[k]`` before; ``None``: the samples' is gone."""
        return replace(self, axis=list(sources).index(self.axis)) if self.axis in sources else None

    def reshaped(self, before: Sequence[int], after: Sequence[int]) -> Layout | Scattered | None:
        """The layout after ``reshape``; ``None``: unknown."""
        if 0 in after:
            return _empty(self.n, after)
        if self.n == 1:
            return Layout(1, inner=after[0]) if after else Scattered(1, torch.zeros((), dtype=torch.int64))
        below = self.inner * prod(before[self.axis + 1 :])
        right = 1
        for axis in range(len(after) - 1, -1, -1):
            size = after[axis]
            if below % right == 0 and size and (right * size) > below:
                inner = below // right
                if size % (inner * self.n) == 0:
                    return Layout(self.n, axis, size // (inner * self.n), inner)
                break
            right *= size
        return self.scattered(before).reshaped(before, after)

    def scattered(self, shape: Sequence[int]) -> Scattered:
        """The same layout as a table."""
        return Scattered(self.n, self.owners(shape, torch.device("cpu")))


@dataclass(frozen=True, eq=False)
class Scattered:
    """``n`` samples lie as a table says: ``owner`` holds the sample of each entry, or ``-1`` for no sample.

    The table broadcasts to the tensor. If it has a single entry, the sample is taken to lie along the first axis, which
    may have any size.
    """

    n: int
    owner: Tensor
    is_plain = False

    @cached_property
    def of_all(self) -> int | None:
        """The sample that all entries belong to, if the table has a single entry."""
        return int(self.owner) if self.owner.dim() and self.owner.numel() == 1 else None

    @property
    def axes(self) -> list[int]:
        """The axes along which entries of different samples lie."""
        wide = [axis for axis, size in enumerate(self.owner.shape) if size != 1]
        return wide or [0][: self.owner.dim()]

    @cached_property
    def has_none(self) -> bool:
        """Whether there are entries of no sample."""
        return bool((self.owner < 0).any())

    def with_whole_rows(self) -> AnyLayout:
        """The layout in which entries of no sample count to the one sample beside them along the last axis, if any."""
        owner = self.owner
        if not self.has_none or not owner.dim() or owner.shape[-1] == 1:
            return self
        largest = owner.amax(-1, keepdim=True)
        whole = bool(((owner == largest) | (owner < 0)).all())
        return found_layout(self.n, largest, exactly=True) if whole else self

    @cached_property
    def lengths(self) -> Tensor:
        """How many rows each sample has, ``[n]``."""
        return torch.bincount(self.owner[self.owner >= 0], minlength=self.n)

    def of(self, samples: Tensor) -> Scattered:
        """Where some of the samples lie."""
        numbers = torch.full((self.n + 1,), -1)
        numbers[samples] = torch.arange(len(samples))
        return Scattered(len(samples), numbers[self.owner])

    @cached_property
    def _index(self) -> tuple[Tensor, Tensor]:
        """For each sample its rows, ``[n, s]``, and which of these it has."""
        owner, counts = self.owner.flatten(), self.lengths
        order = owner.argsort(stable=True)
        order = order[(owner[order] < 0).sum() :]
        longest = max(1, int(counts.max())) if self.n else 1
        place = torch.arange(longest)
        inside = place < counts[:, None]
        start = counts.cumsum(0) - counts
        index = (start[:, None] + place).clamp(max=max(0, len(order) - 1))
        rows = order[index] if len(order) else torch.zeros_like(index)
        return rows.masked_fill(~inside, 0), inside

    @property
    def filled(self) -> Tensor | None:
        """The share of the rows from ``split`` that each sample fills; ``None``: all samples fill all rows."""
        inside = self._index[1]
        return None if inside.all() else inside.double().mean(1)

    def split(self, tensor: Tensor, leading: int = 0) -> Tensor:
        """``[*leading, n, s, ...]``: the rows of each sample, zero where it has fewer than others."""
        if self.of_all is not None:
            zero = torch.zeros_like(tensor)
            return torch.stack([tensor if k == self.of_all else zero for k in range(self.n)], leading)
        axes = self.axes
        sizes = [tensor.shape[leading + axis] for axis in axes]
        rows, inside = self._index
        front = tensor.movedim([leading + axis for axis in axes], list(range(leading, leading + len(axes))))
        front = front.reshape(*tensor.shape[:leading], prod(sizes), *front.shape[leading + len(axes) :])
        if front.shape[leading] == 0:
            return front.new_zeros(*front.shape[:leading], *rows.shape, *front.shape[leading + 1 :])
        found = front.index_select(leading, rows.flatten().to(tensor.device)).unflatten(leading, rows.shape)
        if inside.all():
            return found
        inside = inside.to(tensor.device)
        return found.masked_fill(~inside.reshape(*inside.shape, *[1] * (found.dim() - leading - 2)), 0)

    def join(self, tensor: Tensor, leading: int = 0) -> Tensor:
        """Undo ``split``; entries of no sample are zero."""
        if self.of_all is not None:
            found = tensor.select(leading, max(0, self.of_all))
            return found if self.of_all >= 0 else torch.zeros_like(found)
        axes, (rows, inside) = self.axes, self._index
        sizes = [self.owner.shape[axis] for axis in axes]
        rest = tensor.shape[leading + 2 :]
        found = tensor.new_zeros(*tensor.shape[:leading], prod(sizes), *rest)
        place = inside.flatten().nonzero().flatten().to(tensor.device)
        given = tensor.flatten(leading, leading + 1).index_select(leading, place)
        found = found.index_copy(leading, rows[inside].to(tensor.device), given).unflatten(leading, sizes or [1])
        if not axes:
            return found.squeeze(leading)
        return found.movedim(list(range(leading, leading + len(axes))), [leading + axis for axis in axes])

    def owners(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """The sample each entry belongs to, broadcastable to ``shape``."""
        return self.owner.to(device)

    def split_sizes(self, sizes: Sequence[int]) -> list[int]:
        """The sizes of one sample's row after ``split``, if the tensor has one entry along the axis of the samples."""
        return [1, *(size for axis, size in enumerate(sizes) if axis not in self.axes)]

    def occupies(self, axes: Sequence[int]) -> bool:
        """Whether entries of different samples lie along one of these axes."""
        return any(axis in axes for axis in self.axes)

    def moved(self, sources: Sequence[int | None]) -> Scattered | None:
        """The layout of a tensor whose axis ``k`` was ``sources[k]`` before; ``None``: samples' axes are gone."""
        if any(axis not in sources for axis in self.axes):
            return None
        kept = [1 if source is None else self.owner.shape[source] for source in sources]
        order = [source for source in sources if source is not None]
        lost = [axis for axis in range(self.owner.dim()) if axis not in order]
        return Scattered(self.n, self.owner.permute([*order, *lost]).reshape(kept))

    def reshaped(self, before: Sequence[int], after: Sequence[int]) -> Layout | Scattered | None:
        """The layout after ``reshape``."""
        return found_layout(self.n, self.owner.expand(list(before)).reshape(list(after)), exactly=True)

    def scattered(self, shape: Sequence[int]) -> Scattered:
        """The layout itself."""
        return self


AnyLayout: TypeAlias = Layout | Scattered


def same(one: AnyLayout | None, other: AnyLayout | None) -> bool:
    """Whether two layouts of tensors of one shape give each entry to the same sample."""
    if one is other:
        return True
    if isinstance(one, Scattered) and isinstance(other, Scattered):
        return one.n == other.n and torch.equal(one.owner, other.owner)
    return one == other


def found_layout(n: int, owner: Tensor, exactly: bool = False) -> AnyLayout:
    """The simplest layout in which each entry belongs to the sample that ``owner`` says; ``-1``: to none.

    Entries of no sample may be counted to any, unless the layout must say so ``exactly``.
    """
    if owner.numel() == 0:
        return _empty(n, owner.shape)
    if n == 1:
        return Layout(1, inner=owner.shape[0]) if owner.dim() else Scattered(1, owner)
    for lenient in (False,) if exactly else (False, True):
        for axis in range(owner.dim() - 1, -1, -1):
            wide = sum(size != 1 for size in owner.shape)
            if owner.shape[axis] == 1 or (wide == 1 and (lenient or not axis)):
                continue  # the last axis stays: it may hold entries of no sample, and those of one sample are rows
            largest = owner.amax(axis, keepdim=True)
            smallest = (owner.where(owner >= 0, n) if lenient else owner).amin(axis, keepdim=True)
            if bool(((largest == smallest) | (lenient & (largest < 0))).all()):
                owner = largest
    axes = [axis for axis, size in enumerate(owner.shape) if size != 1]
    if len(axes) == 1:
        regular = _regular(n, axes[0], owner.flatten())
        if regular is not None:
            return regular
    return Scattered(n, owner)


def completed(layout: AnyLayout, shape: Sequence[int]) -> AnyLayout:
    """The regular layout that agrees with the entries of samples, and gives each entry of no sample to one of them.

    If there is no such layout, or several, the layout is returned as it is.
    """
    if not isinstance(layout, Scattered) or layout.n < 2 or not layout.has_none:
        return layout
    owner, found = layout.owner, list[Layout]()
    for axis, size in enumerate(shape):
        each = size // layout.n
        for inner in range(1, each + 1) if size % layout.n == 0 else ():
            if each % inner == 0:
                regular = Layout(layout.n, axis, each // inner, inner)
                if bool(((owner < 0) | (owner == regular.owners(shape, owner.device))).all()):
                    found.append(regular)
    return found[0] if len(found) == 1 else layout


def _empty(n: int, shape: Sequence[int]) -> Scattered:
    """The layout of a tensor without entries."""
    first = list(shape).index(0)
    return Scattered(n, torch.zeros([int(axis != first) for axis in range(len(shape))], dtype=torch.int64))


def _regular(n: int, axis: int, owner: Tensor) -> Layout | None:
    size = len(owner)
    if size % n:
        return None
    change = (owner != owner[0]).nonzero()
    inner = int(change[0]) if len(change) else size
    if size % (inner * n):
        return None
    layout = Layout(n, axis, size // (inner * n), inner)
    expected = layout.owners([size if a == axis else 1 for a in range(axis + 1)], owner.device).flatten()
    return layout if torch.equal(owner, expected) else None


@lru_cache(2**12)
def layouts(shape: tuple[int, ...], n: int, axes: tuple[int, ...] | range) -> Sequence[Layout]:
    """All layouts of ``n`` samples along one of the ``axes`` that a tensor of this shape can have."""
    if n == 1 and shape and shape[0] != 1:
        return (Layout(1, inner=shape[0]),)
    found = [Layout(n, axis) for axis in axes if shape[axis] == n]
    if 0 in axes and n > 1:
        found += layouts_in_blocks(shape, n)
    return tuple(found[:1] if n == 1 else found)


def layouts_in_blocks(shape: Sequence[int], n: int) -> list[Layout]:
    """The layouts in which each of ``n`` samples has several entries along the first axis: together, or in turns."""
    each = shape[0] // n if 0 < n < shape[0] and shape[0] % n == 0 else 0
    return [Layout(n, inner=each), Layout(n, outer=each)] if each else []


@dataclass
class Rows:
    """A choice of samples of tensors with this layout. ``index``: their numbers; ``None``: all of them."""

    layout: AnyLayout
    index: Tensor | None = None

    @property
    def count(self) -> int:
        return self.layout.n if self.index is None else len(self.index)

    @property
    def filled(self) -> Tensor | None:
        """The share of the positions from ``take`` that each sample fills; ``None``: all samples fill all positions."""
        filled = self.layout.filled if isinstance(self.layout, Scattered) else None
        return filled if filled is None or self.index is None else filled.to(self.index.device)[self.index]

    def take(self, tensor: Tensor, leading: int = 0) -> Tensor:
        """``[*leading, rows, ...]``."""
        layout = self.layout
        if not layout.is_plain:
            tensor = layout.split(tensor, leading)
        return tensor if self.index is None else tensor.index_select(leading, self.index)
