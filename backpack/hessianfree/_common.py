"""Lists of tensors and derivatives of second order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Tensors = Tensor | Iterable[Tensor]


def listed(tensors: Tensors) -> list[Tensor]:
    """A list, of one tensor or of several."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def matching(vectors: Tensors, tensors: Sequence[Tensor], what: str) -> list[Tensor]:
    """The vectors, one for each tensor and of its shape.

    Raises:
        ValueError: They are not.
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
    """``J^T w`` by autograd, zero for what ``ys`` does not depend on.

    Raises:
        RuntimeError: A second derivative is needed that PyTorch does not have.
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


def returned(tensors: Iterable[Tensor], detach: bool) -> tuple[Tensor, ...]:
    """A tuple, cut from the graph or not."""
    return tuple(tensor.detach() if detach else tensor for tensor in tensors)
