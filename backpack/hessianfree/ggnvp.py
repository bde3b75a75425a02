"""Products with generalized Gauss-Newton matrices."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.nn import Module

from backpack.hessianfree._common import Tensors
from backpack.hessianfree.hvp import hessian_vector_product
from backpack.hessianfree.lop import transposed_jacobian_vector_product
from backpack.hessianfree.rop import jacobian_vector_product


def ggn_vector_product_from_plist(
    loss: Tensor, output: Tensor, plist: Iterable[Tensor], v: Tensors
) -> tuple[Tensor, ...]:
    """The product ``J^T H J v`` with the GGN, one tensor for each of ``plist`` (Schraudolph, 2002, section 3).

    Args:
        loss: A scalar, computed from ``output``.
        output: The model's output.
        plist: The parameters. ``J`` is the Jacobian of ``output`` with respect to them, ``H`` the Hessian of ``loss``
            with respect to ``output``.
        v: A vector: one tensor for each parameter, of its shape.

    Raises:
        ValueError: ``v`` does not have the shapes of ``plist``.
        RuntimeError: PyTorch does not have a derivative that is needed.
    """
    parameters = list(plist)
    pushed = jacobian_vector_product(output, parameters, v)
    return transposed_jacobian_vector_product(output, parameters, hessian_vector_product(loss, output, pushed))


def ggn_vector_product(loss: Tensor, output: Tensor, model: Module, v: Tensors) -> tuple[Tensor, ...]:
    """As ``ggn_vector_product_from_plist``, for the parameters of ``model`` that require a gradient."""
    return ggn_vector_product_from_plist(loss, output, [p for p in model.parameters() if p.requires_grad], v)
