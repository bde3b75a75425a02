"""The diagonals of the samples' generalized Gauss-Newton matrices."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from backpack.extensions.curvature import CurvatureExtension
from backpack.extensions.merge_batches import Joined
from backpack.uses import Individual


class BatchDiagGGNExact(CurvatureExtension):
    """Diagonal of each sample's term of the GGN, ``diag_ggn_exact_batch`` of shape ``[N, *p]``.

    Scaled as the loss scales its samples, so that the sum over ``N`` is ``diag_ggn_exact``. With ``subsampling``, of
    shape ``[len(subsampling), *p]`` in the order given.
    """

    savefield = "diag_ggn_exact_batch"
    reads = ("sample_squares",)
    batches = Joined(1)

    def __init__(self, subsampling: Any = None, chunk_size: int | None = None, savefield: str | None = None) -> None:
        super().__init__(savefield, subsampling, chunk_size)

    def compute(self, grads: Individual) -> Tensor:
        return grads.sample_squares()


class BatchDiagGGNMC(BatchDiagGGNExact):
    """Monte-Carlo estimate of each sample's GGN diagonal, ``diag_ggn_mc_batch`` of shape ``[N, *p]``.

    As ``DiagGGNMC``, without the sum over samples.
    """

    savefield = "diag_ggn_mc_batch"
    seeds = "sampled"

    def __init__(
        self, mc_samples: int = 1, subsampling: Any = None, chunk_size: int | None = None, savefield: str | None = None
    ) -> None:
        CurvatureExtension.__init__(self, savefield, subsampling, chunk_size, mc_samples)
