"""Products with Jacobians."""

from __future__ import annotations

import torch
from torch import Tensor

from backpack.hessianfree._common import Tensors, listed, matching, pulled_back, returned


def jacobian_vector_product(
    f: Tensors, x: Tensors, v: Tensors, retain_graph: bool = True, detach: bool = True
) -> tuple[Tensor, ...]:
    """The product ``J v`` with the Jacobian ``J`` of ``f`` with respect to ``x``, one tensor for each of ``f``.

    By two backward passes: ``J^T w`` is linear in ``w``, and its derivative is ``J``.

    Args:
        f: One tensor or several, computed from ``x``.
        x: One tensor or several.
        v: A vector: one tensor for each of ``x``, of its shape.
        retain_graph: Whether to keep the graph of ``f`` for further products.
        detach: Whether to cut the result from the graph.

    Raises:
        ValueError: ``v`` does not have the shapes of ``x``.
        RuntimeError: PyTorch does not have a derivative that is needed.
    """
    ys, xs = listed(f), listed(x)
    vs = matching(v, xs, "x")
    with torch.enable_grad():
        ws = [torch.zeros_like(y).requires_grad_() for y in ys]
        pulled = pulled_back(ys, xs, ws, True)
    return returned(pulled_back(pulled, ws, vs, not detach, retain_graph), detach)


def R_op(ys: Tensors, xs: Tensors, vs: Tensors, retain_graph: bool = True, detach: bool = True) -> tuple[Tensor, ...]:
    """As ``jacobian_vector_product``."""
    return jacobian_vector_product(ys, xs, vs, retain_graph, detach)
