"""The Hessian's diagonal entry by entry: a derivative of the gradient for each, or for each vector that is drawn.

That is right for every parameter: one that enters the graph in several places or not linearly, one below what mixes
samples. And it is what can be differentiated further, for ``backward(create_graph=True)``: the roots of residuals that
are pulled back otherwise, square roots of entries of any sign and eigenvectors, have no derivatives where entries cross
zero or eigenvalues meet.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backpack.curvature.residuals import WRONG_THIRD, base_name
from backpack.curvature.twice import derivative
from backpack.samples import AnyLayout

ENTRIES = 2**22
"""Entries of the vectors that are multiplied with the Hessian at a time."""


@dataclass(eq=False)
class Entries:
    """Diagonals ``[*p]``, or one for each sample ``[n, *p]``.

    ``gradients``: of the parameters, as a function of the samples' weights; ``layout``: where the samples lie at the
    loss's input.
    """

    gradients: Callable[[Tensor | None], Sequence[Tensor | None]]
    layout: AnyLayout
    parameters: list[Tensor]
    create_graph: bool

    def exact(self, each: bool) -> list[Tensor | None]:
        """By unit vectors; ``None``: the loss does not depend on a parameter."""
        weights = self._ones() if each else None
        grads = self.gradients(weights)
        return [
            None if grad is None else self._exact(parameter, grad, weights)
            for parameter, grad in zip(self.parameters, grads, strict=True)
        ]

    def drawn(self, count: int, each: bool) -> list[Tensor | None]:
        """The mean of ``r * H r`` for random signs ``r`` (Hutchinson, 1989)."""
        weights = self._ones() if each else None
        found: list[Tensor | None] = []
        for parameter, grad in zip(self.parameters, self.gradients(weights), strict=True):
            if grad is None:
                found.append(None)
                continue
            signs = signs_like(parameter, (count, *parameter.shape))
            products = [sign * derivative(grad, parameter, sign) for sign in signs]
            found.append(self._finished(torch.stack(products).mean(0), weights))
        return found

    def _ones(self) -> Tensor:
        like = self.parameters[0]
        return torch.ones(self.layout.n, dtype=like.dtype, device=like.device, requires_grad=True)

    def _exact(self, parameter: Tensor, grad: Tensor, weights: Tensor | None) -> Tensor:
        if not (grad.requires_grad and parameter.numel()):
            return parameter.new_zeros(parameter.shape if weights is None else (self.layout.n, *parameter.shape))
        pieces: list[Tensor] = []
        step = 1 if self.create_graph else max(1, ENTRIES // parameter.numel())
        for start in range(0, parameter.numel(), step):
            pieces.append(self._finished(self._some(parameter, grad, start, step, weights is not None), weights))
        found = torch.cat(pieces, -1)
        return found.reshape(*found.shape[:-1], *parameter.shape)

    def _some(self, parameter: Tensor, grad: Tensor, start: int, step: int, with_graph: bool) -> Tensor:
        """Entries of the diagonal, ``[k]``."""
        number = torch.arange(start, min(start + step, parameter.numel()), device=parameter.device)
        units = torch.zeros(len(number), parameter.numel(), dtype=grad.dtype, device=grad.device)
        units[torch.arange(len(number), device=grad.device), number] = 1
        units = units.reshape(len(number), *grad.shape)
        create = self.create_graph or with_graph

        def multiply(unit: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(
                grad, parameter, unit, create_graph=create, retain_graph=True, allow_unused=True
            )
            return torch.zeros_like(parameter) if found is None else found

        if not self.create_graph and len(units) > 1:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    found = torch.vmap(multiply)(units)
                return found.flatten(1)[torch.arange(len(number), device=found.device), number]
            except (RuntimeError, UserWarning):  # a derivative that cannot be batched
                pass
        rows = [multiply(unit).flatten()[k] for k, unit in zip(number.tolist(), units, strict=True)]
        return torch.stack(rows)

    def _finished(self, diagonal: Tensor, weights: Tensor | None) -> Tensor:
        """The terms of the samples are the derivatives by their weights."""
        if weights is None:
            return diagonal
        if not diagonal.requires_grad:
            return diagonal.new_zeros(len(weights), *diagonal.shape)
        flat = diagonal.flatten()
        rows = [
            torch.autograd.grad(
                entry, weights, create_graph=self.create_graph, retain_graph=True, allow_unused=True
            )[0]
            for entry in flat
        ]
        rows = [torch.zeros_like(weights) if row is None else row for row in rows]
        return torch.stack(rows, 1).reshape(len(weights), *diagonal.shape)


def refuse_wrong_third(nodes: Sequence[torch.autograd.graph.Node], name: str) -> None:
    """Raise where a further derivative would be wrong.

    Raises:
        RuntimeError: PyTorch's third derivative of a function is.
    """
    wrong = {base_name(node) for node in nodes} & WRONG_THIRD
    if wrong:
        raise RuntimeError(
            f"{name} under backward(create_graph=True) needs the third derivatives of "
            f"{' and '.join(sorted(wrong))}, and those that PyTorch gives are wrong. Write the function with "
            f"elementary ones (LayerNorm over one axis is GroupNorm with one group), or call backward() without "
            f"create_graph=True."
        )


def signs_like(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Random signs."""
    return torch.randint(0, 2, shape, device=tensor.device).to(tensor.dtype) * 2 - 1
