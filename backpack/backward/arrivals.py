"""What has arrived at a parameter: cotangents at its uses, and gradients that were pulled through other nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from backpack.memory import at_a_time
from backpack.nodes import GeneralUse, PlacedUse
from backpack.samples import AnyLayout, Rows, Scattered, Subset
from backpack.uses import Cotangents, DenseUse, Explicit, InChunks, Individual, StackedUse, Use, arrive_in_groups, join


@dataclass(eq=False)
class Arrival:
    """A use, and the cotangents ``[v, ...]`` that reached it; ``turned``: it uses the transposed parameter."""

    use: Use
    cotangents: Cotangents
    layout: AnyLayout
    turned: bool = False

    def __post_init__(self) -> None:
        if self.turned and isinstance(self.use, (DenseUse, StackedUse)):
            self.use.flipped, self.turned = not self.use.flipped, False

    @property
    def runs_node(self) -> bool:
        """Whether the node itself is called, so that its saved tensors must still be there."""
        return isinstance(self.use, (GeneralUse, PlacedUse))

    def individual(self, subset: Subset, shape: torch.Size, dtype: torch.dtype) -> Individual:
        """The individual gradients of the samples in a subset."""
        first = next(iter(self.cotangents.values()))
        rows = Rows(self.layout, subset.rows(self.layout.n, first.device))
        if not shape.numel():  # whose axes cannot be divided
            return Explicit(first.new_zeros(len(first), rows.count, *shape, dtype=dtype))
        if not self.turned:
            return arrive_in_groups(self.use, self.cotangents, rows, shape, dtype)
        return Explicit(self.use.arrive(self.cotangents, rows, shape[::-1], dtype).dense().transpose(-1, -2))


@dataclass(eq=False)
class Contributions:
    """All that reached one parameter, ``tensor``, or an edge into a region that belongs to no sample.

    ``pulled``: individual gradients that are known already, by the key of a subset; ``count``: how many contributions
    have arrived.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    tensor: Any = None
    arrivals: list[Arrival] = field(default_factory=list)
    pulled: dict[Any, list[Individual]] = field(default_factory=dict)
    count: int = 0

    def individual(self, subset: Subset) -> Individual:
        """The individual gradients of the samples in a subset."""
        arrivals, pulled = self.arrivals, self.pulled.get(subset.key, [])
        if len(arrivals) > 1 and not pulled and self.shape.numel() and all(map(_is_of_some, arrivals)):
            found = self._in_chunks(subset)
        else:
            found = join([*(arrival.individual(subset, self.shape, self.dtype) for arrival in arrivals), *pulled])
        found.parameter = self.tensor
        return found

    def _in_chunks(self, subset: Subset) -> Individual:
        """The same of uses by some of the samples each: for a few samples at a time, of those uses that have any."""
        layouts = [arrival.layout.scattered(arrival.cotangents[0].shape[1:]) for arrival in self.arrivals]
        first = self.arrivals[0].cotangents[0]
        rows = subset.rows(layouts[0].n, torch.device("cpu"))
        chosen = torch.arange(layouts[0].n) if rows is None else rows

        def make(start: int, stop: int) -> Individual:
            samples, index = chosen[start:stop].unique(return_inverse=True)
            parts = []
            for arrival, layout in zip(self.arrivals, layouts, strict=True):
                own = layout.of(samples)
                if bool((own.owner >= 0).any()):
                    given = Rows(own, index.to(first.device))
                    parts.append(arrive_in_groups(arrival.use, arrival.cotangents, given, self.shape, self.dtype))
            if not parts:
                return Explicit(first.new_zeros(len(first), stop - start, *self.shape, dtype=self.dtype))
            return join(parts)

        entries = sum(arrival.cotangents[0].numel() for arrival in self.arrivals) // max(1, layouts[0].n)
        step = max(1, at_a_time("cotangents", first.device) // max(1, entries))
        return InChunks(make, self.shape, len(first), 0, len(chosen), step, first.device, self.dtype.is_complex)


def _is_of_some(arrival: Arrival) -> bool:
    """Whether the cotangents that have reached a linear map have rows of some of the samples alone."""
    layout = arrival.layout
    return (
        isinstance(arrival.use, DenseUse)
        and not arrival.turned
        and isinstance(layout, Scattered)
        and layout.of_all is None
        and bool((layout.lengths == 0).any())
    )
