"""A model with a batch and a loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from truths.autograd import individual_gradients


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

    def individual_gradients(self, scale: float = 1.0) -> dict[str, Tensor]:
        """``[N, *p]`` of each parameter that the loss depends on, by a loop over samples."""
        parameters = self.parameters()
        samples = [self.sample(n) for n in range(self.n)]
        terms = [self.loss(*inputs, scale=scale, **kwargs) for inputs, kwargs in samples]
        used = torch.autograd.grad(terms[0], list(parameters.values()), retain_graph=True, allow_unused=True)
        names = [name for name, grad in zip(parameters, used, strict=True) if grad is not None]
        return dict(zip(names, individual_gradients(terms, [parameters[name] for name in names]), strict=True))

    def gradients(self, scale: float = 1.0) -> dict[str, Tensor | None]:
        """Those that PyTorch stores in a backward pass."""
        self.model.zero_grad()
        self.loss(scale=scale).backward()
        found = {name: p.grad for name, p in self.parameters().items()}
        self.model.zero_grad()
        return found
