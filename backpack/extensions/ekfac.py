"""Second moments of gradients in the eigenbasis of Kronecker factors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from backpack.extensions.kfac import KFAC
from backpack.extensions.kronecker import KroneckerExtension
from backpack.extensions.merge_batches import Summed
from backpack.modules.parameters import name_of
from backpack.uses import Individual
from backpack.uses.eigenbases import eigenbases, eigenbases_by_name, squares_in_bases
from backpack.uses.kronecker import complete, output_factors
from backpack.utils.kroneckers import Eigen


class EKFAC(KroneckerExtension[Eigen]):
    """The eigenbases of Kronecker factors and the curvature along them, ``ekfac``: a ``utils.kroneckers.Eigen``.

    ``bases`` are the eigenvectors of the factors that ``KFAC(fisher=fisher, approx=approx)`` computes, in their order.
    ``eigenvalues``, with one axis for each, are sums over samples and columns of the squares of their gradients in this
    basis (summed over positions, whatever ``approx`` is): the diagonal that is nearest to the Fisher matrix in
    Frobenius norm, so that it is never farther from it than the product of the factors is (George et al., 2018, section
    3). Of biases and other parameters with one factor, the eigendecomposition of the exact block.

    All columns are pulled back at a time. Over a data set, a first pass computes the factors, and a second one the
    eigenvalues in their bases.
    """

    savefield = "ekfac"
    whole = True
    unmerged = (
        "the bases of its results are those of all batches together, which takes a pass before. Over a data set, "
        "accumulate() does that"
    )

    def __init__(
        self,
        mc_samples: int = 1,
        subsampling: Any = None,
        fisher: str = "mc",
        approx: str | None = None,
        savefield: str | None = None,
    ) -> None:
        super().__init__(savefield, subsampling, None, mc_samples, approx, fisher)

    def entries(self, parameter: Tensor) -> int:
        return super().entries(parameter) + parameter.numel()

    def compute(self, grads: Individual) -> Eigen:
        factors = complete(grads, output_factors(grads, self.approx), self.approx)
        bases = eigenbases(factors, grads)
        return Eigen(bases, squares_in_bases(grads, bases))

    def complete(self, result: Any, grads: Individual) -> Any:
        return result

    def beforehand(self) -> KFAC:
        return KFAC(self.mc_samples, self.subset.given, self.fisher, self.approx, savefield=self.savefield)

    def between(self, found: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        return eigenbases_by_name(found)

    def given(self, found: dict[str, list[Tensor]]) -> SecondMoments:
        moments = SecondMoments(self.mc_samples, self.subset.given, self.fisher, self.approx, self.savefield)
        moments.bases = found
        return moments


class SecondMoments(EKFAC):
    """The eigenvalues of ``EKFAC`` in ``bases`` that are known before, by parameter name."""

    batches = Summed(1)
    bases: dict[str, list[Tensor]]

    def compute(self, grads: Individual) -> Any:
        return squares_in_bases(grads, [basis.to(grads.parameter) for basis in self.bases[name_of(grads.parameter)]])

    def of_whole(self, name: str, merged: Tensor) -> Eigen:  # type: ignore[override]
        return Eigen(self.bases[name], merged)
