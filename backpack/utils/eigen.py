"""Symmetric matrices in a Kronecker-factored orthonormal basis, and their powers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from backpack.uses.complex_numbers import double
from backpack.utils.kronecker_products import apply_kfac_mat_prod, check, is_matrix, is_vector, kfacs_to_mat


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
        inner = apply_kfac_mat_prod([basis.mH if is_matrix(basis) else basis for basis in self.bases], mat)
        return apply_kfac_mat_prod(self.bases, self._weighted(inner))

    def apply_inverse(self, mat: Tensor, damping: float = 0.0) -> Tensor:
        """The inverse of the matrix, ``damping`` added to its diagonal, times ``mat``, ``[D]`` or ``[D, V]``.

        Any positive ``damping`` will do if no eigenvalue is negative.

        Raises:
            ValueError: The damped matrix is singular, up to rounding.
        """
        return self.power(-1, damping).apply(mat)

    def power(self, exponent: float, damping: float = 0.0) -> Eigen:
        """The matrix, ``damping`` added to its diagonal, to any real power: ``-0.5`` gives the inverse symmetric root.

        Raises:
            ValueError: The damped matrix is singular and ``exponent`` is negative, or it has a negative eigenvalue and
                ``exponent`` is no integer.
        """
        damped = self._damped(damping)
        if exponent < 0 and bool((damped == 0).any()):
            values = self.eigenvalues.double()
            enough = 4 * self._rounding(values) - 1.1 * values.min().clamp(max=0)
            raise ValueError(
                f"The matrix has the eigenvalue zero, up to rounding: add a positive damping to invert it, instead of "
                f"{damping:.3g}; {enough:.2g} is enough."
            )
        if exponent != int(exponent) and bool((damped < 0).any()):
            raise ValueError(
                f"The matrix has the negative eigenvalue {damped.min().item():.3g}, so that its power {exponent} is "
                f"not real: add a larger damping."
            )
        return Eigen(self.bases, (damped**exponent).to(self.eigenvalues.dtype))

    def sample(
        self, count: int | None = None, damping: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Samples of the normal distribution with mean zero and the damped matrix's inverse as covariance.

        ``[D]``, or ``[D, count]``. As of the posterior of a Laplace approximation, whose prior's precision is the
        ``damping``: ``p + eigen.sample(damping=precision).reshape(p.shape)``. With complex bases, circular complex
        numbers ``z``, for which ``E[z z^H]`` is the covariance.

        Raises:
            ValueError: The damped matrix is not positive definite.
        """
        root = self.power(-0.5, damping)
        size = [self.eigenvalues.numel()] if count is None else [self.eigenvalues.numel(), count]
        dtype = reduce(torch.promote_types, [basis.dtype for basis in self.bases])
        noise = torch.randn(size, dtype=dtype, device=self.eigenvalues.device, generator=generator)
        return apply_kfac_mat_prod(self.bases, root._weighted(noise))  # in the eigenbasis, noise is noise

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

    def _weighted(self, mat: Tensor) -> Tensor:
        """``mat``, in the eigenbasis, times the eigenvalues."""
        return self.eigenvalues.reshape(-1, *[1] * (mat.dim() - 1)) * mat


def eigh_kfacs(factors: Sequence[Tensor]) -> Eigen:
    """Eigendecomposition of ``F_1 kron F_2 kron ...``.

    ``eigh_kfacs(factors).apply_inverse(mat, damping)`` inverts with exactly ``damping`` added to the diagonal of the
    product.
    """
    check(factors)
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


def exchanges_axes(name: str, factors: Sequence[Tensor] | Eigen, shape: torch.Size, known: bool | None) -> bool:
    """Whether factors refer to a parameter with its first two axes exchanged, as those of transposed convolutions.

    ``known``: whether the parameter is the weight of one, ``None`` if its modules do not tell.

    Raises:
        ValueError: It may be either.
    """
    sides = [len(factor) for factor in (factors.bases if isinstance(factors, Eigen) else factors)]
    if len(sides) < 2 or len(shape) < 3:
        return False
    plain = any(prod(shape[:axis]) == sides[0] for axis in range(1, len(shape)))
    turned = sides[0] == shape[1]
    if turned and plain and known is None:
        raise ValueError(
            f"It is not known whether {name}, of shape {list(shape)}, is the weight of a convolution or of a "
            f"transposed one: let it belong to a torch.nn.Conv or ConvTranspose module, or multiply by its factors "
            f"yourself."
        )
    return turned and (not plain or bool(known))


def applied_to_vectors(product: Callable[[Tensor], Tensor], vectors: Tensor, exchanged: bool) -> Tensor:
    """A product with columns ``[D, V]``, of vectors ``[V, *p]``; ``exchanged``: of their first two axes exchanged."""
    rows = vectors.transpose(1, 2) if exchanged else vectors
    found = product(rows.reshape(len(rows), prod(rows.shape[1:])).T).T.reshape(rows.shape)
    return found.transpose(1, 2) if exchanged else found
