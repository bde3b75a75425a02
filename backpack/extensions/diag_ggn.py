"""The diagonal of the generalized Gauss-Newton matrix."""

from __future__ import annotations

from torch import Tensor

from backpack.extensions.curvature import ExactExtension, SampledExtension
from backpack.extensions.merge_batches import Summed
from backpack.uses import Individual


class DiagGGNExact(ExactExtension[Tensor]):
    """Diagonal of the generalized Gauss-Newton matrix of the loss, ``diag_ggn_exact`` of shape ``p``.

    ``sum_n J_n^T H_n J_n``, with ``J_n`` the Jacobian of the model's output and ``H_n`` the Hessian of the loss with
    respect to it, reduction included (Schraudolph, 2002, section 3).
    """

    savefield = "diag_ggn_exact"
    reads = ("sum_squares",)
    batches = Summed(1)

    def compute(self, grads: Individual) -> Tensor:
        return grads.sum_squares()


class DiagGGNMC(SampledExtension[Tensor], DiagGGNExact):
    """Monte-Carlo estimate of the GGN diagonal, ``diag_ggn_mc`` of shape ``p``.

    The loss Hessian is replaced by the mean over ``mc_samples`` of outer products of gradients at labels drawn from
    the model's predictive distribution, whose expectation it is (Martens & Grosse, 2015, section 2.2).
    """

    savefield = "diag_ggn_mc"
