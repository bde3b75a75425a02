"""Damped Gauss-Newton steps, solved for in the space of samples."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from backpack.extensions.curvature import CurvatureExtension
from backpack.uses import Individual


class GaussNewtonStep(CurvatureExtension[Tensor]):
    """Damped Gauss-Newton step ``-(G + damping I)^-1 g`` of all parameters, ``gauss_newton_step`` of shape ``p``.

    ``p.add_(p.gauss_newton_step)`` takes it. ``g`` is the gradient of the loss and ``G`` its whole generalized
    Gauss-Newton matrix, not its blocks, reduction included. For the usual losses ``G`` is the Fisher matrix, and this
    is a natural gradient step (Amari, 1998; Martens, 2020, section 9).

    Exact, by a linear system with as many equations as the root ``V`` of ``G`` has columns: with ``g = V r``, it is
    ``-V (V^T V + damping I)^-1 r``, one more pull-back (Ren & Goldfarb, 2019, section 3). That is the case for the
    squared error and cross entropy. What is left of the gradient in the loss's input, where its Hessian is singular,
    is solved for by the identity of Woodbury, where errors of rounding are divided by ``damping``. The system,
    ``[C * N, C * N]`` as the result of ``GGNGram``, is kept and solved in ``float64``.

    With ``subsampling``, ``g`` and ``G`` are of the selected samples. Extensions in one block that differ in
    ``damping`` and ``savefield`` share the pull-back of ``V``. On several processes, the step is that of the process's
    own batch.

    Raises:
        ValueError: ``damping`` is not positive, or the loss is not convex in its input.
        RuntimeError: The extension has rules of users, or the pass creates a graph.
    """

    savefield = "gauss_newton_step"
    backprop = "step"
    whole = True
    unmerged = (
        "a step is pulled back through the graph of its batch. Over a data set, accumulate() KFAC or EKFAC and take "
        "the step that these give"
    )

    def __init__(self, damping: float, subsampling: Any = None, savefield: str | None = None) -> None:
        super().__init__(savefield, subsampling)
        if not damping > 0:
            raise ValueError(f"damping must be positive, got {damping}.")
        self.damping = damping

    def compute(self, grads: Individual) -> Tensor:
        """The step of no sample, which is zero; those of samples are not computed parameter by parameter."""
        return grads.total()
