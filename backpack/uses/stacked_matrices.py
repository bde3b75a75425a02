"""Parameters whose parts are used separately: the matrices of experts, stacked along the first axis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backpack.samples import Rows, found_layout
from backpack.uses.base import Individual, sum_of
from backpack.uses.composed import Composed
from backpack.uses.dense_use import DenseUse
from backpack.uses.elementwise import Explicit
from backpack.uses.ragged import arrive_in_groups
from backpack.uses.use import Cotangents, Use


@dataclass(eq=False)
class Parts(Composed):
    """Individual gradients of a parameter, given those of some entries along its first axis; the rest are zero."""

    parts: dict[int, Individual]
    whole: torch.Size

    @property
    def pieces(self) -> Sequence[Individual]:  # type: ignore[override]
        return list(self.parts.values())

    def map(self, function: Callable[[Individual], Individual]) -> Parts:
        return Parts({place: function(part) for place, part in self.parts.items()}, self.whole)

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.whole

    def weighted(self, weights: Tensor) -> Parts:
        found = self.map(lambda part: part.weighted(weights))
        found.weights = weights
        return found

    def _dense(self) -> Tensor:
        return self._placed({place: part.dense() for place, part in self.parts.items()}, 2)

    def prepare(self, names: Iterable[str]) -> None:
        names = [name for name in names if name not in self._known]
        for part in self.pieces:
            part.prepare(names)
        super().prepare(names)

    def closed(self, name: str, swept: bool = False) -> Tensor | None:
        if name == "norms":
            return sum_of(part.norms() for part in self.pieces)
        values = {place: getattr(part, name)() for place, part in self.parts.items()}
        return self._placed(values, int(name == "sample_squares"))

    def _placed(self, values: dict[int, Tensor], axis: int) -> Tensor:
        """Put values ``[..., *p]`` of each part in their places along a new axis."""
        nothing = torch.zeros_like(next(iter(values.values())))
        return torch.stack([values.get(place, nothing) for place in range(self.whole[0])], axis)

    def projected(self, rows: Tensor | None, columns: Tensor | None, sizes: tuple[int, int]) -> Tensor:
        if rows is None or self.is_complex:
            return super().projected(rows, columns, sizes)
        own = rows.unflatten(0, (self.whole[0], -1))
        sizes = own.shape[1], sizes[1]
        return sum_of(part.projected(own[place], columns, sizes) for place, part in self.parts.items())

    def dots(self, other: Individual) -> Tensor:
        if isinstance(other, Explicit):
            return sum_of(part.dots(Explicit(other.value[:, :, place])) for place, part in self.parts.items())
        if not isinstance(other, Parts):
            return super().dots(other)
        terms = [part.dots(other.parts[place]) for place, part in self.parts.items() if place in other.parts]
        return sum(terms, start=self.pieces[0].norms().new_zeros(*self.size, *other.size))

    def sample_dots(self, other: Individual) -> Tensor:
        if not isinstance(other, Parts):
            return super().sample_dots(other)
        terms = [part.sample_dots(other.parts[place]) for place, part in self.parts.items() if place in other.parts]
        return sum(terms, start=self.pieces[0].norms().new_zeros(self.size))


@dataclass(eq=False)
class StackedUse(Use):
    """Each matrix of a stack multiplies its own rows of ``x``: from the end of the matrix before up to its own end.

    ``unfold``, ``fold`` and ``flipped`` are as in ``DenseUse``, for one matrix.
    """

    x: Tensor
    ends: Sequence[int]
    unfold: Callable[..., Tensor]
    fold: Callable[[Tensor], Tensor]
    flipped: bool = False

    def arrive(self, cotangents: Cotangents, rows: Rows, shape: torch.Size, dtype: torch.dtype) -> Individual:
        grad, layout = cotangents[0], rows.layout
        owner = layout.owners(grad.shape[1:], torch.device("cpu")).expand(len(self.x), 1)
        parts: dict[int, Individual] = {}
        for place, (start, end) in enumerate(zip([0, *self.ends], self.ends, strict=False)):
            if end > start:
                use = DenseUse((self.x[start:end],), self.unfold, self.fold, self.flipped)
                own = Rows(found_layout(layout.n, owner[start:end], exactly=True), rows.index)
                given = Cotangents({0: grad[:, start:end]})
                parts[place] = arrive_in_groups(use, given, own, shape[1:], dtype)
        if not parts:
            return Explicit(grad.new_zeros(len(grad), rows.count, *shape, dtype=dtype))
        return Parts(parts, shape)
