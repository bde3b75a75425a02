"""``z = f(w, x)`` for any function: the vector-Jacobian product of the function itself, sample by sample."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from backpack.samples import AnyLayout, Layout, Rows, layout_like
from backpack.uses.base import Individual, Use, push_forward
from backpack.uses.elementwise import Explicit


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

    ``held`` says which other leaves hold samples; those of ``spread`` do if what is said of them holds by then.
    """

    function: Callable[..., Tensor]
    leaves: list[Any]
    spec: Any
    position: int
    held: list[int]
    spread: Sequence[tuple[int, Callable[[], bool]]]

    @property
    def places(self) -> list[int]:
        """The leaves that hold samples."""
        return self.held + [place for place, holds in self.spread if holds()]

    def recorded(self) -> tuple[Tensor, ...]:
        return (self.leaves[self.position], *(self.leaves[place] for place in self.places))

    def bind(self, grad: Tensor, rows: Rows, shape: torch.Size) -> Pullback:
        pull, data = self._pull(rows)
        return Pullback(partial(pull, self.leaves[self.position]), grad, data, shape)

    def data(self) -> tuple[Tensor, ...]:
        return tuple(self.leaves[place] for place in self.places)

    def varied(self, grad: Tensor, rows: Rows, shape: torch.Size, place: int, direction: Tensor) -> Explicit:
        pull, data = self._pull(rows)
        parameter = self.leaves[self.position].detach()

        def move(along: Tensor, cotangent: Tensor, *sample: Tensor) -> Tensor:
            def moved(x: Tensor) -> Tensor:
                return pull(parameter, cotangent, *sample[:place], x, *sample[place + 1 :])

            return push_forward(moved, sample[place], along)

        return Explicit(map_samples(move, direction, (grad[0], *(d.detach() for d in data))))

    def curvature(self, grad: Tensor, rows: Rows, directions: Callable[[], Tensor]) -> Tensor | None:
        function, data = self._function(rows)
        data = tuple(d.detach() for d in data)
        parameter = self.leaves[self.position].detach()
        with torch.enable_grad():
            point = parameter.clone().requires_grad_()
            output = function(point, *(d[0] for d in data))
            (found,) = torch.autograd.grad(output, point, torch.ones_like(output), create_graph=True)
        if not found.requires_grad:
            return None
        pull, _ = self._pull(rows)

        def quadratic(cotangent: Tensor, direction: Tensor, *sample: Tensor) -> Tensor:
            moved = push_forward(lambda w: pull(w, cotangent, *sample), parameter, direction)
            return (moved * direction).sum()

        columns = [map_samples(quadratic, grad, (u.expand(grad.shape[1], *u.shape), *data))[0] for u in directions()]
        return torch.stack(columns, 1)

    def _function(self, rows: Rows) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """The function of the parameter and of one sample's data, and the data of all."""
        assert isinstance(rows.layout, Layout)
        placed = {place: layout_like(rows.layout, self.leaves[place]) for place in self.places}
        data = tuple(Rows(layout, rows.index).take(self.leaves[place]) for place, layout in placed.items())

        def function(parameter: Tensor, *sample: Tensor) -> Tensor:
            leaves = list(self.leaves)
            for (place, layout), value in zip(placed.items(), sample, strict=True):
                leaves[place] = _batch_of_one(value, layout)
            leaves[self.position] = parameter
            args, kwargs = pytree.tree_unflatten(leaves, self.spec)
            return self.function(*args, **kwargs)

        return function, data

    def _pull(self, rows: Rows) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """The vector-Jacobian product of one sample with respect to the parameter, and the data of all."""
        function, data = self._function(rows)

        def pull(parameter: Tensor, cotangent: Tensor, *sample: Tensor) -> Tensor:
            product = torch.func.vjp(lambda w: function(w, *sample), parameter)[1]
            return product(_batch_of_one(cotangent, rows.layout))[0]

        return pull, data


def _batch_of_one(sample: Tensor, layout: AnyLayout) -> Tensor:
    return sample.unsqueeze(layout.axis) if isinstance(layout, Layout) and layout.factor == 1 else sample
