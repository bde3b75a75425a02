"""Arithmetic with Kronecker products ``F_1 kron F_2 kron ...``, given by their factors.

A factor is a matrix, or a vector that stands for a diagonal matrix. Inverses, eigenvalues and determinants are computed
in float64, since factors in float32 are often nearly singular; results have the data type of the factors. Factors that
are inverted or decomposed must be symmetric, complex ones Hermitian. A damped solve with the factors of ``KFAC``::

    inverse = inv_kfacs(p.kfac, shift=pi_damping(p.kfac, damping=1e-3))
    step = apply_kfac_mat_prod(inverse, p.grad.flatten()).reshape(p.shape)

Products are in ``kronecker_products``, eigendecompositions in ``eigen``; all names are importable from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod, sqrt

import torch
from torch import Tensor

from backpack.uses.complex_numbers import double
from backpack.utils.eigen import Eigen, eigh_kfacs
from backpack.utils.kronecker_products import (
    apply_kfac_mat_prod,
    check,
    is_matrix,
    is_vector,
    kfac_mat_prod,
    kfacs_to_mat,
    two_kfacs_to_mat,
)

__all__ = [
    "Eigen",
    "apply_inv_kfac_mat_prod",
    "apply_kfac_mat_prod",
    "eigh_kfacs",
    "inv_kfac_mat_prod",
    "inv_kfacs",
    "inv_sqrt_kfacs",
    "is_matrix",
    "is_vector",
    "kfac_logdet",
    "kfac_mat_prod",
    "kfacs_to_mat",
    "pi_damping",
    "two_kfacs_to_mat",
]

Shift = float | Tensor | Sequence[float | Tensor] | None
"""What is added to the diagonals: one number for all factors, or one for each."""


def inv_kfacs(factors: Sequence[Tensor], shift: Shift = None) -> list[Tensor]:
    """``[(F_1 + shift_1 I)^-1, (F_2 + shift_2 I)^-1, ...]``, the factors of the inverse.

    For the factored damping of a Kronecker product, give ``shift=pi_damping(factors, damping)``.

    Raises:
        ValueError: A shifted factor is singular, or the number of shifts is not that of the factors.
    """
    return [_inverse(own).to(factor.dtype) for own, factor in zip(_shifted(factors, shift), factors, strict=True)]


def apply_inv_kfac_mat_prod(factors: Sequence[Tensor], mat: Tensor, shift: Shift = None) -> Tensor:
    """``((F_1 + shift_1 I) kron (F_2 + shift_2 I) kron ...)^-1 mat``; ``mat`` as in ``apply_kfac_mat_prod``."""
    return apply_kfac_mat_prod(inv_kfacs(factors, shift), mat)


def inv_kfac_mat_prod(factors: Sequence[Tensor], shift: Shift = None) -> Callable[[Tensor], Tensor]:
    """The function ``mat -> apply_inv_kfac_mat_prod(factors, mat, shift)``; inverses are computed once."""
    return kfac_mat_prod(inv_kfacs(factors, shift))


def inv_sqrt_kfacs(factors: Sequence[Tensor], shift: Shift = None) -> list[Tensor]:
    """``[(F_1 + shift_1 I)^-1/2, (F_2 + shift_2 I)^-1/2, ...]``, the symmetric roots of what ``inv_kfacs`` gives.

    Times a vector of independent standard normal numbers, they give a sample of the normal distribution whose
    covariance is the inverse of the product of the shifted factors::

        root = inv_sqrt_kfacs(p.kfac, shift=pi_damping(p.kfac, damping=1e-3))
        sample = apply_kfac_mat_prod(root, torch.randn_like(p).flatten()).reshape(p.shape)

    With the same damping on the whole diagonal of the product: ``eigh_kfacs(p.kfac).sample(damping=1e-3)``.

    Raises:
        ValueError: A shifted factor is singular or has a negative eigenvalue, or the number of shifts is not that of
            the factors. One that is not shifted is singular if it is so up to rounding in its own precision.
    """
    return [_inverse_root(factor, own) for factor, own in zip(factors, _shifts(factors, shift), strict=True)]


def kfac_logdet(factors: Sequence[Tensor], shift: Shift = None) -> Tensor:
    """Logarithm of the absolute determinant of ``(F_1 + shift_1 I) kron (F_2 + shift_2 I) kron ...``."""
    shifted = _shifted(factors, shift)
    size = prod(map(len, shifted))
    terms = []
    for own in shifted:
        logdet = own.abs().log().sum() if is_vector(own) else torch.linalg.slogdet(own).logabsdet
        terms.append(logdet * (size // len(own)))
    return torch.stack(terms).sum().to(factors[0].real.dtype)


def pi_damping(factors: Sequence[Tensor], damping: float) -> list[Tensor]:
    """Shifts of the factors that approximate ``damping`` on the diagonal of their product.

    ``sqrt(damping)`` on each of two factors, divided between them in the ratio of their mean eigenvalues' roots
    (Martens & Grosse, 2015, section 6.3); likewise with more factors.

    Raises:
        ValueError: ``damping`` is not positive.
    """
    check(factors)
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}.")
    means = torch.stack([torch.real(_diagonal(factor)).double().mean() for factor in factors])
    means = torch.where(means > 0, means, torch.ones_like(means))
    # Relative to its mean, each factor is shifted by the same amount.
    shifts = means * (damping / means.log().sum().exp()) ** (1 / len(factors))
    return [shift.to(factor.real.dtype) for shift, factor in zip(shifts, factors, strict=True)]


def _diagonal(factor: Tensor) -> Tensor:
    return factor if is_vector(factor) else factor.diagonal()


def _shifts(factors: Sequence[Tensor], shift: Shift) -> Sequence[float | Tensor]:
    """One for each factor."""
    check(factors)
    if isinstance(shift, Tensor) and shift.dim() > 0:
        shift = list(shift)
    shifts = list(shift) if isinstance(shift, Sequence) else [0.0 if shift is None else shift] * len(factors)
    if len(shifts) != len(factors):
        raise ValueError(
            f"There are {len(shifts)} shifts for {len(factors)} factors: give one shift, or one for each factor."
        )
    return shifts


def _shifted(factors: Sequence[Tensor], shift: Shift) -> list[Tensor]:
    """In float64."""
    return [_shift(double(factor), own) for factor, own in zip(factors, _shifts(factors, shift), strict=True)]


def _shift(factor: Tensor, shift: float | Tensor) -> Tensor:
    if is_vector(factor):
        return factor + shift
    return factor + shift * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)


def _inverse(factor: Tensor) -> Tensor:
    """The inverse, by a Cholesky decomposition if there is one."""
    if is_vector(factor):
        _check_regular(factor)
        return 1 / factor
    root, info = torch.linalg.cholesky_ex(factor)
    if not bool(info) and bool(_ratio(root.diagonal()) > sqrt(len(factor) * torch.finfo(factor.dtype).eps)):
        return torch.cholesky_inverse(root)
    values, basis = torch.linalg.eigh(factor)
    _check_regular(values)
    return (basis / values) @ basis.mH


def _inverse_root(factor: Tensor, shift: float | Tensor) -> Tensor:
    """The symmetric root of the inverse of a shifted factor."""
    shifted = _shift(double(factor), shift)
    values, basis = (torch.real(shifted), None) if is_vector(shifted) else torch.linalg.eigh(shifted)
    smallest, largest = values.min().item(), values.abs().max().item()
    # What a factor has got of rounding is not known any better than in its own precision; a shift is.
    rounding = len(values) * torch.finfo(values.dtype if shift else factor.dtype).eps
    if smallest < -rounding * largest:
        raise ValueError(
            f"A factor of shape {[len(values)] * 2} has the negative eigenvalue {smallest:.3g}: its inverse has no "
            f"real root. Give a larger shift."
        )
    _check_regular(values, rounding)
    root = values**-0.5 if basis is None else (basis * values**-0.5) @ basis.mH
    return root.to(factor.dtype)


def _ratio(values: Tensor) -> Tensor:
    return values.abs().min() / values.abs().max()


def _check_regular(values: Tensor, rounding: float | None = None) -> None:
    if not bool(_ratio(values) > (rounding or len(values) * torch.finfo(values.dtype).eps)):
        raise ValueError(
            f"A factor of shape {[len(values)] * 2} is singular: its eigenvalues have absolute values between "
            f"{values.abs().min().item():.3g} and {values.abs().max().item():.3g}. Give a positive shift."
        )
