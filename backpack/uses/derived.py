"""A parameter behind a tensor that is computed from parameters alone: a parametrization, a sum of adapters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backpack.uses.base import Individual
from backpack.uses.pullback import map_samples


@dataclass(eq=False)
class Derived(Individual):
    """Individual gradients of ``parameter``, pulled through the graph of ``tensor`` from those of ``tensor``."""

    inner: Individual
    tensor: Tensor
    parameter: Tensor

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.parameter.shape

    @property
    def size(self) -> tuple[int, int]:
        return self.inner.size

    def narrow(self, start: int, stop: int) -> Derived:
        return replace(self, inner=self.inner.narrow(start, stop))

    def scaled(self, factor: Tensor) -> Derived:
        return replace(self, inner=self.inner.scaled(factor))

    def _dense(self) -> Tensor:
        create = torch.is_grad_enabled()

        def pull(cotangent: Tensor) -> Tensor:
            found = torch.autograd.grad(self.tensor, self.parameter, cotangent, retain_graph=True, create_graph=create)
            return found[0]

        return map_samples(pull, self.inner.dense(), ())
