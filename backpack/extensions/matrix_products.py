"""Products with blocks of curvature matrices, stored as functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from backpack.extensions.curvature import CurvatureExtension

Product = Callable[[Tensor], Tensor]


class Blocks(Protocol):
    """The curvature matrices of one backward pass, each parameter's block for itself."""

    def hessian(self, parameter: Tensor) -> Product:
        """That of the loss."""

    def ggn(self, parameter: Tensor) -> Product:
        """The generalized Gauss-Newton matrix."""

    def positive(self, parameter: Tensor, modify: Product) -> Product:
        """The positive-curvature Hessian, with modified eigenvalues."""


class MatrixProduct(CurvatureExtension[Product]):
    """A function that multiplies vectors of a parameter's shape ``p``, or several ``[V, *p]``, with a matrix.

    The function can be used after the backward pass, also when parameters have been updated since: the matrix stays the
    one at the weights of the pass. For that, the backward pass keeps the graph of the forward pass, as
    ``backward(retain_graph=True)`` does, and one copy of each parameter that the graph saved. Of a model with fused
    attention or recurrent layers, compiled parts or autocast, the graph is that of a second forward pass.

    This memory is freed when the functions of all parameters are deleted (``memory_cleanup(model)``) or replaced by
    those of the next backward pass, or with the model. Variables that hold the loss or an output keep it as well.

    Raises:
        RuntimeError: The model has to be run again, and that gives another output.
    """

    backprop = "products"
    semidefinite = False
    unmerged = (
        "its results are functions, each of which holds the graph of its batch. A product with the matrix of a data "
        "set is the weighted sum of its batches' products: add these up batch by batch, as docs/scale_formulas.md shows"
    )

    def __init__(self, savefield: str | None = None, subsampling: Any = None) -> None:
        super().__init__(savefield, subsampling)

    def product(self, curvature: Blocks, parameter: Tensor) -> Product:
        """The function for one parameter."""
        raise NotImplementedError


class HMP(MatrixProduct):
    """Products with the Hessian of the loss, reduction included, as a function ``hmp`` of each parameter's block.

    By differentiating twice (Pearlmutter, 1994): exact for all that PyTorch can differentiate twice.
    """

    savefield = "hmp"

    def product(self, curvature: Blocks, parameter: Tensor) -> Product:
        return curvature.hessian(parameter)


class GGNMP(MatrixProduct):
    """Products with the generalized Gauss-Newton matrix, as a function ``ggnmp`` of each parameter's block.

    ``J^T H J v`` (Schraudolph, 2002, section 3), with the model's Jacobian and the Hessian of the loss.
    """

    savefield = "ggnmp"

    def product(self, curvature: Blocks, parameter: Tensor) -> Product:
        return curvature.ggn(parameter)


class PCHMP(MatrixProduct):
    """Products with the positive-curvature Hessian, as a function ``pchmp`` of each parameter's block.

    The Hessian is the sum of the GGN and of ``J^T R J`` for each function of the graph, ``R`` its second derivatives
    weighed by the gradient that arrives (for elementwise functions a diagonal matrix). Here negative eigenvalues of
    ``R`` are set to zero (``modify="clip"``) or replaced by their absolute values (``"abs"``); all functions are taken
    as functions of the data alone (Dangel, Harmeling & Hennig, 2020, section 3).

    Raises:
        ValueError: ``modify`` is something else, or the loss is not convex in its input.
        RuntimeError: Too many entries interact in a function for ``R`` to be diagonalized.
    """

    savefield = "pchmp"
    semidefinite = True

    def __init__(self, savefield: str | None = None, modify: str = "clip", subsampling: Any = None) -> None:
        super().__init__(savefield, subsampling)
        if modify not in MODIFICATIONS:
            raise ValueError(f"modify must be one of {' and '.join(map(repr, MODIFICATIONS))}, got {modify!r}.")
        self.modify = modify

    def product(self, curvature: Blocks, parameter: Tensor) -> Product:
        return curvature.positive(parameter, MODIFICATIONS[self.modify])


def _clip(eigenvalues: Tensor) -> Tensor:
    return eigenvalues.clamp(min=0)


MODIFICATIONS: dict[str, Product] = {"clip": _clip, "abs": torch.abs}
