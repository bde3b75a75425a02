"""``z = w * f + ...``, the parameter broadcast against the output: scales (``f`` given) and shifts (``f = 1``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backpack.samples import Rows
from backpack.uses.base import Individual, flat
from backpack.uses.complex_numbers import conjugated, squared
from backpack.uses.second_moments import gram_of_outputs, squares_of_outputs
from backpack.uses.use import SamplewiseUse


@dataclass(eq=False)
class Explicit(Individual):
    """Individual gradients that are stored as they are, ``value[v, n, *p]``."""

    value: Tensor
    summed: bool = False
    """Whether they are the cotangents of a call's output, summed over all axes that the parameter lacks."""

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.value.shape[2:]

    @property
    def device(self) -> torch.device:
        return self.value.device

    @property
    def size(self) -> tuple[int, int]:
        return self.value.shape[0], self.value.shape[1]

    @property
    def is_complex(self) -> bool:
        return self.value.is_complex()

    @property
    def is_small(self) -> bool:
        return True

    def _narrow(self, start: int, stop: int) -> Explicit:
        return Explicit(self.value[:, start:stop])

    def scaled(self, factor: Tensor) -> Explicit:
        return Explicit(self.value * factor.reshape(-1, *[1] * len(self.shape)))

    def weighted_total(self, factor: Tensor) -> Tensor:
        return torch.tensordot(factor.to(self.value.dtype), self.value.sum(0), 1)

    def _dense(self) -> Tensor:
        return self.value

    def closed(self, name: str, swept: bool = False) -> Tensor | None:
        if not self.summed:
            return None
        if name == "sum_squares" and self.weights is None and not self.is_complex:
            return squares_of_outputs(self, flat(self.value)).sum(0).reshape(self.shape)
        if name != "norms":
            return None
        return self.share(("norms", self.shape.numel()), lambda: flat(squared(self.value)).sum(2))

    def chunks(self) -> Iterator[Explicit]:
        yield self

    def dots(self, other: Individual) -> Tensor:
        if other is self and self.summed and not self.is_complex:
            return gram_of_outputs(self, flat(self.value)).clone()
        return torch.einsum("vnp,wmp->vnwm", flat(self.value), flat(other.dense()))


@dataclass(eq=False)
class ElementwiseUse(SamplewiseUse):
    """A parameter of shape ``padded`` (one size per axis of the output) that is broadcast to the output.

    It is multiplied by ``factor(x, *more)``, or by ``x`` itself, of the output's shape; without ``x``, by ``sign``.
    """

    padded: tuple[int, ...]
    x: Tensor | None = None
    factor: Callable[..., Tensor] | None = None
    sign: int = 1
    more: tuple[Tensor, ...] = ()

    def forward(self) -> Callable[[Tensor, torch.Size], Tensor]:
        def change(vector: Tensor, shape: torch.Size) -> Tensor:
            vector = vector.reshape(self.padded)
            if self.x is not None:
                vector = vector * (self.x if self.factor is None else self.factor(self.x, *self.more))
            return (vector if self.sign > 0 else -vector).expand(shape)

        return change

    def bind(self, grad: Tensor, rows: Rows, shape: torch.Size) -> Explicit:
        if self.x is not None:
            grad = grad * conjugated(self._factor(self.x, rows, grad.dtype))
        return self._reduce(grad, rows, shape, summed=self.x is None and self.sign > 0)

    def squares(self, total: Tensor, rows: Rows, shape: torch.Size) -> Tensor:
        """The sum of squares ``[n, *p]`` over cotangents that have one entry each, from the sum of squares of these.

        The latter is ``total[1, n, ...]``.
        """
        if self.x is not None:
            total = total * self._factor(self.x, rows, total.dtype).square()
        return replace(self, sign=1)._reduce(total, rows, shape).value[0]

    def _factor(self, x: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        """What the parameter is multiplied by in the rows of these samples."""
        x, *more = (rows.take(tensor).to(dtype) for tensor in (x, *self.more))
        return x if self.factor is None else self.factor(x, *more)

    def _reduce(self, grad: Tensor, rows: Rows, shape: torch.Size, summed: bool = False) -> Explicit:
        own = rows.layout.split_sizes(self.padded)
        lacking = [axis for axis, size in enumerate(own, start=2) if size == 1 and grad.shape[axis] != 1]
        grad = grad.sum(lacking) if lacking else grad
        return Explicit((grad if self.sign > 0 else -grad).reshape(*grad.shape[:2], *shape), summed)


@dataclass(eq=False)
class GroupNormScaleUse(ElementwiseUse):
    """The scale of a group normalization of ``x[n, c, *spatial]``; ``more``: mean and scale of groups, ``[n, g]``."""

    def bind(self, grad: Tensor, rows: Rows, shape: torch.Size) -> Explicit:
        if self.x is None or torch.is_grad_enabled() or grad.dtype.itemsize < 4:
            return super().bind(grad, rows, shape)
        x, mean, scale = (rows.take(tensor).to(grad.dtype) for tensor in (self.x, *self.more))
        axis = mean.dim()  # the first one of an image
        if x.dim() == axis:
            return super().bind(grad, rows, shape)
        products, sums = torch.linalg.vecdot(grad.flatten(axis + 1), x.flatten(axis)), grad.flatten(axis + 1).sum(-1)
        products, sums = (found.unflatten(-1, (mean.shape[-1], -1)) for found in (products, sums))
        found = (products - mean.unsqueeze(-1) * sums) * scale.unsqueeze(-1)
        return Explicit(found.reshape(*grad.shape[:2], -1, shape.numel()).sum(2))
