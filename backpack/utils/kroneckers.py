"""Arithmetic with Kronecker products ``F_1 kron F_2 kron ...``, given by their factors.

A factor is a matrix, or a vector that stands for a diagonal matrix. Inverses, eigenvalues and determinants are computed
in float64, since factors in float32 are often nearly singular; results have the data type of the factors. Factors that
are inverted or decomposed must be symmetric, complex ones Hermitian. A damped solve with the factors of ``KFAC``::

    inverse = inv_kfacs(p.kfac, shift=pi_damping(p.kfac, damping=1e-3))
    step = apply_kfac_mat_prod(inverse, p.grad.flatten()).reshape(p.shape)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from backpack.uses.complex_numbers import double

Shift = float | Tensor | Sequence[float | Tensor] | None
"""What is added to the diagonals: one number for all factors, or one for each."""


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
    _check(factors)
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
    _check(factors)
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
    _check(factors)
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}.")
    means = torch.stack([torch.real(_diagonal(factor)).double().mean() for factor in factors])
    means = torch.where(means > 0, means, torch.ones_like(means))
    # Relative to its mean, each factor is shifted by the same amount.
    shifts = means * (damping / means.log().sum().exp()) ** (1 / len(factors))
    return [shift.to(factor.real.dtype) for shift, factor in zip(shifts, factors, strict=True)]


class Eigen(NamedTuple):
    """A symmetric or Hermitian matrix in a Kronecker-factored orthonormal basis ``Q = Q_1 kron Q_2 kron ...``.

    It is ``Q diag(eigenvalues.flatten()) Q^H``. ``bases`` has one matrix for each axis of ``eigenvalues``; a basis that
    is a vector of ones stands for the identity.
    """

    bases: list[Tensor]
    eigenvalues: Tensor

    def dense(self) -> Tensor:
        """The matrix."""
        basis = kfacs_to_mat(self.bases)
        return (basis * self.eigenvalues.flatten()) @ basis.mH

    def apply(self, mat: Tensor) -> Tensor:
        """The matrix times ``mat``, ``[D]`` or ``[D, V]``."""
        return self._apply(self.eigenvalues, mat)

    def apply_inverse(self, mat: Tensor, damping: float = 0.0) -> Tensor:
        """The inverse of the matrix, ``damping`` added to its diagonal, times ``mat``, ``[D]`` or ``[D, V]``.

        Any positive ``damping`` will do if no eigenvalue is negative.

        Raises:
            ValueError: The damped matrix is singular, up to rounding.
        """
        damped = self._damped(damping)
        if bool((damped == 0).any()):
            values = self.eigenvalues.double()
            enough = 4 * self._rounding(values) - 1.1 * values.min().clamp(max=0)
            raise ValueError(
                f"The matrix has the eigenvalue zero, up to rounding: add a positive damping to invert it, instead of "
                f"{damping:.3g}; {enough:.2g} is enough."
            )
        return self._apply((1 / damped).to(mat.real.dtype), mat)

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Logarithm of the absolute determinant of the damped matrix; minus infinity if that is singular."""
        return self._damped(damping).abs().log().sum().to(self.eigenvalues.dtype)

    def _damped(self, damping: float) -> Tensor:
        """The damped eigenvalues in float64; those that are zero up to rounding are zero."""
        values = self.eigenvalues.double()
        damped = values + damping
        is_positive = (values >= 0) & (damping > 0)
        return damped.where(is_positive | (damped.abs() > self._rounding(damped)), 0)

    def _rounding(self, values: Tensor) -> Tensor:
        """How large a value must be that is not zero up to rounding."""
        return max(len(basis) for basis in self.bases) * torch.finfo(self.eigenvalues.dtype).eps * values.abs().max()

    def _apply(self, eigenvalues: Tensor, mat: Tensor) -> Tensor:
        values = eigenvalues.reshape(-1, *[1] * (mat.dim() - 1))
        inner = apply_kfac_mat_prod([basis.mH if is_matrix(basis) else basis for basis in self.bases], mat)
        return apply_kfac_mat_prod(self.bases, values * inner)


def eigh_kfacs(factors: Sequence[Tensor]) -> Eigen:
    """Eigendecomposition of ``F_1 kron F_2 kron ...``.

    ``eigh_kfacs(factors).apply_inverse(mat, damping)`` inverts with exactly ``damping`` added to the diagonal of the
    product.
    """
    _check(factors)
    bases, values = [], []
    for factor in factors:
        if is_vector(factor):
            bases.append(torch.ones_like(factor))
            values.append(torch.real(factor).double())
        else:
            own, basis = torch.linalg.eigh(double(factor))
            bases.append(basis.to(factor.dtype))
            values.append(own)
    product = values[0]
    for own in values[1:]:
        product = product.unsqueeze(-1) * own
    return Eigen(bases, product.to(factors[0].real.dtype))


def _check(factors: Sequence[Tensor]) -> None:
    if not factors:
        raise ValueError("There are no factors.")
    for factor in factors:
        if factor.dim() not in (1, 2):
            raise ValueError(f"A factor has two axes, or one for a diagonal; got the shape {list(factor.shape)}.")


def _dense(factor: Tensor) -> Tensor:
    return torch.diag(factor) if is_vector(factor) else factor


def _diagonal(factor: Tensor) -> Tensor:
    return factor if is_vector(factor) else factor.diagonal()


def _shifted(factors: Sequence[Tensor], shift: Shift) -> list[Tensor]:
    """In float64."""
    _check(factors)
    doubles = [double(factor) for factor in factors]
    if shift is None:
        return doubles
    if isinstance(shift, Tensor) and shift.dim() > 0:
        shift = list(shift)
    shifts = list(shift) if isinstance(shift, Sequence) else [shift] * len(factors)
    if len(shifts) != len(factors):
        raise ValueError(
            f"There are {len(shifts)} shifts for {len(factors)} factors: give one shift, or one for each factor."
        )
    return [_shift(factor, own) for factor, own in zip(doubles, shifts, strict=True)]


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


def _ratio(values: Tensor) -> Tensor:
    return values.abs().min() / values.abs().max()


def _check_regular(values: Tensor) -> None:
    if not bool(_ratio(values) > len(values) * torch.finfo(values.dtype).eps):
        raise ValueError(
            f"A factor of shape {[len(values)] * 2} is singular: its eigenvalues have absolute values between "
            f"{values.abs().min().item():.3g} and {values.abs().max().item():.3g}. Give a positive shift."
        )
