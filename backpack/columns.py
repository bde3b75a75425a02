"""The Hessian's diagonal with derivatives of its own, for ``backward(create_graph=True)``: entry by entry.

The roots of residuals that are pulled back otherwise, square roots of entries of any sign and eigenvectors, have no
derivatives where entries cross zero or eigenvalues meet.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from backpack.engine import muted
from backpack.hessian import signs_like
from backpack.looped import nodes
from backpack.loss_call import PASSES
from backpack.products import LastingPass
from backpack.residuals import WRONG_THIRD, base_name


@dataclass(eq=False)
class ColumnPass(LastingPass):
    """The diagonal for extensions that share a subset, by a derivative of the gradient for each of its entries."""

    def run(self) -> None:
        """Store the results."""
        for call in self._calls():
            call.check()
        gradient, start, weights = self._prepare()
        self._check()
        rows = self.extensions[0].subset.rows(self.layout.n, start.device)
        if rows is not None and gradient.chosen is not None:
            rows = torch.searchsorted(gradient.chosen, rows)
        each = self._each
        if each:  # the terms of the samples are the derivatives by their weights
            weights = self.loss.input.new_ones(gradient.layout.n, requires_grad=True)
        parameters = self._parameters()
        with muted():
            grads = self.joined.grad([self.joined.start], parameters, [gradient(weights, start)], create_graph=True)
            reached = [(p, grad) for p, grad in zip(parameters, grads, strict=True) if grad is not None]
            if not self.sampled:
                self._warn([p for p, _ in reached])
            for parameter, grad in reached:
                if self.sampled:
                    found = self._drawn(parameter, grad)
                else:
                    found = self._exact(parameter, grad, weights if each else None)
                if each and rows is not None:
                    found = found[rows]
                for extension in self.extensions:
                    of_batch = each and "sample_squares" not in extension.reads
                    self.block.store(parameter, extension.savefield, found.sum(0) if of_batch else found.clone())

    def _check(self) -> None:
        wrong = {base_name(node) for node in nodes(self.joined.start, self.joined.instead)} & WRONG_THIRD
        if wrong:
            raise RuntimeError(
                f"{type(self.extensions[0]).__name__} under backward(create_graph=True) needs the third derivatives of "
                f"{' and '.join(sorted(wrong))}, and those that PyTorch gives are wrong. Write the function with "
                f"elementary ones (LayerNorm over one axis is GroupNorm with one group), or call backward() without "
                f"create_graph=True."
            )

    def _warn(self, parameters: list[Tensor]) -> None:
        names = " and ".join(type(extension).__name__ for extension in self.extensions)
        warnings.warn(
            f"{names} under backward(create_graph=True): the diagonal is taken entry by entry, which costs "
            f"{sum(p.numel() for p in parameters)} derivatives of second order and keeps the graphs of all. "
            f"DiagHessianMC needs as many as it draws samples, for each parameter.",
            stacklevel=2,
        )

    def _exact(self, parameter: Tensor, grad: Tensor, weights: Tensor | None) -> Tensor:
        """``[*p]``, or with the weights of the samples ``[n, *p]``."""
        shape = parameter.shape if weights is None else (len(weights), *parameter.shape)
        entries = []
        for place, entry in enumerate(grad.flatten().unbind()):
            found = _derivative(entry, parameter).flatten()[place]
            entries.append(found if weights is None else _derivative(found, weights).to(parameter.dtype))
        return torch.stack(entries, -1).reshape(shape) if entries else parameter.new_zeros(shape)

    def _drawn(self, parameter: Tensor, grad: Tensor) -> Tensor:
        """The mean of ``r * H r`` for random signs ``r`` (Hutchinson, 1989)."""
        count = self.extensions[0].mc_samples
        signs = signs_like(parameter, (count, *parameter.shape))
        return torch.stack([sign * _derivative(grad, parameter, sign) for sign in signs]).mean(0)


def _derivative(value: Tensor, input: Tensor, vector: Tensor | None = None) -> Tensor:
    """With its graph."""
    if not value.requires_grad:
        return torch.zeros_like(input)
    (found,) = torch.autograd.grad(value, input, vector, create_graph=True, allow_unused=True)
    return torch.zeros_like(input) if found is None else found


PASSES["columns"] = ColumnPass
