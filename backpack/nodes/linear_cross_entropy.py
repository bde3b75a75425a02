"""PyTorch's linear layer fused with cross entropy, which computes logits for some rows at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

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
        logits = F.linear(x, self.matrix, self.bias)
        return (logits.float() if logits.element_size() < 4 else logits).softmax(1)

    def from_target(self, outer: Tensor, x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """The cotangents ``[v, r, classes]`` of the logits, given those of the terms ``[v, r]`` and their weights."""
        probability = self.probability(x)
        scale = (outer * weight).to(probability.dtype).unsqueeze(2)
        index = target.clamp(0, len(self.matrix) - 1)[None, :, None].expand(len(outer), -1, 1)
        return (scale * probability).scatter_add(2, index, -scale)


def weights_of(target: Tensor, ignore_index: int, weight: Tensor | None, reduction: str, like: Tensor) -> Tensor:
    """What the term of each row is multiplied by in the loss: zero if it is ignored."""
    counted = target != ignore_index
    own = counted.to(like.dtype)
    if weight is not None:
        own = own * weight.to(like.dtype)[target.where(counted, target.new_zeros(()))]
    return own / own.sum() if reduction == "mean" else own


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
    weight = weights_of(target, ignored, loss.weight, str(loss.reduction), x)  # type: ignore[arg-type]
    return _use(place, head_of(loss), (x, target, weight))


@form(f"{PREFIX}_no_reduction_default", rows_of=0)
def by_rows(place: Place) -> Use | None:
    x, matrix, target, bias, weight = place.node.saved_tensors  # type: ignore[attr-defined]
    ignored = place.node._ignore_index  # type: ignore[attr-defined]
    return _use(place, Head(matrix, bias), (x, target, weights_of(target, ignored, weight, "none", x)))


def head_of(loss: torch.nn.Module) -> Head:
    """The linear layer in a ``LinearCrossEntropyLoss``."""
    linear = loss.linear
    assert isinstance(linear, torch.nn.Linear)
    with torch.no_grad():
        bias = None if linear.bias is None else linear.bias.detach()
        return Head(linear.weight.detach(), bias)
