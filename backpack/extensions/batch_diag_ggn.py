"""The diagonals of the samples' generalized Gauss-Newton matrices."""

from __future__ import annotations

from torch import Tensor

from backpack.extensions.curvature import ExactExtension, SampledExtension
from backpack.extensions.merge_batches import Joined
from backpack.uses import Individual


class BatchDiagGGNExact(ExactExtension[Tensor]):
    """Diagonal of each sample's term of the GGN, ``diag_ggn_exact_batch`` of shape ``[N, *p]``.

    Scaled as the loss scales its samples, so that the sum over ``N`` is ``diag_ggn_exact``. With ``subsampling``, of
    shape ``[len(subsampling), *p]`` in the order given.
    """

    savefield = "diag_ggn_exact_batch"
    reads = ("sample_squares",)
    batches = Joined(1)

    def compute(self, grads: Individual) -> Tensor:
        return grads.sample_squares()


class BatchDiagGGNMC(SampledExtension[Tensor], BatchDiagGGNExact):
    """Monte-Carlo estimate of each sample's GGN diagonal, ``diag_ggn_mc_batch`` of shape ``[N, *p]``.

    As ``DiagGGNMC``, without the sum over samples.
    """

    savefield = "diag_ggn_mc_batch"
