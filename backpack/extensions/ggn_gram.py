"""The Gram matrix of the generalized Gauss-Newton matrix's root."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from backpack.extensions.curvature import CurvatureExtension
from backpack.extensions.merge_batches import BatchShare
from backpack.extensions.sqrt_ggn import SqrtGGNExact
from backpack.uses import Individual
from backpack.uses.complex_numbers import as_real


class GGNGram(CurvatureExtension[Tensor]):
    """Gram matrix ``V^T V`` of the GGN's root ``V``, ``ggn_gram`` of shape ``[C * N, C * N]``, per parameter.

    Of the columns of ``SqrtGGNExact``, flattened in their order, without storing them; of complex ones, of their real
    and imaginary parts. The sum over parameters
    (``total``) has the nonzero eigenvalues of the GGN (Dangel, Tatzel & Hennig, 2022, section 3). Over a data set, the
    columns of all samples are kept until the end.
    """

    savefield = "ggn_gram"
    seeds = "documented"
    whole = True

    def __init__(self, subsampling: Any = None, savefield: str | None = None) -> None:
        super().__init__(savefield, subsampling=subsampling)

    def compute(self, grads: Individual) -> Tensor:
        return grads.dots(grads).flatten(2, 3).flatten(0, 1)

    def on_batch(self, share: BatchShare) -> SqrtGGNExact:
        return SqrtGGNExact(share.rows, savefield=self.savefield)

    def of_whole(self, name: str, merged: Tensor) -> Tensor:
        columns, samples = merged.shape[:2]
        flat = as_real(merged.movedim(1, 0).flatten(0, 1).flatten(1))  # in the order in which they are stored: no copy
        gram = (flat @ flat.T).unflatten(0, (samples, columns)).unflatten(2, (samples, columns))
        return gram.permute(1, 0, 3, 2).reshape(columns * samples, -1)

    @staticmethod
    def total(parameters: Iterable[Tensor], savefield: str = "ggn_gram") -> Tensor:
        """The Gram matrix over all these parameters that have one as ``savefield``, ``[C * N, C * N]``.

        Raises:
            ValueError: None of them has one.
        """
        grams = [vars(parameter)[savefield] for parameter in parameters if savefield in vars(parameter)]
        if not grams:
            raise ValueError(f"No parameter has .{savefield}: run backward() inside backpack(GGNGram()) first.")
        return sum(grams[1:], start=grams[0])
