"""Sums and products that a parameter is broadcast in: position tables, learned scales, gates, class tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backpack.operations.registry import Operation, rule
from backpack.uses import ElementwiseUse


def _own(out: Tensor, parameter: Any) -> tuple[int, ...] | None:
    """The parameter's sizes at the axes of the output."""
    if not isinstance(parameter, Tensor):
        return None
    return (*[1] * (out.dim() - parameter.dim()), *parameter.shape)


def _broadcast(out: Tensor, uses: list[tuple[Any, ElementwiseUse | None]]) -> Operation:
    known = [(tensor, use) for tensor, use in uses if use is not None]
    return Operation(tuple(range(out.dim())), known, broadcast=True)


def _shift(out: Tensor, parameter: Any, sign: int = 1) -> ElementwiseUse | None:
    own = _own(out, parameter)
    return None if own is None else ElementwiseUse(own, sign=sign)


def _scale(out: Tensor, parameter: Any, other: Any) -> ElementwiseUse | None:
    own = _own(out, parameter)
    if own is None or not isinstance(other, Tensor):
        return None
    return ElementwiseUse(own, other.expand(out.shape))


@rule(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
def add(out: Tensor, input: Any, other: Any, *, alpha: float = 1) -> Operation | None:
    if alpha != 1:
        return None
    return _broadcast(out, [(input, _shift(out, input)), (other, _shift(out, other))])


@rule(torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__)
def sub(out: Tensor, input: Any, other: Any, *, alpha: float = 1) -> Operation | None:
    if alpha != 1:
        return None
    return _broadcast(out, [(input, _shift(out, input)), (other, _shift(out, other, -1))])


@rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def mul(out: Tensor, input: Any, other: Any) -> Operation | None:
    return _broadcast(out, [(input, _scale(out, input, other)), (other, _scale(out, other, input))])


@rule(Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to)
def expand(out: Tensor, input: Tensor, *sizes: Any, **kwargs: Any) -> Operation:
    return _broadcast(out, [(input, _shift(out, input))])


@rule(Tensor.repeat)
def repeat(out: Tensor, input: Tensor, *sizes: Any, **kwargs: Any) -> Operation | None:
    own = _own(out, input) or ()
    if any(before not in (1, after) for before, after in zip(own, out.shape, strict=True)):
        return None
    return _broadcast(out, [(input, _shift(out, input))])
