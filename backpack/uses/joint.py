"""Several uses of one parameter in one forward pass: tied weights, a module called twice, an unrolled cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from backpack.uses.base import Individual, sum_of
from backpack.uses.composed import Composed
from backpack.uses.dense_gradients import Dense
from backpack.uses.elementwise import Explicit
from backpack.uses.linear_map import LinearMap
from backpack.uses.lookup import Lookup
from backpack.uses.ragged import Ragged
from backpack.uses.stacked_matrices import Parts


@dataclass(eq=False)
class Joint(Composed):
    """Individual gradients that are the sum of those of several uses."""

    pieces: list[Individual]

    def map(self, function: Callable[[Individual], Individual]) -> Joint:
        return Joint([function(piece) for piece in self.pieces])

    def _dense(self) -> Tensor:
        return sum_of(piece.dense() for piece in self.pieces)

    def closed(self, name: str, swept: bool = False) -> Tensor | None:
        if name == "total":
            return sum_of(piece.total() for piece in self.pieces)
        if name == "norms":
            norms = sum_of(piece.norms() for piece in self.pieces)
            return sum((2 * a.sample_dots(b) for a, b in combinations(self.pieces, 2)), start=norms)
        return None

    def maps(self) -> Sequence[LinearMap]:
        found = [piece.maps() for piece in self.pieces]
        if not all(found) or len({(a.matrix, a.blocks) for maps in found for a in maps}) > 1:
            return []
        return [a for maps in found for a in maps]

    def projected(self, rows: Tensor | None, columns: Tensor | None, sizes: tuple[int, int]) -> Tensor:
        return sum_of(piece.projected(rows, columns, sizes) for piece in self.pieces)

    def dots(self, other: Individual) -> Tensor:
        others = other.pieces if isinstance(other, Joint) else [other]
        return sum_of(a.dots(b) for a in self.pieces for b in others)


def join(parts: Sequence[Individual]) -> Individual:
    """The sum of the gradients of all uses. Uses of one form are merged; others are added when they are read."""
    if len(parts) == 1:
        return parts[0]
    parts = [part.padded if isinstance(part, Ragged) else part for part in parts]
    groups: dict[object, list[Individual]] = {}
    for part in parts:
        groups.setdefault(_form(part), []).append(part)
    merged = [_merge(group) for group in groups.values()]
    return merged[0] if len(merged) == 1 else Joint(merged)


def _form(part: Individual) -> object:
    """Equal for uses that can be merged into one."""
    if isinstance(part, Dense):
        return (Dense, part.flipped, part.grad.shape[2], part.grad.shape[4], part.other)
    return type(part) if isinstance(part, (Explicit, Lookup, Parts)) else part


def _merge(group: list[Individual]) -> Individual:
    """Merge uses of one form: their positions become positions of one use."""
    first = group[0]
    if len(group) == 1:
        return first
    if isinstance(first, Parts):
        places: dict[int, list[Individual]] = {}
        for one in group:
            for place, part in one.parts.items():  # type: ignore[attr-defined]
                places.setdefault(place, []).append(part)
        return Parts({place: join(parts) for place, parts in places.items()}, first.whole)
    if isinstance(first, Explicit):
        return Explicit(sum_of(part.dense() for part in group))
    grad = torch.cat([part.grad for part in group], -2)  # type: ignore[attr-defined]
    if isinstance(first, Lookup):
        index = torch.cat([part.index for part in group], -1)  # type: ignore[attr-defined]
        found: Individual = replace(first, index=index, grad=grad, mask=torch.cat([part.mask for part in group], -1))  # type: ignore[attr-defined]
    else:
        x = torch.cat([part.x for part in group], -2)  # type: ignore[attr-defined]
        found = replace(first, inputs=(x,), grad=grad, unfold=None)  # type: ignore[type-var]
    if any(part.filled is not None for part in group):
        counts = [part.grad.shape[-2] * (1 if part.filled is None else part.filled) for part in group]  # type: ignore[attr-defined]
        found.filled = sum(counts[1:], start=counts[0]) / grad.shape[-2]
    return found
