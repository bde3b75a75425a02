"""Individual gradients that are computed from others: of another use, shape or data type, or of a part."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backpack.uses.base import Individual


class Composed(Individual):
    """Individual gradients that are computed from others, the ``pieces``."""

    pieces: Sequence[Individual]

    @abstractmethod
    def map(self, function: Callable[[Individual], Individual]) -> Composed:
        """The same, with what a function returns for each piece in its place."""

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.pieces[0].shape

    @property
    def device(self) -> torch.device:
        return self.pieces[0].device

    @property
    def size(self) -> tuple[int, int]:
        return self.pieces[0].size

    @property
    def is_complex(self) -> bool:
        return self.pieces[0].is_complex

    def _narrow(self, start: int, stop: int) -> Individual:
        return self.map(lambda piece: piece.narrow(start, stop))

    def scaled(self, factor: Tensor) -> Individual:
        return self.map(lambda piece: piece.scaled(factor))


@dataclass(eq=False)
class RealPart(Composed):
    """Individual gradients of a real parameter that is used as a complex one: the real parts of the complex ones."""

    inner: Individual
    is_complex = False

    @property
    def pieces(self) -> Sequence[Individual]:  # type: ignore[override]
        return [self.inner]

    def map(self, function: Callable[[Individual], Individual]) -> RealPart:
        return RealPart(function(self.inner))

    def _dense(self) -> Tensor:
        return self.inner.dense().real.contiguous()
