"""Ground truth by plain autograd: a loop over samples, in the data type of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module


@dataclass
class Problem:
    """A model, a batch, and a function of the model's output that sums over samples."""

    model: Module
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    axis: int = 0

    @property
    def n(self) -> int:
        return next(t for t in (*self.inputs, *self.kwargs.values()) if isinstance(t, Tensor)).shape[self.axis]

    def output(self, *inputs: Any, **kwargs: Any) -> Tensor:
        out = self.model(*(inputs or self.inputs), **(kwargs or self.kwargs))
        while not isinstance(out, Tensor):
            out = out.logits if hasattr(out, "logits") else out[0]
        return out

    def loss(self, *inputs: Any, scale: float = 1.0, **kwargs: Any) -> Tensor:
        return self.value(self.output(*inputs, **kwargs), scale)

    @staticmethod
    def value(out: Tensor, scale: float = 1.0) -> Tensor:
        """``sum_n f(output_n)``, not symmetric in the outputs, times ``scale``."""
        weight = torch.arange(out.shape[-1], dtype=out.dtype).sin()
        return scale * (out * weight + out.tanh()).sum()

    def sample(self, n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def one(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.narrow(self.axis, n, 1)
            if isinstance(value, dict):
                return {key: one(entry) for key, entry in value.items()}
            return value

        return tuple(map(one, self.inputs)), {key: one(value) for key, value in self.kwargs.items()}

    def parameters(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


OF_GRADIENTS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "BatchGrad": (1, lambda g: g),
    "BatchL2Grad": (2, lambda g: g.flatten(1).square().sum(1)),
    "BatchDotGrad": (2, lambda g: g.flatten(1) @ g.flatten(1).T),
    "SumGradSquared": (2, lambda g: g.square().sum(0)),
    "Variance": (2, lambda g: (g - g.mean(0)).square().mean(0)),
}
"""Extension of first order -> its degree, and its truth from the individual gradients of a parameter, ``[n, *p]``.

The result for ``c`` times the loss is ``c**degree`` times as large. Each row is tested on all models, with all forms of
subsets, and on data sets: in one process, in several, and with results in files.
"""


def individual_gradients(problem: Problem, scale: float = 1.0) -> dict[str, Tensor]:
    """``[N, *p]`` for each parameter that the loss depends on."""
    parameters = problem.parameters()
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for n in range(problem.n):
        inputs, kwargs = problem.sample(n)
        loss = problem.loss(*inputs, scale=scale, **kwargs)
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                rows[name].append(grad.to_dense())
    return {name: torch.stack(found) for name, found in rows.items() if found}


def through_rows(output: Tensor, loss: Tensor, parameters: list[Tensor], axis: int = 0) -> list[Tensor]:
    """``J_n^T g_n`` of each parameter: the part of its gradient that flows through row ``n`` of a model's output."""
    (cotangent,) = torch.autograd.grad(loss, output, retain_graph=True)
    found: list[list[Tensor]] = [[] for _ in parameters]
    for n in range(output.shape[axis]):
        own = torch.zeros_like(cotangent)
        own.select(axis, n).copy_(cotangent.select(axis, n))
        grads = torch.autograd.grad(output, parameters, own, retain_graph=True, allow_unused=True)
        for rows, p, grad in zip(found, parameters, grads, strict=True):
            rows.append(torch.zeros_like(p) if grad is None else grad.to_dense())
    return [torch.stack(rows) for rows in found]


def plain_gradients(problem: Problem, scale: float = 1.0) -> dict[str, Tensor | None]:
    for parameter in problem.model.parameters():
        parameter.grad = None
    problem.loss(scale=scale).backward()
    found = {name: p.grad for name, p in problem.parameters().items()}
    for parameter in problem.model.parameters():
        parameter.grad = None
    return found


def close(found: Tensor, truth: Tensor, size: Tensor | float = 0.0, rtol: float = 1e-10) -> bool:
    """Equal up to rounding, measured by the largest entry of the truth (or ``size``, where terms cancel)."""
    found, truth = found.detach(), truth.detach()
    scale = max(float(truth.abs().max()), float(size), 1e-12) if truth.numel() else 1.0
    return found.shape == truth.shape and bool((found - truth).abs().max() <= rtol * scale if truth.numel() else True)
