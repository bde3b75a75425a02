"""Sums and products with a parameter that is expanded: position tables, learned scales, gates, class tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backpack.nodes.registry import Place, form
from backpack.samples import AnyLayout, Rows
from backpack.uses import Cotangents, ElementwiseUse, Individual, Use


def _shift(place: Place, sign: int = 1) -> Use | None:
    own = place.aligned()
    return None if own is None else ElementwiseUse(own, sign=sign)


def _scale(place: Place, factor: Tensor | None) -> Use | None:
    own = place.aligned()
    if own is None or factor is None:
        return None
    return ElementwiseUse(own, factor.expand(place.out))


@form("Add")
def add(place: Place) -> Use | None:
    return _shift(place) if place.k == 0 or place.saved("alpha") == 1 else None


@form("Sub")
def sub(place: Place) -> Use | None:
    if place.k == 0:
        return _shift(place)
    return _shift(place, -1) if place.saved("alpha") == 1 else None


@form("Mul")
def mul(place: Place) -> Use | None:
    return _scale(place, place.saved("other" if place.k == 0 else "self"))


@form("Expand")
def expand(place: Place) -> Use | None:
    return _shift(place)


@form("Where")
def where(place: Place) -> Use | None:
    condition = place.saved("condition")
    return _scale(place, condition if place.k == 0 else ~condition)


@form("PreluKernel")
def prelu(place: Place) -> Use | None:
    own = place.aligned()
    if place.k != 1 or own is None:
        return None
    return ElementwiseUse(own, place.saved("self"), _negative_part)


def _negative_part(x: Tensor) -> Tensor:
    return x.clamp(max=0)


@dataclass(eq=False)
class RepeatUse(Use):
    """An input that is repeated along its axes: a shift, where repetitions and entries have axes of their own."""

    split: tuple[int, ...]
    layout: AnyLayout
    shift: ElementwiseUse

    def arrive(self, cotangents: Cotangents, rows: Rows, shape: torch.Size, dtype: torch.dtype) -> Individual:
        grad = cotangents[0]
        apart = grad.reshape(grad.shape[0], *self.split)
        return self.shift.arrive(Cotangents({0: apart}), Rows(self.layout, rows.index), shape, dtype)


@form("Repeat")
def repeat(place: Place) -> Use | None:
    lack = len(place.out) - len(place.shape)
    sizes = [*[1] * lack, *place.shape]
    split = tuple(size for total, own in zip(place.out, sizes, strict=True) for size in (total // max(own, 1), own))
    layout = place.layout.reshaped(place.out, split)
    own = tuple(size for own in sizes for size in (1, own))
    if layout is None or 0 in sizes or any(own[axis] != 1 for axis in layout.axes):
        return None
    return RepeatUse(split, layout, ElementwiseUse(own))
