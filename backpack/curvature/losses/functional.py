"""Any other loss: its Hessian by automatic differentiation, its root by an eigendecomposition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge
from torch.nn import Module

from backpack.curvature.losses.base import LossRoot, by_sample, divided, term_weight
from backpack.graph import read
from backpack.samples import AnyLayout

TOLERANCE = 1e-4
"""Negative eigenvalues down to this times the largest count as rounding in float32; its square in float64."""


def loss_gradient(
    loss: Module, input: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], outer: Tensor, create_graph: bool
) -> Tensor:
    """The gradient of a loss with respect to its input.

    ``outer`` weighs the entries of a loss that is not reduced; of one that is, it only counts as a one.
    """
    value = loss.forward(input, *args, **kwargs)
    (grad,) = torch.autograd.grad(value, input, outer if value.dim() else None, create_graph=create_graph)
    return grad


def hessian_product(
    loss: Module, input: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], outer: Tensor
) -> Callable[[Tensor], Tensor]:
    """The function that multiplies with the Hessian of the loss with respect to its input; ``outer`` as above."""
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        point = input if create else input.detach().requires_grad_()
        grad = loss_gradient(loss, point, args, kwargs, outer, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        if not grad.requires_grad:  # a loss that is linear in its input
            return torch.zeros_like(vector)
        (result,) = torch.autograd.grad(grad, point, vector, retain_graph=True, create_graph=create, allow_unused=True)
        return torch.zeros_like(vector) if result is None else result

    return product


def check_custom_functions(
    loss: Module,
    input: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outer: Tensor,
    product: Callable[[Tensor], Tensor],
) -> None:
    """Compare a product with the Hessian with a difference of gradients, if the loss has custom autograd functions.

    Their gradients may have been computed in the forward pass, so that differentiating them gives zero.

    Raises:
        RuntimeError: Most of the Hessian is missing.
    """
    point = input.detach().requires_grad_()
    with torch.enable_grad():
        value = loss.forward(point, *args, **kwargs)
    nodes = [] if value.grad_fn is None else read([get_gradient_edge(value)]).order
    if not any(isinstance(node, BackwardCFunction) for node in nodes):
        return
    eps = torch.finfo(input.dtype).eps
    step = eps ** (1 / 3)
    direction = torch.arange(input.numel(), device=input.device).cos().to(input.dtype).reshape(input.shape)
    ends = [(input.detach() + sign * step * direction).requires_grad_() for sign in (1, -1)]
    with torch.enable_grad():
        after, before = (loss_gradient(loss, end, args, kwargs, outer, create_graph=False) for end in ends)
    expected, noise = (after - before) / (2 * step), 1e3 * eps / step * after.norm()
    with torch.no_grad():
        missing = (product(direction) - expected).norm()
        if missing > noise and missing > 0.5 * expected.norm():
            raise RuntimeError(
                f"{type(loss).__name__} has a custom autograd function whose backward() can't be differentiated: its "
                f"Hessian would lack terms. Compute the loss by operations of PyTorch, or let backward() use the "
                f"tensors of ctx.save_for_backward alone; or take first-order extensions."
            )


class DenseRoot(LossRoot):
    """The root of the dense Hessian of each sample, ``[n, d, d]``; ``weight`` as for ``Diagonal``."""

    def __init__(self, hessian: Tensor, weight: Tensor) -> None:
        self._weight = weight
        values, vectors = torch.linalg.eigh(hessian)
        values = self._without_signs(values, TOLERANCE if hessian.dtype == torch.float32 else TOLERANCE**2)
        self.root = (vectors * values.clamp(min=0).sqrt().unsqueeze(1)).permute(2, 0, 1)
        self.columns = len(self.root)

    def exact(self, start: int, stop: int) -> Tensor:
        return self.root[start:stop]

    def weighed(self, grad: Tensor) -> Tensor:
        return divided(grad, self._weight)

    def sampled(self) -> Tensor:
        return torch.einsum("vnd,vn->nd", self.root, torch.randn_like(self.root[:, :, 0]))


def functional(
    loss: Module, input: Tensor, layout: AnyLayout, args: tuple[Any, ...], kwargs: dict[str, Any], outer: Tensor
) -> LossRoot:
    """The root of a loss without a rule.

    Raises:
        ValueError: The loss couples samples.
        RuntimeError: A custom autograd function in it hides most of the Hessian.
    """
    product = hessian_product(loss, input, args, kwargs, outer)
    check_custom_functions(loss, input, args, kwargs, outer, product)
    split = layout.split(input)
    n, size = len(split), split[0].numel()
    columns = []
    for column in range(size):
        unit = split.new_zeros(n, size)
        unit[:, column] = 1
        columns.append(by_sample(layout, product(layout.join(unit.reshape(split.shape)))))
    hessian = torch.stack(columns, 2)
    check = torch.arange(n * size, device=input.device).cos().to(input.dtype).reshape(split.shape)
    expected = torch.einsum("nde,ne->nd", hessian, check.reshape(n, size))
    found = by_sample(layout, product(layout.join(check)))
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-5 * max(1e-30, found.abs().max().item())):
        raise ValueError(
            f"{type(loss).__name__} couples the samples of a batch: its Hessian with respect to its input of shape "
            f"{list(input.shape)} is not block-diagonal over the {n} samples, as second-order extensions need it. Take "
            f"first-order extensions, or give samples that belong together one number in sample_ids=."
        )
    return DenseRoot((hessian + hessian.transpose(1, 2)) / 2, term_weight(loss, input, layout, outer))
