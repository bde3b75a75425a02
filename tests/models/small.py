"""What small models are made of, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from backpack import backpack, extend

F64 = torch.float64


class Fn(nn.Module):
    """A module of a function ``f(self, *inputs)`` and parts."""

    def __init__(self, f: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.f = f
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.f(self, *inputs, **kwargs)


def L(i: int, o: int, **kwargs: Any) -> nn.Linear:
    return nn.Linear(i, o, dtype=F64, **kwargs)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


def P(*shape: int) -> nn.Parameter:
    return nn.Parameter(rand(*shape))


class Scale(nn.Module):
    """A layer that the package does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def differentiate(model: nn.Module, lossfunc: nn.Module, X: Tensor, y: Any, *extensions: Any) -> None:
    """Extend both, and run one backward pass."""
    extend(model), extend(lossfunc)
    with backpack(*extensions):
        lossfunc(model(X), y).backward()
