"""Products with Kronecker products ``F_1 kron F_2 kron ...``, given by their factors.

A factor is a matrix, or a vector that stands for a diagonal matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor


def is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor has two axes."""
    return tensor.dim() == 2


def is_vector(tensor: Tensor) -> bool:
    """Whether a tensor has one axis."""
    return tensor.dim() == 1


def two_kfacs_to_mat(A: Tensor, B: Tensor) -> Tensor:
    """``A kron B``, dense."""
    return torch.kron(_dense(A).contiguous(), _dense(B).contiguous())  # it fails for some strides


def kfacs_to_mat(factors: Sequence[Tensor]) -> Tensor:
    """``F_1 kron F_2 kron ...``, dense."""
    check(factors)
    result = _dense(factors[0])
    for factor in factors[1:]:
        result = two_kfacs_to_mat(result, factor)
    return result


def apply_kfac_mat_prod(factors: Sequence[Tensor], mat: Tensor) -> Tensor:
    """``(F_1 kron F_2 kron ...) mat``, without forming the product of the factors.

    ``mat`` is ``[D]`` or ``[D, V]``, with ``D`` the product of the factors' numbers of columns.

    Raises:
        ValueError: ``mat`` has another shape.
    """
    check(factors)
    sizes = [factor.shape[-1] for factor in factors]
    if mat.dim() not in (1, 2) or len(mat) != prod(sizes):
        raise ValueError(
            f"Factors with {' * '.join(map(str, sizes))} columns multiply [{prod(sizes)}] or [{prod(sizes)}, V], "
            f"not {list(mat.shape)}."
        )
    result = mat.reshape(*sizes, -1)
    for axis, factor in enumerate(factors):
        if is_vector(factor):
            result = result * factor.reshape(-1, *[1] * (len(sizes) - axis))
        else:
            result = torch.tensordot(factor, result, ([1], [axis])).movedim(0, axis)
    return result.reshape(-1, *mat.shape[1:])


def kfac_mat_prod(factors: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """The function ``mat -> (F_1 kron F_2 kron ...) mat``; see ``apply_kfac_mat_prod``."""
    return lambda mat: apply_kfac_mat_prod(factors, mat)


def check(factors: Sequence[Tensor]) -> None:
    """Raise where these are no factors.

    Raises:
        ValueError: There are none, or one has another number of axes.
    """
    if not factors:
        raise ValueError("There are no factors.")
    for factor in factors:
        if factor.dim() not in (1, 2):
            raise ValueError(f"A factor has two axes, or one for a diagonal; got the shape {list(factor.shape)}.")


def _dense(factor: Tensor) -> Tensor:
    return torch.diag(factor) if is_vector(factor) else factor
