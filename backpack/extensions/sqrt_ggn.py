"""A root of the generalized Gauss-Newton matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from backpack.extensions.curvature import ExactExtension, SampledExtension
from backpack.extensions.merge_batches import Joined
from backpack.uses import Individual


class SqrtGGNExact(ExactExtension[Tensor]):
    """Root of the GGN, ``sqrt_ggn_exact`` of shape ``[C, N, *p]``.

    ``C`` counts the columns of a root of the loss Hessian: classes for cross entropy (times positions), outputs for
    the squared error; if a loss is of several rows of a sample, as a mask selects them, each row has its own. With
    ``V^T`` the results of all parameters as ``[C * N, P]``, the GGN is ``V V^T``, reduction included. Of several
    extended losses in one pass, it has the columns of each, in the order of their calls. With ``subsampling``, ``N`` is
    replaced by the selected samples in the order given.
    """

    savefield = "sqrt_ggn_exact"
    reads = ("dense",)
    batches = Joined(0.5, axis=1)
    seeds = "documented"
    additive = False

    def compute(self, grads: Individual) -> Tensor:
        return grads.dense()

    def merge(self, results: list[Tensor]) -> Tensor:
        return torch.cat(results)


class SqrtGGNMC(SampledExtension[Tensor], SqrtGGNExact):
    """Monte-Carlo estimate of a root of the GGN, ``sqrt_ggn_mc`` of shape ``[mc_samples, N, *p]``.

    Of several extended losses in one pass, each has as many columns. Holds the factor ``1 / sqrt(mc_samples)``, so that
    ``V V^T`` estimates the GGN without a further one.
    """

    savefield = "sqrt_ggn_mc"
