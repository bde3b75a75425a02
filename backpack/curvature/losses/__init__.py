"""Losses: the root of their Hessian with respect to their input, one family a file."""

from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_map

from backpack.curvature.losses import cross_entropy, elementwise
from backpack.curvature.losses.base import ROOTS, LossRoot, root_of
from backpack.curvature.losses.functional import functional, loss_gradient
from backpack.samples import AnyLayout

__all__ = ["ROOTS", "LossRoot", "cross_entropy", "elementwise", "in_float32", "loss_gradient", "loss_root", "root_of"]


def _widened(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.is_floating_point() and value.element_size() < 4
    return value.float() if half else value


Call = tuple[Tensor, tuple[Any, ...], dict[str, Any], Tensor]
"""The input of a loss, its further arguments, and the weights of its entries (where it is not reduced)."""


def in_float32(loss: Module, input: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], outer: Tensor) -> Call:
    """What a loss is called with, of 16 bits in ``float32``, unless the loss has weights of 16 bits itself."""
    if input.element_size() < 4 and not any(tensor.element_size() < 4 for tensor in loss.state_dict().values()):
        input, args, kwargs, outer = tree_map(_widened, (input, args, kwargs, outer))
    return input, args, kwargs, outer


def loss_root(
    loss: Module, input: Tensor, layout: AnyLayout, args: tuple[Any, ...], kwargs: dict[str, Any], outer: Tensor
) -> LossRoot:
    """The root for a call ``loss(input, *args, **kwargs)``; the rule is that of the nearest base class.

    Of data types of 16 bits, it is computed in ``float32``.
    """
    input, args, kwargs, outer = in_float32(loss, input, args, kwargs, outer)
    for cls in type(loss).__mro__:
        if cls in ROOTS and cls.forward is type(loss).forward:
            return ROOTS[cls](loss, input, layout, args, kwargs, outer)
    return functional(loss, input, layout, args, kwargs, outer)
