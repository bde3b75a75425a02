"""Products with Fisher matrices."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Module

from backpack.curvature.losses import loss_root
from backpack.hessianfree._common import Tensors
from backpack.hessianfree.lop import transposed_jacobian_vector_product
from backpack.hessianfree.rop import jacobian_vector_product
from backpack.samples import Layout


def fisher_vector_product(
    lossfunc: Module,
    output: Tensor,
    target: Tensor,
    plist: Iterable[Tensor],
    v: Tensors,
    kind: str = "exact",
    mc_samples: int = 1,
) -> tuple[Tensor, ...]:
    """The product ``F v`` with the Fisher matrix of the model's predictive distribution, scaled as the loss is reduced.

    Args:
        lossfunc: A loss module, the negative log-likelihood of ``target``.
        output: The model's output, whose first axis counts the samples.
        target: The labels. Other kinds than ``"empirical"`` use only their weights, and which of them are ignored.
        plist: The parameters.
        v: A vector: one tensor for each parameter, of its shape.
        kind: ``"exact"``: the GGN (Martens, 2020, section 9.2); ``"sampled"``: from gradients at labels drawn from the
            model's distribution; ``"empirical"``: from gradients at the given labels.
        mc_samples: How many labels are drawn for each sample.

    Raises:
        ValueError: ``kind`` is none of these, ``mc_samples`` is not positive, or ``v`` does not have the shapes of
            ``plist``.
    """
    if kind not in ("exact", "sampled", "empirical"):
        raise ValueError(f"kind must be 'exact', 'sampled' or 'empirical', got {kind!r}.")
    if mc_samples < 1:
        raise ValueError(f"mc_samples must be positive, got {mc_samples}.")
    parameters = list(plist)
    layout, point = Layout(len(output)), output.detach().requires_grad_()
    with torch.enable_grad():
        value = lossfunc.forward(point, target)
    outer = torch.ones_like(value)
    root = loss_root(lossfunc, output.detach(), layout, (target,), {}, outer)
    root.require_semidefinite()
    if kind == "exact":
        columns = root.exact(0, root.columns)
    elif kind == "sampled":
        columns = torch.stack([root.sampled() for _ in range(mc_samples)]) / mc_samples**0.5
    else:
        (grad,) = torch.autograd.grad(value, point, outer)
        columns = root.weighed(layout.split(grad).flatten(1))[None]
    (pushed,) = jacobian_vector_product(output, parameters, v)
    inner = torch.einsum("vnd,nd->vn", columns, pushed.flatten(1))
    back = torch.einsum("vn,vnd->nd", inner, columns).reshape(output.shape)
    return transposed_jacobian_vector_product(output, parameters, back)
