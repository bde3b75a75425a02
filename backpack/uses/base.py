"""Uses of a parameter, and the individual gradients that a use and a cotangent define.

Axes: ``v`` seeds, ``n`` samples, ``s`` positions within a sample, ``o`` outputs, ``i`` inputs, ``*p`` the
parameter's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from backpack.samples import Rows

SCRATCH = 2**20
"""Entries of scratch that a reduction over individual gradients may fill at a time."""


class Individual(ABC):
    """Individual gradients ``[v, n, *p]`` of one parameter, held as factors; what quantities read.

    Each contraction has a generic definition through ``dense``, in bounded chunks. A subclass overrides those
    for which it knows a cheaper way.
    """

    shape: torch.Size
    """Of the parameter."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Number of seeds and of samples, ``(v, n)``."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The individual gradients themselves, ``[v, n, *p]``."""

    @abstractmethod
    def narrow(self, start: int, stop: int) -> Individual:
        """Those of the samples from ``start`` to ``stop``."""

    @abstractmethod
    def scaled(self, factor: Tensor) -> Individual:
        """Sample ``n`` multiplied by ``factor[n]``."""

    def chunks(self) -> Iterator[Individual]:
        """Pieces of a few samples each, whose ``dense`` fits into the scratch."""
        seeds, samples = self.size
        step = max(1, SCRATCH // max(1, seeds * self.shape.numel()))
        for start in range(0, samples, step):
            yield self.narrow(start, min(start + step, samples))

    def total(self) -> Tensor:
        """Sum over seeds and samples, ``[*p]``."""
        return sum_of(chunk.dense().sum((0, 1)) for chunk in self.chunks())

    def sum_squares(self) -> Tensor:
        """Sum of squares over seeds and samples, ``[*p]``."""
        return sum_of(chunk.dense().square().sum((0, 1)) for chunk in self.chunks())

    def moments(self) -> tuple[Tensor, Tensor]:
        """``total()`` and ``sum_squares()``, for less than both."""
        return self.total(), self.sum_squares()

    def sample_squares(self) -> Tensor:
        """Sum of squares over seeds, ``[n, *p]``."""
        return torch.cat([chunk.dense().square().sum(0) for chunk in self.chunks()])

    def norms(self) -> Tensor:
        """Squared Euclidean norms, ``[v, n]``."""
        return torch.cat([chunk.dense().square().flatten(2).sum(2) for chunk in self.chunks()], 1)

    def dots(self, other: Individual) -> Tensor:
        """Dot products with other individual gradients of the same parameter, ``[v, n, w, m]``."""
        rows = []
        for a in self.chunks():
            left = a.dense().flatten(2)
            columns = [torch.einsum("vnp,wmp->vnwm", left, b.dense().flatten(2)) for b in other.chunks()]
            rows.append(torch.cat(columns, 3))
        return torch.cat(rows, 1)

    def sample_dots(self, other: Individual) -> Tensor:
        """Dot products with another's gradients of the same sample and seed, ``[v, n]``."""
        pieces = []
        for a in self.chunks():
            start = sum(p.shape[1] for p in pieces)
            b = other.narrow(start, start + a.size[1])
            pieces.append((a.dense() * b.dense()).flatten(2).sum(2))
        return torch.cat(pieces, 1)


class Use(ABC):
    """One place at which a parameter, or a tensor computed from parameters alone, enters a forward pass."""

    def recorded(self) -> tuple[Tensor, ...]:
        """The tensors of the forward pass that ``bind`` reads."""
        return ()

    def arrive(self, cotangents: dict[int, Tensor], rows: Rows, shape: torch.Size, dtype: torch.dtype) -> Individual:
        """The individual gradients of the samples ``rows``, from the cotangents ``[v, ...]`` of the call's outputs."""
        return self.bind(rows.take(cotangents[0], leading=1).to(dtype), rows, shape)

    @abstractmethod
    def bind(self, grad: Tensor, rows: Rows, shape: torch.Size) -> Individual:
        """The individual gradients of the samples ``rows`` that a cotangent of the output defines.

        Args:
            grad: Cotangent of these samples, ``[v, n, ...]``.
            rows: Brings a recorded tensor to the form ``[n, ...]`` of the same samples.
            shape: Of the parameter.
        """


def sum_of(terms: Iterator[Tensor]) -> Tensor:
    """Sum of one tensor at least, into the first where no gradient is tracked."""
    result = next(terms)
    for term in terms:
        result = result + term if torch.is_grad_enabled() else result.add_(term)
    return result
