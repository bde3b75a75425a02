"""What has arrived at a parameter: cotangents at its uses, and gradients that were pulled through other nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from backpack.nodes import GeneralUse, PlacedUse
from backpack.samples import AnyLayout, Rows, Subset
from backpack.uses import Cotangents, DenseUse, Explicit, Individual, StackedUse, Use, arrive_in_groups, join


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
        parts = [arrival.individual(subset, self.shape, self.dtype) for arrival in self.arrivals]
        found = join([*parts, *self.pulled.get(subset.key, ())])
        found.parameter = self.tensor
        return found
