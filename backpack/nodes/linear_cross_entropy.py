"""PyTorch's linear layer fused with cross entropy, which computes logits for some rows at a time.

In second order, what is pulled back from the logits ``z`` of a row is often ``s (p - e_i)``, with ``p`` the softmax, a
factor ``s`` and a class ``i``. Its *code* is ``(s, s i)``: two numbers, which may be multiplied by a factor as the
column itself. ``HeadInCodes`` takes the place of the linear layer, and codes that of the cotangents of logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from backpack.memory import at_a_time
from backpack.modules.loss_calls import LOSS, LossCall
from backpack.nodes.registry import Place, form
from backpack.uses import RowsUse, Use

PREFIX = "GeneratedBackwardFor_torch_nn__linear_cross_entropy_batch_chunked"


@dataclass(eq=False)
class Head:
    """Logits ``x W^T + b`` of rows ``x``, and their softmax."""

    matrix: Tensor
    bias: Tensor | None

    def probability(self, x: Tensor) -> Tensor:
        """``[r, i]`` to ``[r, classes]``; of data types of 16 bits in ``float32``."""
        logits = F.linear(x.to(self.matrix.dtype), self.matrix, self.bias)
        return (logits.float() if logits.element_size() < 4 else logits).softmax(1)

    def from_target(self, outer: Tensor, x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """The cotangents ``[v, r, classes]`` of the logits, given those of the terms ``[v, r]`` and their weights."""
        index = target.clamp(0, len(self.matrix) - 1).expand(len(outer), -1)
        return self._columns(x, outer * weight, index)

    def from_code(self, code: Tensor, x: Tensor) -> Tensor:
        """The cotangents ``[v, r, classes]`` of the logits, given their codes ``[v, r, 2]``."""
        return self._columns(x, *self.decoded(code))

    def _columns(self, x: Tensor, scale: Tensor, index: Tensor) -> Tensor:
        probability = self.probability(x)
        scale = scale.to(probability.dtype).unsqueeze(2)
        return (scale * probability).scatter_add(2, index.unsqueeze(2), -scale)

    def decoded(self, code: Tensor) -> tuple[Tensor, Tensor]:
        """The factors and the classes of codes ``[..., 2]``; a factor of zero goes with any class."""
        scale, product = code.unbind(-1)
        return scale, (product / scale).nan_to_num().round().clamp(0, len(self.matrix) - 1).long()

    def probabilities(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The softmax of some rows at a time, with these rows."""
        step = max(1, at_a_time("cotangents", self.matrix.device) // len(self.matrix))
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            yield rows, self.probability(x[rows])

    def mean(self, x: Tensor) -> Tensor:
        """``W^T p`` for each row, ``[r, i]``."""
        found = torch.empty_like(x)
        for rows, probability in self.probabilities(x):
            found[rows] = probability.to(self.matrix.dtype) @ self.matrix
        return found


class HeadInCodes(torch.autograd.Function):
    """Zeros ``[r, 2]`` of rows ``[r, i]`` and a head, which take codes as their cotangents.

    Of a code ``(s, s i)``, a row gets ``s (W^T p - w_i)``. The gradients of the head are left to the form.
    """

    takes_several = True
    """Under ``torch.vmap``, ``backward`` takes several cotangents at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, matrix, bias, Head(matrix, bias).mean(x))
        return x.new_zeros(len(x), 2, dtype=torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, code: Tensor) -> tuple[Tensor, None, None]:
        x, matrix, bias, mean = ctx.saved_tensors
        scale, index = Head(matrix, bias).decoded(code)
        return scale.to(x.dtype).unsqueeze(1) * (mean - F.embedding(index, matrix)), None, None


def weights_of_targets(target: Tensor, ignore_index: int, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight of each target's class: one without class weights, zero where the target is ignored."""
    counted = target != ignore_index
    own = counted.to(dtype)
    return own if weight is None else own * weight.to(dtype)[target.where(counted, target.new_zeros(()))]


def _use(place: Place, head: Head, rows: tuple[Tensor, Tensor, Tensor]) -> Use | None:
    return RowsUse(rows, head.from_target, is_shift=place.k > 1) if place.k else None


@form(f"{PREFIX}_default", rows_of=0)
def summed(place: Place) -> Use | None:
    """The function saves its results alone. What they are computed from is known of an extended loss."""
    noted = place.node.metadata.get(LOSS)  # type: ignore[attr-defined]
    if noted is None:
        return None
    call: LossCall = noted[1]
    call.require_unchanged()
    loss, (target,) = call.loss, call.further_arguments
    x, target = torch.atleast_2d(call.input.detach()), target.reshape(-1)
    ignored = -100 if loss.ignore_index is None else int(loss.ignore_index)  # type: ignore[arg-type]
    weight = weights_of_targets(target, ignored, loss.weight, x.dtype)  # type: ignore[arg-type]
    weight = weight / weight.sum() if loss.reduction == "mean" else weight
    return _use(place, head_of(loss), (x, target, weight))


@form(f"{PREFIX}_no_reduction_default", rows_of=0)
def by_rows(place: Place) -> Use | None:
    x, matrix, target, bias, weight = place.node.saved_tensors  # type: ignore[attr-defined]
    ignored = place.node._ignore_index  # type: ignore[attr-defined]
    return _use(place, Head(matrix, bias), (x, target, weights_of_targets(target, ignored, weight, x.dtype)))


@form(HeadInCodes)
def in_codes(place: Place) -> Use | None:
    x, matrix, bias, _ = place.node.saved_tensors  # type: ignore[attr-defined]
    return RowsUse((x,), Head(matrix, bias).from_code, is_shift=place.k > 1) if place.k else None


def head_of(loss: torch.nn.Module) -> Head:
    """The linear layer in a ``LinearCrossEntropyLoss``."""
    linear = loss.linear
    assert isinstance(linear, torch.nn.Linear)
    with torch.no_grad():
        bias = None if linear.bias is None else linear.bias.detach()
        return Head(linear.weight.detach(), bias)
