"""Fused functions, such as recurrent layers, that run again as the linear maps which they consist of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack.samples import Rows
from backpack.uses.base import Individual
from backpack.uses.dense_gradients import Dense
from backpack.uses.elementwise import Explicit


class Linear(Protocol):
    """``torch.nn.functional.linear``, observed."""

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply the map to the last axis."""


@dataclass(eq=False)
class Replay:
    """One call of a fused function.

    ``function(linear, *inputs)`` computes the same outputs from the selected samples with the help of ``linear``,
    which takes inputs ``[n, ..., i]``; ``inputs`` and ``outputs`` give the sample axis of each tensor.
    """

    function: Callable[..., Sequence[Tensor]]
    inputs: list[tuple[Tensor, int]]
    outputs: list[int]
    last: tuple[Any, Any, dict[int, list[Individual]]] = (None, None, {})

    def individuals(self, cotangents: dict[int, Tensor], rows: Rows, dtype: torch.dtype) -> dict[int, list[Individual]]:
        """For each parameter (by ``id``) the individual gradients of its uses; shared by the parameters."""
        if self.last[0] is not cotangents or self.last[1] is not rows.index:
            self.last = (cotangents, rows.index, self._compute(cotangents, rows.index, dtype))
        return self.last[2]

    def _compute(
        self, cotangents: dict[int, Tensor], index: Tensor | None, dtype: torch.dtype
    ) -> dict[int, list[Individual]]:
        def select(tensor: Tensor, axis: int) -> Tensor:
            return tensor if index is None else tensor.index_select(axis, index)

        maps: list[tuple[Tensor, Tensor, Tensor | None, Tensor]] = []

        def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            out = F.linear(input, weight, bias)
            if out.requires_grad:  # not of frozen parameters on data
                maps.append((input, weight, bias, out))
            return out

        create = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = [select(tensor if create else tensor.detach(), axis).to(dtype) for tensor, axis in self.inputs]
            results = self.function(linear, *inputs)
        places = list(cotangents)
        grads = [select(cotangents[place], self.outputs[place] + 1).to(dtype) for place in places]
        outs = [out for *_, out in maps]

        def pull(*seed: Tensor) -> tuple[Tensor, ...]:
            wanted = [results[place] for place in places]
            found = torch.autograd.grad(
                wanted, outs, list(seed), retain_graph=True, create_graph=create, allow_unused=True
            )
            return tuple(torch.zeros_like(o) if g is None else g for g, o in zip(found, outs, strict=True))

        if len(grads[0]) == 1:
            pulled = [grad[None] for grad in pull(*(grad[0] for grad in grads))]
        else:
            pulled = list(torch.vmap(pull)(*grads))
        found: dict[int, list[Individual]] = {}
        for (input, weight, bias, _), grad in zip(maps, pulled, strict=True):
            v, n = grad.shape[:2]
            x = input if create else input.detach()
            dense = Dense((x.reshape(n, 1, -1, x.shape[-1]),), grad.reshape(v, n, 1, -1, grad.shape[-1]), weight.shape)
            found.setdefault(id(weight), []).append(dense)
            if bias is not None:
                found.setdefault(id(bias), []).append(Explicit(grad.reshape(v, n, -1, grad.shape[-1]).sum(2)))
        return found
