"""The Hessian's diagonal entry by entry: the gradient is differentiated once for each entry or each random vector.

This works for every parameter, also for one that enters the graph in several places or not linearly, or below what
mixes samples. The result can also be differentiated further, for ``backward(create_graph=True)``. Columns cannot:
square roots have no derivative where an entry crosses zero, and eigenvectors have none where eigenvalues meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backpack.curvature.residuals.nodes import WRONG_THIRD
from backpack.graph import kind
from backpack.memory import at_a_time
from backpack.torch_internals import vmap

MANY = 16
"""For more samples than this, each entry is differentiated by the samples' weights, which gives all terms at once."""


@dataclass(eq=False)
class Entries:
    """Computes the diagonals of the Hessian, ``[*p]``, or one for each sample, ``[n, *p]``.

    ``gradients``: of the parameters, as a function of the samples' weights; ``n``: how many
    samples there are; ``is_batchable``: whether several derivatives may be taken together.
    """

    gradients: Callable[[Tensor | None], Sequence[Tensor | None]]
    n: int
    parameters: list[Tensor]
    create_graph: bool
    is_batchable: bool
    advance: Callable[..., Any]
    """Shows that so many entries are done."""

    def exact(self, chosen: Sequence[int] | None) -> list[Tensor | None]:
        """The diagonals from products with unit vectors, for each of the ``chosen`` samples; ``None``: for their sum.

        A result is ``None`` if the loss does not depend on a parameter.
        """
        if chosen is None:
            return self._by_units(None)
        own = list(dict.fromkeys(chosen))
        if self.create_graph or len(own) > MANY:
            try:
                found = self._by_units(self._ones())
                return [None if diagonals is None else diagonals[list(chosen)] for diagonals in found]
            except RuntimeError:  # a function between the model and the loss without the second derivatives of a rerun
                if self.create_graph:
                    raise
        rows = {n: self._by_units(self._ones(n)) for n in own}
        columns = zip(*(rows[n] for n in chosen), strict=True)
        return [None if any(row is None for row in each) else torch.stack(list(each)) for each in columns]

    def _by_units(self, weights: Tensor | None) -> list[Tensor | None]:
        grads = self.gradients(weights)
        return [
            None if grad is None else self._exact(parameter, grad, weights)
            for parameter, grad in zip(self.parameters, grads, strict=True)
        ]

    def drawn(self, count: int) -> list[Tensor | None]:
        """The mean of ``r * H r`` for random signs ``r`` (Hutchinson, 1989)."""
        found: list[Tensor | None] = []
        for parameter, grad in zip(self.parameters, self.gradients(None), strict=True):
            signs = signs_like(parameter, (count, *parameter.shape))
            found.append(None if grad is None else (signs * self._products(parameter, grad, signs)).mean(0))
        return found

    def _ones(self, only: int | None = None) -> Tensor:
        """Weights of the samples, all one, to be differentiated by; or zero for all samples but one."""
        like = self.parameters[0]
        if only is None:
            return torch.ones(self.n, dtype=like.dtype, device=like.device, requires_grad=True)
        weights = torch.zeros(self.n, dtype=like.dtype, device=like.device)
        weights[only] = 1
        return weights

    def _exact(self, parameter: Tensor, grad: Tensor, weights: Tensor | None) -> Tensor:
        weights = weights if weights is not None and weights.requires_grad else None
        pieces: list[Tensor] = []
        most = at_a_time("cotangents", parameter.device) if weights is None else 1
        step = max(1, most // max(1, parameter.numel()))
        for start in range(0, parameter.numel(), step):
            number = torch.arange(start, min(start + step, parameter.numel()), device=parameter.device)
            place = torch.arange(len(number), device=parameter.device)
            units = torch.zeros(len(number), parameter.numel(), dtype=parameter.dtype, device=parameter.device)
            units[place, number] = 1
            units = units.reshape(len(number), *parameter.shape)
            rows = self._products(parameter, grad, units, weights is not None).reshape(len(number), -1)
            pieces.append(self._finished(rows[place, number], weights))
            self.advance(len(number))
        if not pieces:
            return parameter.new_zeros(parameter.shape if weights is None else (self.n, *parameter.shape))
        found = torch.cat(pieces, -1)
        return found.reshape(found.shape[:-1] + parameter.shape)

    def _products(self, parameter: Tensor, grad: Tensor, vectors: Tensor, with_graph: bool = False) -> Tensor:
        """The Hessian times several vectors, ``[k, *p]``, at once where PyTorch can."""
        if not grad.requires_grad:
            return torch.zeros_like(vectors)
        create = self.create_graph or with_graph

        def multiply(vector: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(
                grad, parameter, vector, create_graph=create, retain_graph=True, allow_unused=True
            )
            return torch.zeros_like(parameter) if found is None else found

        if self.is_batchable and not self.create_graph and len(vectors) > 1:
            with suppress(RuntimeError):  # a derivative that cannot be batched
                return vmap(multiply, vectors)
        return torch.stack([multiply(vector) for vector in vectors])

    def _finished(self, diagonal: Tensor, weights: Tensor | None) -> Tensor:
        """The terms of the samples are the derivatives by their weights."""
        if weights is None:
            return diagonal
        if not diagonal.requires_grad:
            return diagonal.new_zeros(len(weights), *diagonal.shape)
        flat = diagonal.flatten()
        rows = [
            torch.autograd.grad(entry, weights, create_graph=self.create_graph, retain_graph=True, allow_unused=True)[0]
            for entry in flat
        ]
        rows = [torch.zeros_like(weights) if row is None else row for row in rows]
        return torch.stack(rows, 1).reshape(len(weights), *diagonal.shape)


def refuse_wrong_third(nodes: Sequence[torch.autograd.graph.Node], name: str) -> None:
    """Raise where a further derivative would be wrong.

    Raises:
        RuntimeError: PyTorch's third derivative of a function is.
    """
    wrong = {kind(node) for node in nodes} & WRONG_THIRD
    if wrong:
        raise RuntimeError(
            f"{name} under backward(create_graph=True) needs the third derivatives of "
            f"{' and '.join(sorted(wrong))}, and those that PyTorch gives are wrong. Write the function with "
            f"elementary ones (LayerNorm over one axis is GroupNorm with one group), or call backward() without "
            f"create_graph=True."
        )


def signs_like(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Random signs of this shape, on the device and in the data type of a tensor."""
    return torch.randint(0, 2, shape, device=tensor.device).to(tensor.dtype) * 2 - 1
