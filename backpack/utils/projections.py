"""Random projections that are the same in all processes and on all machines.

A projection of a parameter's gradient, seen as a matrix ``G``, is ``R^T G C`` with random matrices ``R[r a]`` and
``C[c b]``. Their entries are independent, with mean zero, variance ``1/a`` and ``1/b``, and a fourth moment of at most
three times the squared variance. So squared norms and dot products are right on average, and the variance of a squared
norm, relative to its square, is at most ``(1 + 2/a) (1 + 2/b) - 1``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt, prod, sqrt

import torch
from torch import Generator, Tensor

ONE_SIDED = 2**22
"""Entries of a random matrix up to which a gradient with one axis is projected as one row."""


def _rademacher(shape: tuple[int, int], generator: Generator) -> Tensor:
    return torch.randint(2, shape, generator=generator).double() * 2 - 1


def _gaussian(shape: tuple[int, int], generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _sparse(shape: tuple[int, int], generator: Generator) -> Tensor:
    drawn = torch.randint(6, shape, generator=generator)
    return ((drawn == 0).double() - (drawn == 1).double()) * sqrt(3)


KINDS: dict[str, Callable[[tuple[int, int], Generator], Tensor]] = {
    "rademacher": _rademacher,
    "gaussian": _gaussian,
    "sparse": _sparse,
}
"""How entries of mean 0 and variance 1 are drawn."""


def generator_of(*key: object) -> Generator:
    """A generator of random numbers that depends on nothing but the key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class Projection:
    """A random projection of a parameter's gradients, as matrices of these ``sizes``, from both sides.

    ``rows`` and ``columns``: the matrices ``R`` and ``C``, ``None`` for the identity; ``places`` and ``signs``: where
    the projection is put, and how it is multiplied, if those of several parameters are added.
    """

    sizes: tuple[int, int]
    rows: Tensor | None
    columns: Tensor | None
    places: Tensor
    signs: Tensor

    @classmethod
    def draw(cls, shape: torch.Size, dim: int, kind: str, generator: Generator) -> Projection:
        """A projection of a parameter of this shape to at most ``dim`` numbers."""
        sizes = _matrix_sizes(shape, dim)
        projected = _projected_sizes(sizes, dim)
        rows, columns = (
            None if size == own else KINDS[kind]((size, own), generator) / sqrt(own)
            for size, own in zip(sizes, projected, strict=True)
        )
        places = torch.randperm(dim, generator=generator)[: prod(projected)]
        return cls(sizes, rows, columns, places, _rademacher((1, prod(projected)), generator)[0])

    def to(self, like: Tensor) -> Projection:
        """The same on the device and in the data type of another tensor."""
        rows, columns = (side if side is None else side.to(like) for side in (self.rows, self.columns))
        return Projection(self.sizes, rows, columns, self.places.to(like.device), self.signs.to(like))

    def spread(self, projected: Tensor, dim: int) -> Tensor:
        """Projections ``[N, k]`` at their places among ``dim`` entries, with their signs."""
        return projected.new_zeros(len(projected), dim).index_copy_(1, self.places, projected * self.signs)


def _matrix_sizes(shape: torch.Size, dim: int) -> tuple[int, int]:
    """The sizes of a parameter as a matrix: that of kernels ``[out, in, *kernel]``, or the one with shortest sides.

    A long vector is divided into rows, where its projection to ``dim`` numbers would need too large a matrix.
    """
    size = shape.numel()
    if len(shape) > 3 and shape[0] > 1:
        height = shape[0]
    else:
        height = min(
            (prod(shape[:axis]) for axis in range(1, len(shape))),
            key=lambda rows: rows + size // max(1, rows),
            default=1,
        )
    if height == 1 and size * dim > ONE_SIDED:
        height = next(rows for rows in range(isqrt(size), 0, -1) if size % rows == 0)
    return (height, size // height) if size else (1, 0)


def _projected_sizes(sizes: tuple[int, int], dim: int) -> tuple[int, int]:
    """The sizes ``(a, b)`` of a projected matrix, with at most ``dim`` entries: no side grows, and both are alike."""
    rows, columns = sizes
    a = min(rows, isqrt(dim))
    b = min(columns, dim // a)
    return min(rows, dim // max(1, b)), b
