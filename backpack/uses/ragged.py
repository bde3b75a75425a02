"""Samples of very different lengths. Since shorter ones are padded, samples of similar length are computed together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from backpack.samples import Rows, Scattered
from backpack.uses.base import Individual, sum_of
from backpack.uses.elementwise import Explicit
from backpack.uses.linear_map import LinearMap
from backpack.uses.use import Cotangents, SamplewiseUse, Use

SMALL = 2**14
"""Entries of a padded cotangent up to which one group is faster."""


def groups_of(rows: Rows, entries: int) -> list[tuple[Tensor, Rows]]:
    """The places of samples of similar length among all, and their rows, if padding would more than double a tensor.

    ``entries``: of the tensor, without padding. No groups: all samples may go together.
    """
    layout = rows.layout
    if not isinstance(layout, Scattered):
        return []
    lengths = layout.lengths
    padded, own = int(lengths.max()) * layout.n, int(lengths.sum())
    if padded <= 2 * own or entries * padded <= SMALL * own:
        return []
    chosen = torch.arange(layout.n) if rows.index is None else rows.index.cpu()
    found = []
    size = torch.log2(lengths[chosen].clamp(min=1).double()).floor()
    for bucket in size.unique():
        places = (size == bucket).nonzero().flatten()
        samples, index = chosen[places].unique(return_inverse=True)
        found.append((places, Rows(layout.of(samples), index)))
    return found


def arrive_in_groups(use: Use, cotangents: Cotangents, rows: Rows, shape: torch.Size, dtype: torch.dtype) -> Individual:
    """The same as ``use.arrive``, computed by groups of samples of similar length if padding would cost much."""
    groups = groups_of(rows, cotangents[0][0].numel()) if isinstance(use, SamplewiseUse) else []
    if not groups:
        return use.arrive(cotangents, rows, shape, dtype)
    parts = [(places, use.arrive(cotangents, own, shape, dtype)) for places, own in groups]
    return Ragged(parts, rows.count, partial(use.arrive, cotangents, rows, shape, dtype))


@dataclass(eq=False)
class Ragged(Individual):
    """Individual gradients by groups of samples, with their places among all; ``whole`` gives those of all, padded."""

    groups: Sequence[tuple[Tensor, Individual]]
    samples: int
    whole: Callable[[], Individual]

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.groups[0][1].shape

    @property
    def device(self) -> torch.device:
        return self.groups[0][1].device

    @property
    def size(self) -> tuple[int, int]:
        return self.groups[0][1].size[0], self.samples

    @property
    def is_complex(self) -> bool:
        return self.groups[0][1].is_complex

    @cached_property
    def padded(self) -> Individual:
        """The same, of all samples together."""
        return self.whole() if self.weights is None else self.whole().weighted(self.weights)

    def _narrow(self, start: int, stop: int) -> Individual:
        return self.padded.narrow(start, stop)

    def scaled(self, factor: Tensor) -> Ragged:
        scaled = [(places, part.scaled(factor[places])) for places, part in self.groups]
        return Ragged(scaled, self.samples, lambda: self.whole().scaled(factor))

    def weighted(self, weights: Tensor) -> Ragged:
        groups = [(places, part.weighted(weights[:, places])) for places, part in self.groups]
        found = Ragged(groups, self.samples, self.whole)
        found.weights = weights
        return found

    def prepare(self, names: Iterable[str]) -> None:
        names = [name for name in names if name not in self._known]
        for _, part in self.groups:
            part.prepare(names)
        super().prepare(names)

    def _dense(self) -> Tensor:
        return self._placed([part.dense() for _, part in self.groups], 1)

    def closed(self, name: str, swept: bool = False) -> Tensor | None:
        values = [getattr(part, name)() for _, part in self.groups]
        if name in ("total", "sum_squares"):
            return sum_of(values)
        return self._placed(values, int(name == "norms"))

    def _placed(self, values: Sequence[Tensor], axis: int) -> Tensor:
        """The results of all groups, in the order of the samples along an axis."""
        order = torch.cat([places for places, _ in self.groups]).argsort()
        return torch.cat(list(values), axis).index_select(axis, order.to(values[0].device))

    def maps(self) -> Sequence[LinearMap]:
        return self.padded.maps()

    def projected(self, rows: Tensor | None, columns: Tensor | None, sizes: tuple[int, int]) -> Tensor:
        return self._placed([part.projected(rows, columns, sizes) for _, part in self.groups], 1)

    def dots(self, other: Individual) -> Tensor:
        if isinstance(other, Explicit):
            return self._placed([part.dots(other) for _, part in self.groups], 1)
        return self.padded.dots(other.padded if isinstance(other, Ragged) else other)

    def sample_dots(self, other: Individual) -> Tensor:
        return self.padded.sample_dots(other.padded if isinstance(other, Ragged) else other)
