"""Second moments of gradients in the eigenbasis of Kronecker factors."""

from __future__ import annotations

from typing import Any

from backpack.extensions.kronecker import KroneckerExtension
from backpack.uses import Individual
from backpack.uses.kronecker import complete, eigenbases, output_factors, second_moments
from backpack.utils.kroneckers import Eigen


class EKFAC(KroneckerExtension):
    """The eigenbases of Kronecker factors and the curvature along them, ``ekfac``: a ``utils.kroneckers.Eigen``.

    ``bases`` are the eigenvectors of the factors that ``KFAC(fisher=fisher, approx=approx)`` computes, in their order.
    ``eigenvalues``, with one axis for each, are sums over samples and columns of the squares of their gradients in this
    basis (summed over positions, whatever ``approx`` is): the diagonal that is nearest to the Fisher matrix in
    Frobenius norm, so that it is never farther from it than the product of the factors is (George et al., 2018, section
    3). Of biases and other parameters with one factor, the eigendecomposition of the exact block.

    All columns are pulled back at a time.
    """

    savefield = "ekfac"
    whole = True

    def __init__(
        self, mc_samples: int = 1, subsampling: Any = None, fisher: str = "mc", approx: str | None = None
    ) -> None:
        super().__init__(None, subsampling, None, mc_samples, approx, fisher)

    def compute(self, grads: Individual) -> Eigen:
        factors = complete(grads, output_factors(grads, self.approx), self.approx)
        bases = eigenbases(grads, factors)
        return Eigen(bases, second_moments(grads, bases))

    def complete(self, result: Any, grads: Individual) -> Any:
        return result
