"""``z = f(w, x)`` for any function: the vector-Jacobian product of the function itself, sample by sample."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from backpack.samples import Layout, Rows, layouts
from backpack.uses.base import Individual, Use


@dataclass(eq=False)
class Pullback(Individual):
    """Individual gradients from ``pull(grad of one sample, data of this sample)``.

    ``grad`` is ``[v, n, ...]``, each of ``data`` is ``[n, ...]``.
    """

    pull: Callable[..., Tensor]
    grad: Tensor
    data: tuple[Tensor, ...]
    shape: torch.Size

    @property
    def size(self) -> tuple[int, int]:
        return self.grad.shape[0], self.grad.shape[1]

    def narrow(self, start: int, stop: int) -> Pullback:
        return replace(self, grad=self.grad[:, start:stop], data=tuple(d[start:stop] for d in self.data))

    def scaled(self, factor: Tensor) -> Pullback:
        return replace(self, grad=self.grad * factor.reshape(-1, *[1] * (self.grad.dim() - 2)))

    def _dense(self) -> Tensor:
        return map_samples(self.pull, self.grad, self.data)


def map_samples(pull: Callable[..., Tensor], grad: Tensor, data: Sequence[Tensor]) -> Tensor:
    """``pull(grad[v, n], *data[n])`` for all ``v`` and ``n``, at once where PyTorch can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            per_sample = torch.vmap(pull, in_dims=(0, *[0] * len(data)))
            return torch.vmap(per_sample, in_dims=(0, *[None] * len(data)))(grad, *data)
    except (RuntimeError, UserWarning):  # an operation that cannot be batched
        rows = [torch.stack([pull(*one) for one in zip(seed, *data, strict=True)]) for seed in grad]
        return torch.stack(rows)


@dataclass(eq=False)
class PullbackUse(Use):
    """``function(*args, **kwargs)`` with the parameter as leaf ``position`` of the arguments.

    ``data`` says which other leaves hold samples.
    """

    function: Callable[..., Tensor]
    leaves: list[Any]
    spec: Any
    position: int
    data: list[int]

    def recorded(self) -> tuple[Tensor, ...]:
        return (self.leaves[self.position], *(self.leaves[place] for place in self.data))

    def bind(self, grad: Tensor, rows: Rows, shape: torch.Size) -> Pullback:
        placed = {place: _layout_like(rows.layout, self.leaves[place]) for place in self.data}
        data = tuple(Rows(layout, rows.index).take(self.leaves[place]) for place, layout in placed.items())
        parameter = self.leaves[self.position]

        def pull(cotangent: Tensor, *sample: Tensor) -> Tensor:
            leaves = list(self.leaves)
            for (place, layout), value in zip(placed.items(), sample, strict=True):
                leaves[place] = _batch_of_one(value, layout)

            def function(w: Tensor) -> Tensor:
                leaves[self.position] = w
                args, kwargs = pytree.tree_unflatten(leaves, self.spec)
                return self.function(*args, **kwargs)

            return torch.func.vjp(function, parameter)[1](_batch_of_one(cotangent, rows.layout))[0]

        return Pullback(pull, grad, data, shape)


def _layout_like(layout: Layout, tensor: Tensor) -> Layout:
    """The layout of an argument, given that of the output: the same where the shape admits it."""
    possible = layouts(tensor.shape, layout.n, range(tensor.dim()))
    similar = [other for other in possible if other.strided == layout.strided]
    return layout if layout in possible else (similar or possible)[0]


def _batch_of_one(sample: Tensor, layout: Layout) -> Tensor:
    return sample.unsqueeze(layout.axis) if layout.factor == 1 else sample
