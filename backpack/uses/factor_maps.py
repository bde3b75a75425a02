"""Individual gradients of matrices that map inputs to outputs, of which there are Kronecker factors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from backpack.memory import empty
from backpack.uses.base import Individual


class LinearMap(Individual):
    """Individual gradients of the matrix of a linear map."""

    matrix: tuple[int, int]
    """Its shape, and the sizes of its two factors."""
    blocks: tuple[int, int] = (1, 1)
    """Of how many diagonal blocks the two factors consist."""
    ranks: tuple[int, int]
    """What those of its two factors are at most."""
    rows: range
    """Those of the matrix that the map uses."""
    inputs_first = False
    """Whether the rows are inputs."""
    diagonal_inputs = False
    """Whether the input factor is diagonal, and of one axis."""

    @abstractmethod
    def output_factor(self, approx: str | None) -> Tensor:
        """Sum over seeds and samples of outer products of cotangents."""

    def output_blocks(self, moment: Tensor) -> Tensor:
        """The output factor, given the second moment ``[c, c]`` of the outputs of all groups together."""
        return moment

    @abstractmethod
    def input_factor(self, approx: str | None, scale: float = 1.0) -> Tensor:
        """Mean over samples of outer products of inputs, times ``scale``; of one axis where it is diagonal."""

    @abstractmethod
    def rotated(self, rows: Tensor, columns: Tensor) -> Individual:
        """Gradients in the bases ``rows`` and ``columns``; a basis of one axis is the identity."""

    def transposed(self) -> LinearMap | None:
        """The map as one of the transposed matrix, or of a stack of them, where it can be seen as such."""
        return None

    def maps(self) -> Sequence[LinearMap]:
        return [self]


BLOCKS = 4
"""Into how many blocks of columns a second moment is divided, of which only those up to the diagonal are computed."""

LARGE = 3 * 2**15
"""Entries of the rows from which on that pays: of fewer, the copies cost more than the products."""


def second_moment(rows: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * sum_r rows[... r a] conj(rows[... r b])``."""
    if rows.dim() > 2:
        return torch.baddbmm(rows.new_zeros(()), rows.transpose(1, 2), rows.conj(), beta=0, alpha=scale)
    if torch.is_grad_enabled():
        return scaled_product(rows.T, rows.conj(), scale)
    return symmetric_product(rows.T, rows.conj(), scale)


def symmetric_product(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * left[a r] right[r b]``, which is known to be symmetric, or Hermitian."""
    size = len(left)
    result = empty((size, size), right)
    number = BLOCKS if size >= 64 * BLOCKS and right.numel() >= LARGE else 1
    if number == 1:
        return torch.addmm(result, left, right, beta=0, alpha=scale, out=result)
    for start, stop in pairwise(size * block // number for block in range(number + 1)):
        upper = result[:stop, start:stop]
        torch.addmm(upper, left[:stop], right[:, start:stop], beta=0, alpha=scale, out=upper)
        result[start:stop, :start] = upper[:start].mH
    return result


def scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``scale * left[a r] right[r b]``."""
    return torch.addmm(left.new_zeros(()), left, right, beta=0, alpha=scale)


def moment_of_outputs(grads: Individual, size: int, rows: Callable[[], Tensor]) -> Tensor:
    """The second moment ``[o, o]`` of cotangents summed over positions, ``rows()[r, o]``, ``o`` being of this size."""
    known = (grads.shared or {}).get((MOMENT, size))
    moment = grads.share((MOMENT, size), lambda: second_moment(rows()))
    if moment is not known:
        return moment
    return moment.clone() if torch.is_grad_enabled() else empty(moment.shape, moment).copy_(moment)


MOMENT = "moment of outputs"


def diagonal_blocks(matrix: Tensor, groups: int) -> Tensor:
    """``[g a, g b]`` to ``[g, a, b]``."""
    if groups == 1:
        return matrix
    return matrix.unflatten(1, (groups, -1)).unflatten(0, (groups, -1)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
