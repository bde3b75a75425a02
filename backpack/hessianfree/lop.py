"""Products with transposed Jacobians."""

from __future__ import annotations

from torch import Tensor

from backpack.hessianfree._common import Tensors, listed, matching, pulled_back, returned


def transposed_jacobian_vector_product(
    f: Tensors, x: Tensors, v: Tensors, retain_graph: bool = True, detach: bool = True
) -> tuple[Tensor, ...]:
    """The product ``J^T v`` with the Jacobian ``J`` of ``f`` with respect to ``x``, one tensor for each of ``x``.

    Args:
        f: One tensor or several, computed from ``x``.
        x: One tensor or several.
        v: A vector: one tensor for each of ``f``, of its shape.
        retain_graph: Whether to keep the graph of ``f`` for further products.
        detach: Whether to cut the result from the graph.

    Raises:
        ValueError: ``v`` does not have the shapes of ``f``.
    """
    ys, xs = listed(f), listed(x)
    return returned(pulled_back(ys, xs, matching(v, ys, "f"), not detach, retain_graph), detach)


def L_op(ys: Tensors, xs: Tensors, ws: Tensors, retain_graph: bool = True, detach: bool = True) -> tuple[Tensor, ...]:
    """As ``transposed_jacobian_vector_product``."""
    return transposed_jacobian_vector_product(ys, xs, ws, retain_graph, detach)
