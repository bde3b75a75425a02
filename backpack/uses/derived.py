"""Parameters that a tensor in use is computed from: a parametrization, a sum of adapters, a part of a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backpack.uses.base import Individual
from backpack.uses.composed import Composed
from backpack.uses.linear_map import LinearMap
from backpack.uses.lookup import Lookup


@dataclass(eq=False)
class Derived(Composed):
    """Individual gradients of ``parameter``, given the ones, ``inner``, of a tensor that is computed from it.

    ``pull`` takes gradients ``[r, ...]`` of this tensor to gradients of the parameter. ``index``: the rows of the
    parameter that the tensor consists of, the same for all samples, if they are known; ``mask``: which of them are in
    fact looked up.
    """

    inner: Individual
    parameter: Tensor
    pull: Callable[[Tensor], Tensor]
    index: Tensor | None = None
    mask: Tensor | None = None

    @property
    def pieces(self) -> Sequence[Individual]:  # type: ignore[override]
        return [self.inner]

    def map(self, function: Callable[[Individual], Individual]) -> Derived:
        return replace(self, inner=function(self.inner))

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.parameter.shape

    @property
    def is_complex(self) -> bool:
        return self.parameter.is_complex()

    def _dense(self) -> Tensor:
        return self.pull(self.inner.dense().flatten(0, 1)).unflatten(0, self.size)

    def maps(self) -> Sequence[LinearMap]:
        """The maps of a transposed matrix, of some of its rows, or of rows that are looked up alike for all samples."""
        own, shape = self.inner.shape, self.shape
        if self.is_complex or self.inner.is_complex:
            return []  # entries may be conjugated, or be parts of complex ones
        if self.index is not None and self.mask is not None:
            return self._lookup(self.index, self.mask).maps()
        found = self._entries() if len(shape) > 1 and len(own) > 1 else None
        if found is None:
            return []
        row, column = found
        if own == (*shape[:-2], shape[-1], shape[-2]) and _are_transposed(row, column, own):
            turned = [a.transposed() for a in self.inner.maps()]
            return [] if None in turned else [a for a in turned if a is not None]
        used = (row >= 0).any(1).nonzero().flatten()
        row, column = row[used], column[used]
        if own[-1:] != shape[-1:] or not bool((row == row[:, :1]).all()):
            return []
        if not bool((column == torch.arange(column.shape[1], device=column.device)).all()):
            return []  # rows are not rows there
        if not len(used):
            return []
        start = int(used[0])
        if own[1:] == shape[1:] and torch.equal(row[:, 0] + start, used) and len(used) == own[0]:
            maps = self.inner.maps()
            if maps and not any(a.inputs_first or a.matrix[0] != own[0] for a in maps):
                return [MapOfSomeRows(a, range(start, start + own[0]), shape[0]) for a in maps]
        if len(shape) == 2 and len(used) == own[:-1].numel():
            index = used[row[:, 0].argsort()]
            return self._lookup(index, torch.ones_like(index, dtype=torch.bool)).maps()
        return []

    def _entries(self) -> tuple[Tensor, Tensor] | None:
        """For each entry of the parameter, the row and the column of the tensor at which it is found, ``[r, c]``.

        ``-1``: nowhere; ``None``: the tensor does not consist of entries of the parameter, each in one place. To find
        out, numbers of the tensor's rows and columns are pulled back, in two digits that are exact in 16 bits as well.
        """
        own, digit = self.inner.shape, 256
        width = own[1:].numel()
        row = torch.arange(own[0], device=self.parameter.device).reshape(-1, *[1] * (len(own) - 1)).expand(own)
        column = torch.arange(width, device=self.parameter.device).reshape(1, *own[1:]).expand(own)
        numbers = [torch.ones_like(row), row % digit, row // digit, column % digit, column // digit]
        if self.parameter.element_size() < 4 and max(own[0], width) > digit**2:
            return None
        with torch.no_grad():
            found = self.pull(torch.stack(numbers).to(self.parameter.dtype)).flatten(2)
        ones, *digits = found
        if not bool(((ones == 0) | (ones == 1)).all()):
            return None
        low, high, first, second = (torch.where(ones == 1, value.long(), -1) for value in digits)
        place = torch.where(low < 0, -1, low + digit * high), torch.where(first < 0, -1, first + digit * second)
        taken = (place[0] * width + place[1])[place[0] >= 0]
        return place if len(taken.unique()) == len(taken) else None

    def _lookup(self, index: Tensor, mask: Tensor) -> Lookup:
        v, n = self.size
        index, mask = (value.reshape(1, -1).expand(n, -1) for value in (index, mask))
        grad = self.inner.dense().reshape(v, n, -1, self.shape[1])
        return Lookup(index, grad.masked_fill(~mask.unsqueeze(-1), 0), self.shape, mask)


def _are_transposed(row: Tensor, column: Tensor, shape: torch.Size) -> bool:
    """Whether entries of a parameter are where they are in ``matrices.mT``, with matrices of this shape."""
    places = torch.arange(shape.numel(), device=row.device).reshape(shape)
    return torch.equal(row * shape[1:].numel() + column, places.mT.flatten(1))


class MapOfSomeRows(LinearMap):
    """The map of some adjacent rows of a parameter with ``count`` rows, as one of the whole parameter."""

    def __init__(self, inner: LinearMap, used: range, count: int) -> None:
        self.inner, self.used = inner, used
        self.matrix, self.ranks = (count, inner.matrix[1]), inner.ranks
        self.blocks = (inner.blocks[0] if len(used) == count else 1), inner.blocks[1]

    @property
    def rows(self) -> range:
        return self.used

    def output_factor(self, approx: str | None) -> Tensor:
        inner = self.inner.output_factor(approx)
        whole = inner.new_zeros(self.matrix[0], self.matrix[0])
        whole[self.used.start : self.used.stop, self.used.start : self.used.stop] = inner
        return whole

    def input_factor(self, approx: str | None, scale: float = 1.0) -> Tensor:
        return self.inner.input_factor(approx, scale)

    def rotated(self, rows: Tensor, columns: Tensor) -> Individual:
        inner = self.inner if self.blocks == self.inner.blocks else self.inner.ungrouped()
        return inner.rotated(rows[self.used.start : self.used.stop], columns)
