"""Products with Hessians."""

from __future__ import annotations

import torch
from torch import Tensor

from backpack.hessianfree._common import Tensors, listed, matching, pulled_back, refuse_wrong_second, returned


def hessian_vector_product(
    f: Tensor, params: Tensors, v: Tensors, grad_params: Tensors | None = None, detach: bool = True
) -> tuple[Tensor, ...]:
    """The product ``H v`` with the Hessian of the scalar ``f`` with respect to ``params`` (Pearlmutter, 1994).

    Args:
        f: A scalar.
        params: One tensor or several.
        v: A vector: one tensor for each of ``params``, of its shape.
        grad_params: The gradient of ``f`` with respect to ``params``, if you have it with its graph
            (``create_graph=True``).
        detach: Whether to cut the result from the graph.

    Raises:
        ValueError: ``v`` does not have the shapes of ``params``.
        RuntimeError: PyTorch does not have a derivative that is needed, or a wrong one.
    """
    xs = listed(params)
    vs = matching(v, xs, "params")
    refuse_wrong_second(f)
    if grad_params is None:
        with torch.enable_grad():
            grads = pulled_back([f], xs, [torch.ones_like(f)], True)
    else:
        grads = listed(grad_params)
    return returned(pulled_back(grads, xs, vs, not detach), detach)
