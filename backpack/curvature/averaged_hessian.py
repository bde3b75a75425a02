"""Second order, averaged, with the second derivatives of the modules: Kronecker factors of the Hessian.

The curvature that is pulled back through a module ``f`` is added to the module's residual, which is ``R = sum_n d^2
<g_n, f(x_n)>`` with the gradient ``g_n`` of the loss in the module's output (Dangel, Harmeling & Hennig, 2020, section
3). A positive-curvature Hessian takes absolute values or positive parts of the eigenvalues of ``R`` (Chen & Hsieh,
2018).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module

from backpack.curvature.averaged import AveragedPass
from backpack.curvature.loss_term import PASSES
from backpack.curvature.mean_curvature import AFFINE, ELEMENTWISE, SAME, Mean, is_one_of
from backpack.curvature.module_chain import Link
from backpack.curvature.rerun import run_again
from backpack.modules.thread_state import muted


class AveragedHessianPass(AveragedPass):
    """Averages the Hessian instead of the Gauss-Newton matrix: it adds the residual of each module."""

    grad: Tensor | None = None
    """The gradient of the losses in a module's output, ``[n, d]``."""
    modify: Callable[[Tensor], Tensor] | None = None
    """What is applied to the residuals' eigenvalues."""

    def _read_functions(self, links: Sequence[Link]) -> bool:
        return False  # residuals need the inputs of all modules

    def _step(self, link: Link, mean: Mean) -> Mean:
        module = link.module
        if module._modules and any(p.requires_grad for p in module.parameters()):
            raise RuntimeError(
                f"{self._name}: {type(module).__name__} in the chain holds modules whose second "
                f'derivatives are not taken one by one. Write them into the chain, or use curv_type="ggn".'
            )
        mean = super()._step(link, mean)
        residual = self._residual(module, link.input) if self.wanted else None
        return mean if residual is None else Mean(mean.matrix + residual)

    def _residual(self, module: Module, x: Tensor) -> Tensor | None:
        """The residual of a module, ``[d, d]``; ``None``: it is zero. The gradient is pulled back to its input."""
        if not x.is_floating_point():
            return None
        if self.grad is None:
            first, *others = [term.grad() for term in self.terms]
            grad = sum(others, start=first)
            rows = self.extensions[0].subset.rows(self.n, grad.device)
            self.grad = grad if rows is None else grad[rows]
        x = x.detach().requires_grad_()
        with torch.enable_grad(), muted(), run_again(module):
            out = module(x.clone())  # it may work in place
            (grad,) = torch.autograd.grad(out, x, self.grad.reshape(out.shape), create_graph=True)
            self.grad = grad.detach().flatten(1)
            found = None if is_one_of(module, (*AFFINE, *SAME)) else self._derivative(module, grad.flatten(1), x)
        return None if found is None or not found.any() else self._modified(found)

    def _derivative(self, module: Module, grad: Tensor, x: Tensor) -> Tensor | None:
        """The derivative of ``grad[n, d]`` with respect to ``x``, summed over samples; ``None``: it is zero."""
        if not grad.requires_grad:
            return None
        elementwise, rows = is_one_of(module, ELEMENTWISE), []
        for entry in [grad.sum()] if elementwise else grad.sum(0):
            (row,) = torch.autograd.grad(entry, x, retain_graph=True, allow_unused=True)
            if row is None:
                return None
            rows.append(row.flatten(1).sum(0))
        return torch.diag(rows[0]) if elementwise else torch.stack(rows)

    def _modified(self, residual: Tensor) -> Tensor:
        if self.modify is None:
            return residual
        values, vectors = torch.linalg.eigh(residual.double())
        return ((vectors * self.modify(values)) @ vectors.T).to(residual.dtype)


class PositiveParts(AveragedHessianPass):
    """Takes the positive parts of the residuals' eigenvalues."""

    modify = staticmethod(torch.relu)


class AbsoluteValues(AveragedHessianPass):
    """Takes the absolute values of the residuals' eigenvalues."""

    modify = staticmethod(torch.abs)


PASSES["average hessian"] = AveragedHessianPass
PASSES["average pch-clip"] = PositiveParts
PASSES["average pch-abs"] = AbsoluteValues
