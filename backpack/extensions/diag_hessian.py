"""The diagonal of the Hessian."""

from __future__ import annotations

from torch import Tensor

from backpack.extensions.curvature import ExactExtension, SampledExtension
from backpack.extensions.merge_batches import Joined, Merging, Summed
from backpack.uses import Individual


class DiagHessian(ExactExtension[Tensor]):
    """Diagonal of the Hessian of the loss, ``diag_h`` of shape ``p``, reduction included.

    The GGN diagonal and, for each function of the graph that is not piecewise linear, the diagonal of its residual
    (Dangel, Harmeling & Hennig, 2020, section 3). An elementwise function of ``d`` entries a sample costs ``d``
    backward passes from there on; piecewise linear networks cost what ``DiagGGNExact`` costs. The loss need not be
    convex in its input. Of models with fused attention or recurrent layers the graph is that of a second forward pass
    with functions that can be differentiated twice: without a warning, as nothing is approximated and there is nothing
    to do about it. Of a model under autocast, it is that of one in the parameters' data type.

    Before it starts, the cost is estimated from the graph, with a warning above a hundred steps of training.

    With ``backward(create_graph=True)`` the result can be differentiated, at the price of a derivative of second order
    for each of its entries (of two for ``BatchDiagHessian``): the roots of the residuals have no derivatives where
    entries cross zero or eigenvalues meet.

    Raises:
        RuntimeError: A function has no second derivative in PyTorch, or with ``create_graph=True`` a wrong third one.
            Or a parameter is complex: each entry has a block of 2 x 2 second derivatives.
    """

    savefield = "diag_h"
    reads = ("sum_squares",)
    batches: Merging | Joined = Summed(1)
    backprop = "hessian"
    semidefinite = False
    needs_real_parameters = True

    def compute(self, grads: Individual) -> Tensor:
        return grads.sum_squares()


class DiagHessianMC(SampledExtension[Tensor], DiagHessian):
    """Monte-Carlo estimate of the Hessian's diagonal, ``diag_h_mc`` of shape ``p``.

    For the GGN as ``DiagGGNMC``; each residual ``R`` is replaced by the mean over ``mc_samples`` of ``r (R r)^T`` with
    random signs ``r`` (Hutchinson, 1989), drawn at the inputs of all functions at a time. Costs three backward passes a
    sample. What a parameter adds that enters not linearly is taken exactly. With ``backward(create_graph=True)``, the
    mean of ``r * H r`` with random signs at the parameters, one of them at a time.

    Raises:
        ValueError: The loss is not convex in its input.
        RuntimeError: As for ``DiagHessian``.
    """

    savefield = "diag_h_mc"
    semidefinite = True
