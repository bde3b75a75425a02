"""Linear maps: ``torch.nn.functional.linear``, ``addmm``, products with a matrix, bilinear maps."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack.operations.registry import EXPANDED, Operation, rule
from backpack.uses import DenseUse, ElementwiseUse

EXPANDED.add(F.multi_head_attention_forward)


def rows_of(x: Tensor) -> Tensor:
    """``[n, ..., i]`` to ``[n, 1, s, i]``."""
    return x.reshape(x.shape[0], 1, -1, x.shape[-1])


def grad_rows_of(grad: Tensor) -> Tensor:
    """``[v, n, ..., o]`` to ``[v, n, 1, s, o]``."""
    return grad.reshape(*grad.shape[:2], 1, -1, grad.shape[-1])


def leading_axes(out: Tensor) -> tuple[int, ...]:
    """All axes but the last."""
    return tuple(range(out.dim() - 1))


def shift(out: Tensor, bias: Tensor | None, axis: int = -1) -> ElementwiseUse:
    """A bias along one axis of the output, or of one entry for all of it."""
    padded = [1] * out.dim()
    padded[axis] = out.shape[axis] if bias is None else bias.numel()
    return ElementwiseUse(tuple(padded))


@rule(F.linear)
def linear(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Operation | None:
    if weight.dim() != 2:
        return None
    use = DenseUse((input,), rows_of, grad_rows_of, apply=partial(F.linear, input))
    return Operation(leading_axes(out), [(weight, use), (bias, shift(out, bias))])


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def matmul(out: Tensor, input: Tensor, other: Tensor) -> Operation | None:
    if other.dim() != 2 or input.dim() < 2:
        return None
    use = DenseUse((input,), rows_of, grad_rows_of, flipped=True, apply=partial(torch.matmul, input))
    return Operation(leading_axes(out), [(other, use)])


@rule(torch.addmm, Tensor.addmm)
def addmm(out: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, **scale: Any) -> Operation | None:
    if scale or input.dim() != 1:
        return None
    use = DenseUse((mat1,), rows_of, grad_rows_of, flipped=True, apply=partial(torch.mm, mat1))
    return Operation((0,), [(mat2, use), (input, shift(out, input))])


@rule(F.bilinear)
def bilinear(out: Tensor, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Operation:
    def pairs(x: Tensor, y: Tensor) -> Tensor:
        return rows_of((x.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2))

    use = DenseUse((input1, input2), pairs, grad_rows_of, apply=partial(F.bilinear, input1, input2))
    return Operation(leading_axes(out), [(weight, use), (bias, shift(out, bias))])
