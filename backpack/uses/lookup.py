"""``z[n s] = c[n s] W[index[n s]]``: embeddings and bags of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backpack.memory import at_a_time, empty
from backpack.samples import Rows
from backpack.uses.base import Individual
from backpack.uses.dense_gradients import Dense
from backpack.uses.elementwise import Explicit
from backpack.uses.linear_map import LinearMap
from backpack.uses.second_moments import second_moment
from backpack.uses.use import SamplewiseUse


@dataclass(eq=False)
class Lookup(Individual):
    """Individual gradients whose row ``index[n s]`` receives ``grad[v n s d]``; ``index`` is ``[n, s]``.

    ``mask[n s]`` says at which positions a row is in fact looked up (elsewhere, ``grad`` is zero).
    """

    index: Tensor
    grad: Tensor
    shape: torch.Size
    mask: Tensor

    @property
    def device(self) -> torch.device:
        return self.grad.device

    @property
    def size(self) -> tuple[int, int]:
        return self.grad.shape[0], self.grad.shape[1]

    @property
    def is_complex(self) -> bool:
        return False  # PyTorch has no such embeddings

    def _narrow(self, start: int, stop: int) -> Lookup:
        return replace(self, index=self.index[start:stop], grad=self.grad[:, start:stop], mask=self.mask[start:stop])

    def scaled(self, factor: Tensor) -> Lookup:
        return replace(self, grad=self.grad * factor[:, None, None])

    def _scatter(self, grad: Tensor, rows: int) -> Tensor:
        """Add ``grad[v n s d]`` into ``rows`` tables, ``[rows, *p]``: all, one a sample, or one a sample and seed."""
        v, n = self.size
        index = self.index.expand(v, n, -1)
        if rows > 1:
            index = index + torch.arange(rows, device=index.device).reshape(-1, n, 1) * self.shape[0]
        table = empty((rows * self.shape[0], self.shape[1]), grad).zero_()
        return table.index_add_(0, index.flatten(), grad.flatten(0, 2)).reshape(rows, *self.shape)

    def _dense(self) -> Tensor:
        v, n = self.size
        return self._scatter(self.grad, v * n).reshape(v, n, *self.shape)

    def same_row(self, other: Lookup) -> Tensor:
        """Whether two positions of a sample look up the same row, as numbers ``[n, s, t]``."""
        return (self.index[:, :, None] == other.index[:, None, :]).to(self.grad.dtype)

    def _squares(self) -> Tensor:
        """Squared individual gradients, ``[v, n, s, d]``: those of a row are spread over the positions that use it."""
        step = max(1, at_a_time("scratch", self.device) // self.index.shape[1] ** 2)
        pieces = []
        for start in range(0, self.size[1], step):
            part = self.narrow(start, start + step)
            same = part.same_row(part)
            pieces.append((same @ part.grad).square() / same.sum(2, keepdim=True))
        return torch.cat(pieces, 1)

    def closed(self, name: str, swept: bool = False) -> Tensor | None:
        if name == "total":
            return self._scatter(self.grad, 1)[0]
        squares = self._squares()
        if name == "norms":
            return squares.sum((2, 3))
        if self.weights is not None:
            squares = squares * self.weights[:, :, None, None]
        if name == "sum_squares":
            return self._scatter(squares, 1)[0]
        return self._scatter(squares, self.size[1])

    def maps(self) -> Sequence[LinearMap]:
        return [LookupMap(self)]

    def dots(self, other: Individual) -> Tensor:
        """Sums over rows, each of pairs of samples that look it up; rows that equally many do are taken together."""
        if isinstance(other, Explicit):
            return self._dots_with_tables(other.value)
        if isinstance(other, Lookup) and other is not self and self.grad[:, 0].shape == other.grad[:, 0].shape:
            index, mask = torch.cat([self.index, other.index]), torch.cat([self.mask, other.mask])
            both = Lookup(index, torch.cat([self.grad, other.grad], 1), self.shape, mask)
            return both.dots(both)[:, : self.size[1], :, self.size[1] :]
        if other is not self:
            return super().dots(other)
        v, n = self.size
        own = torch.arange(n, device=self.index.device)[:, None]
        keys, places = torch.unique(self.index.long() * n + own, return_inverse=True)
        _, counts = torch.unique_consecutive(keys // n, return_counts=True)
        order = counts.repeat_interleave(counts).argsort(stable=True)
        sums = self.grad.new_zeros(len(keys), v, self.shape[1])
        sums.index_add_(0, places.flatten(), self.grad.permute(1, 2, 0, 3).flatten(0, 1))
        sums, samples = sums[order], (keys % n)[order]
        result, start = sums.new_zeros(n * n, v * v), 0
        for count, rows in torch.stack(torch.unique(counts, return_counts=True), 1).tolist():
            step = max(1, at_a_time("scratch", self.device) // (count * v) ** 2)
            for first in range(0, rows, step):
                stop = start + count * min(step, rows - first)
                grads = sums[start:stop].reshape(-1, count * v, self.shape[1])
                who = samples[start:stop].reshape(-1, count)
                dots = (grads @ grads.transpose(1, 2)).unflatten(2, (count, v)).unflatten(1, (count, v))
                pairs = who[:, :, None] * n + who[:, None, :]
                result.index_add_(0, pairs.flatten(), dots.transpose(2, 3).reshape(-1, v * v))
                start = stop
        return result.reshape(n, n, v, v).permute(2, 0, 3, 1)

    def _dots_with_tables(self, tables: Tensor) -> Tensor:
        """``dots`` with tables ``[w, m, *p]``, of which the rows that samples look up are needed."""
        step = max(1, at_a_time("scratch", self.device) // max(1, tables[..., 0, :].numel() * self.index.shape[1]))
        pieces = []
        for start in range(0, self.size[1], step):
            part = self.narrow(start, start + step)
            pieces.append(torch.einsum("wmnsd,vnsd->vnwm", tables[:, :, part.index], part.grad))
        return torch.cat(pieces, 1)

    def projected(self, rows: Tensor | None, columns: Tensor | None, sizes: tuple[int, int]) -> Tensor:
        if rows is None or sizes != self.shape:
            return super().projected(rows, columns, sizes)
        grad = self.grad if columns is None else self.grad @ columns
        return rows[self.index].mT @ grad

    def sample_dots(self, other: Individual) -> Tensor:
        step = max(1, at_a_time("scratch", self.device) // (self.index.shape[1] * _positions(other)))
        pieces = []
        for start in range(0, self.size[1], step):
            a, b = self.narrow(start, start + step), other.narrow(start, start + step)
            if isinstance(b, Lookup):
                pieces.append(((a.same_row(b) @ b.grad) * a.grad).sum((2, 3)))
            elif isinstance(b, Dense) and not b.flipped and b.grad.shape[2] == 1:
                index = a.index[None, :, None, :].expand(b.size[0], -1, b.grad.shape[3], -1)
                columns = b.grad[:, :, 0].gather(3, index)
                pieces.append((columns * (b.x[:, 0] @ a.grad.transpose(2, 3))).sum((2, 3)))
            else:
                return super().sample_dots(other)
        return torch.cat(pieces, 1)


def _positions(other: Individual) -> int:
    return other.index.shape[1] if isinstance(other, Lookup) else other.grad.shape[3] if isinstance(other, Dense) else 1


@dataclass(eq=False)
class LookupMap(LinearMap):
    """A table as the matrix of a linear map: its inputs, the unit vectors of the rows, have a diagonal factor."""

    grads: Lookup
    inputs_first = True
    diagonal_inputs = True

    @property
    def matrix(self) -> tuple[int, int]:  # type: ignore[override]
        return self.grads.shape[0], self.grads.shape[1]

    @property
    def ranks(self) -> tuple[int, int]:  # type: ignore[override]
        return self.grads.shape[0], self.grads.grad[..., 0].numel()

    def output_factor(self, approx: str | None) -> Tensor:
        grad = self.grads.grad if approx == "expand" else self.grads.grad.sum(2)
        return second_moment(grad.flatten(0, -2))

    def input_factor(self, approx: str | None, scale: float = 1.0) -> Tensor:
        """The diagonal; with ``"reduce"``, the factor has other entries as well, which are left out."""
        grads, (n, s) = self.grads, self.grads.index.shape
        positions = s if grads.filled is None else s * grads.filled.clamp(min=0.5 / s)[:, None]
        weight = grads.mask.to(grads.grad.dtype)
        if approx == "reduce":
            weight = weight * (grads.same_row(grads) @ weight[..., None])[..., 0] / positions**2
        elif approx == "expand":
            weight = weight / positions
        return weight.new_zeros(grads.shape[0]).index_add(0, grads.index.flatten(), weight.flatten()) * (scale / n)

    def rotated(self, rows: Tensor, columns: Tensor) -> Individual:
        grad = self.grads.grad @ columns
        if rows.dim() == 1:
            return replace(self.grads, grad=grad)
        return Dense((rows[self.grads.index].unsqueeze(1),), grad.unsqueeze(2), self.grads.shape, flipped=True)


@dataclass(eq=False)
class LookupUse(SamplewiseUse):
    """Rows ``index`` of the table, each times its ``weight``; row ``padding`` counts as zero.

    ``bag``: the output holds the sum over the last axis of ``index``.
    """

    index: Tensor
    padding: int | None = None
    weight: Tensor | None = None
    bag: bool = False

    def forward(self) -> Callable[[Tensor, torch.Size], Tensor]:
        def change(table: Tensor, shape: torch.Size) -> Tensor:
            found = table[self.index]
            if self.weight is not None:
                found = found * self.weight.unsqueeze(-1)
            if self.padding is not None:
                found = found.masked_fill((self.index == self.padding).unsqueeze(-1), 0)
            return (found.sum(-2) if self.bag else found).reshape(shape)

        return change

    def bind(self, grad: Tensor, rows: Rows, shape: torch.Size) -> Lookup:
        index = rows.take(self.index)
        mask = rows.take(torch.ones_like(self.index, dtype=torch.bool))
        if self.bag:
            grad = grad.unsqueeze(-2).expand(*grad.shape[:-1], index.shape[-1], -1)
        if self.weight is not None:
            weight = rows.take(self.weight)
            grad, mask = grad * weight.unsqueeze(-1), weight != 0
        if self.padding is not None:
            mask = mask & (index != self.padding)
            grad = grad.masked_fill(~mask.unsqueeze(-1), 0)
        index = index.reshape(len(index), -1)
        grad = grad.reshape(*grad.shape[:2], index.shape[1], -1)
        return Lookup(index, grad, shape, mask.reshape(index.shape))
