"""Parts of a parameter that are used by themselves: the matrices of experts, stacked along the first axis."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from backpack.uses.base import Individual


@dataclass(eq=False)
class Parts(Individual):
    """Individual gradients of a parameter, from those of its entries along the first axis; of others they are zero."""

    parts: dict[int, Individual]
    whole: torch.Size

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.whole

    @property
    def size(self) -> tuple[int, int]:
        return next(iter(self.parts.values())).size

    @property
    def is_complex(self) -> bool:
        return next(iter(self.parts.values())).is_complex

    def narrow(self, start: int, stop: int) -> Parts:
        return self._each(lambda part: part.narrow(start, stop))

    def scaled(self, factor: Tensor) -> Parts:
        return self._each(lambda part: part.scaled(factor))

    def weighted(self, weights: Tensor) -> Parts:
        found = self._each(lambda part: part.weighted(weights))
        found.weights = weights
        return found

    def _part(self, start: int, stop: int) -> Parts:
        found = self._each(lambda part: part._part(start, stop))
        found.weights = None if self.weights is None else self.weights[:, start:stop]
        return found

    def _each(self, function: Callable[[Individual], Individual]) -> Parts:
        return Parts({place: function(part) for place, part in self.parts.items()}, self.whole)

    def _dense(self) -> Tensor:
        return self._placed({place: part.dense() for place, part in self.parts.items()}, 2)

    def prepare(self, names: Iterable[str]) -> None:
        names = [name for name in names if name not in self._known]
        for part in self.parts.values():
            part.prepare(names)
        super().prepare(names)

    def closed(self, name: str, swept: bool = False) -> Tensor | None:
        if name == "norms":
            norms = [part.norms() for part in self.parts.values()]
            return sum(norms[1:], start=norms[0])
        values = {place: getattr(part, name)() for place, part in self.parts.items()}
        return self._placed(values, int(name == "sample_squares"))

    def _placed(self, values: dict[int, Tensor], axis: int) -> Tensor:
        """Values ``[..., *p]`` of each part in their places along an axis of the whole's."""
        first = next(iter(values.values()))
        nothing = torch.zeros_like(first)
        return torch.stack([values.get(place, nothing) for place in range(self.whole[0])], axis)

    def dots(self, other: Individual) -> Tensor:
        if not isinstance(other, Parts):
            return super().dots(other)
        terms = [part.dots(other.parts[place]) for place, part in self.parts.items() if place in other.parts]
        zero = next(iter(self.parts.values())).norms().new_zeros(*self.size, *other.size)
        return sum(terms, start=zero)

    def sample_dots(self, other: Individual) -> Tensor:
        if not isinstance(other, Parts):
            return super().sample_dots(other)
        terms = [part.sample_dots(other.parts[place]) for place, part in self.parts.items() if place in other.parts]
        zero = next(iter(self.parts.values())).norms().new_zeros(self.size)
        return sum(terms, start=zero)
