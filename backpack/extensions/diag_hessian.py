"""The diagonal of the Hessian."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from backpack.extensions.curvature import CurvatureExtension
from backpack.extensions.merging import Joined, Merging, Summed
from backpack.uses import Individual


class DiagHessian(CurvatureExtension):
    """Diagonal of the Hessian of the loss, ``diag_h`` of shape ``p``, reduction included.

    The GGN diagonal and, for each function of the graph that is not piecewise linear, the diagonal of its residual
    (Dangel, Harmeling & Hennig, 2020, section 3). An elementwise function of ``d`` entries a sample costs ``d``
    backward passes from there on; piecewise linear networks cost what ``DiagGGNExact`` costs. The loss need not be
    convex in its input.

    Raises:
        RuntimeError: A function has no second derivative in PyTorch, or ``create_graph=True`` was asked for.
    """

    savefield = "diag_h"
    reads = ("sum_squares",)
    batches: Merging | Joined = Summed(1)
    backprop = "hessian"
    semidefinite = False

    def __init__(self, subsampling: Any = None, chunk_size: int | None = None) -> None:
        super().__init__(subsampling=subsampling, chunk_size=chunk_size)

    def compute(self, grads: Individual) -> Tensor:
        return grads.sum_squares()
