"""Second moments of inputs and cotangents, and products that are known to be symmetric."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from backpack.memory import empty
from backpack.uses.base import Individual

BLOCKS = 4
"""The number of blocks of columns in which a second moment is computed, each down to the diagonal only."""

LARGE = 3 * 2**15
"""Entries of the rows from which on blocks pay off: with fewer, the copies cost more than the products."""


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


MOMENT = "moment of outputs"
GRAM = "dot products of outputs"


def diagonal_blocks(matrix: Tensor, groups: int) -> Tensor:
    """``[g a, g b]`` to ``[g, a, b]``."""
    if groups == 1:
        return matrix
    return matrix.unflatten(1, (groups, -1)).unflatten(0, (groups, -1)).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def matrices_of(grads: Individual, height: int) -> Tensor:
    """Individual gradients as matrices of so many rows, ``[v, n, r, c]``."""
    return grads.dense().reshape(*grads.size, height, -1)
