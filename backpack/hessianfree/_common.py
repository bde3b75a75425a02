"""What the products have in common: lists of tensors, and pull-backs with errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from backpack.curvature.residuals.nodes import has_wrong_second
from backpack.graph import read

Tensors = Tensor | Iterable[Tensor]


def listed(tensors: Tensors) -> list[Tensor]:
    """The tensors as a list, also if it is a single one."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def matching(vectors: Tensors, tensors: Sequence[Tensor], what: str) -> list[Tensor]:
    """The vectors as a list, one for each tensor and of its shape; ``what`` names the tensors in the error.

    Raises:
        ValueError: Their number or a shape differs.
    """
    found = listed(vectors)
    if [v.shape for v in found] != [t.shape for t in tensors]:
        raise ValueError(
            f"The vector must have one tensor for each of {what}, of shapes {[list(t.shape) for t in tensors]}; got "
            f"{[list(v.shape) for v in found]}."
        )
    return found


def pulled_back(
    ys: Sequence[Tensor], xs: Sequence[Tensor], ws: Sequence[Tensor], create_graph: bool, retain_graph: bool = True
) -> list[Tensor]:
    """``J^T w`` by autograd, with zeros for those ``xs`` that ``ys`` does not depend on.

    Raises:
        RuntimeError: PyTorch does not have a second derivative that is needed.
    """
    needed = [(y, w) for y, w in zip(ys, ws, strict=True) if y.requires_grad]
    if not needed:
        return [torch.zeros_like(x) for x in xs]
    try:
        found = torch.autograd.grad(
            [y for y, _ in needed],
            xs,
            [w for _, w in needed],
            create_graph=create_graph,
            retain_graph=retain_graph or create_graph,
            allow_unused=True,
        )
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        raise RuntimeError(
            f"A second derivative is missing in PyTorch ({error}). For fused attention and recurrent layers: run the "
            f"forward pass inside backpack.hessianfree.TwiceDifferentiable(), which replaces them."
        ) from error
    return [torch.zeros_like(x) if f is None else f for x, f in zip(xs, found, strict=True)]


def refuse_wrong_second(f: Tensor) -> None:
    """Raise where second derivatives of a graph are wrong in PyTorch.

    Raises:
        RuntimeError: Those of a function are.
    """
    if f.requires_grad and has_wrong_second(read([get_gradient_edge(f)]).order):
        raise RuntimeError(
            "PyTorch's second derivatives of weight normalization are wrong: run the forward pass inside "
            "backpack.hessianfree.TwiceDifferentiable(), which writes the function out."
        )


def returned(tensors: Iterable[Tensor], detach: bool) -> tuple[Tensor, ...]:
    """The tensors as a tuple, cut from the graph if ``detach``."""
    return tuple(tensor.detach() if detach else tensor for tensor in tensors)
