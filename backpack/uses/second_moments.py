"""Second moments of inputs and cotangents, and products that are known to be symmetric."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from backpack.memory import empty
from backpack.uses.base import Individual
from backpack.uses.complex_numbers import squared

BLOCKS = 4
"""The number of blocks of columns in which a second moment is computed, each down to the diagonal only."""

LARGE = 3 * 2**15
"""Entries of the rows from which on blocks pay off: with fewer, the copies cost more than the products."""

FEW = 2**14
"""Entries up to which one call for all is faster than one for each row."""


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


def gram_of_outputs(grads: Individual, rows: Tensor) -> Tensor:
    """Dot products ``[v, n, w, m]`` of cotangents ``rows[v, n, o]``, computed once for all uses of them in the call."""
    v, n, size = rows.shape
    flat = rows.flatten(0, 1)
    gram = grads.share((GRAM, size), lambda: second_moment(flat.T))
    return gram.unflatten(1, (v, n)).unflatten(0, (v, n))


def squares_of_outputs(grads: Individual, rows: Tensor) -> Tensor:
    """Squares of cotangents ``rows[v, n, o]``, summed over seeds, computed once for all uses of them in the call."""
    return grads.share((SQUARES, rows.shape[2]), lambda: _sum_of_squares(rows))


def _sum_of_squares(rows: Tensor) -> Tensor:
    """The sum over the first axis; of large rows, one by one, so that what is added up stays in the caches."""
    if len(rows) == 1 or rows.is_complex() or torch.is_grad_enabled() or rows[0].numel() < FEW:
        return squared(rows).sum(0)
    total = rows[0].square()
    for row in rows[1:]:
        total.addcmul_(row, row)
    return total


def in_basis(grads: Individual, rows: Tensor, basis: Tensor) -> Tensor:
    """Cotangents ``rows[v, n, o]`` in an orthonormal basis, computed once for all uses of them in the call."""
    return grads.share((TURNED, basis), lambda: rows @ basis.conj())


MOMENT = "moment of outputs"
SQUARES = "squares of outputs"
GRAM = "dot products of outputs"
TURNED = "outputs in a basis"


def diagonal_blocks(matrix: Tensor, groups: int) -> Tensor:
    """``[g a, g b]`` to ``[g, a, b]``."""
    if groups == 1:
        return matrix
    return matrix.unflatten(1, (groups, -1)).unflatten(0, (groups, -1)).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def matrices_of(grads: Individual, height: int) -> Tensor:
    """Individual gradients as matrices of so many rows, ``[v, n, r, c]``."""
    return grads.dense().reshape(*grads.size, height, -1)
