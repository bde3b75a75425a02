"""A loss whose input has rows of some samples, in any order: a part of a batch, positions that a mask selects."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backpack.losses.base import LossRoot


class RootOfRows(LossRoot):
    """From the root for rows ``[v, r, d]``: rows of one sample have columns of their own.

    ``owner``: the sample of each row; ``-1``: none. Column ``v`` of the ``k``-th rows of all samples is column
    ``k * columns + v``.
    """

    def __init__(self, root: LossRoot, owner: Tensor, n: int) -> None:
        self.of_rows, self.smallest, self.notice = root, root.smallest, root.notice
        order = owner.argsort(stable=True)
        before = torch.searchsorted(owner[order].contiguous(), owner.contiguous())
        self._place = torch.empty_like(owner).scatter(0, order, torch.arange(len(owner), device=owner.device)) - before
        """Which of the rows of its sample a row is."""
        self._place = self._place.where(owner >= 0, -1)
        self._most = int(self._place.max()) + 1 if len(owner) else 0
        self.columns = self._most * root.columns
        if root.signs is not None:
            signs = root.signs.new_ones(self._most, len(root.signs), n)
            there = self._place >= 0
            signs[self._place[there], :, owner[there]] = root.signs.T[there]
            self.signs = signs.flatten(0, 1)

    @property
    def documented_columns(self) -> int:
        return self._most * self.of_rows.documented_columns

    def exact(self, start: int, stop: int) -> Tensor:
        return self._apart(start, stop, self.of_rows.columns, self.of_rows.exact)

    def documented(self, start: int, stop: int) -> Tensor:
        return self._apart(start, stop, self.of_rows.documented_columns, self.of_rows.documented)

    def _apart(self, start: int, stop: int, each: int, columns: Callable[[int, int], Tensor]) -> Tensor:
        """Columns of which each is of one row of every sample."""
        pieces = []
        for place in range(start // each, -(-stop // each)):
            first = place * each
            own = columns(max(start, first) - first, min(stop, first + each) - first)
            pieces.append(own * (self._place == place).to(own.dtype)[:, None])
        return torch.cat(pieces)

    def sampled(self) -> Tensor:
        return self.of_rows.sampled()

    def weighed(self, grad: Tensor) -> Tensor:
        return self.of_rows.weighed(grad)
