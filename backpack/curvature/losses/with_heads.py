"""Losses with a linear layer in them: second order sees the layer, and a loss of its outputs.

These are logits, or, for columns that consist of a softmax and one class for each row, the codes of such columns
(``nodes/linear_cross_entropy.py``), which do without the logits of all rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import Linear

from backpack.backward.block import without_autocast
from backpack.curvature.losses.in_codes import LinearCrossEntropyLoss, cross_entropy_of
from backpack.modules.loss_calls import WITH_HEADS, LossCall
from backpack.modules.thread_state import muted
from backpack.nodes.linear_cross_entropy import HeadInCodes

CLASSES = 2**20
"""Classes up to which their numbers are exact in codes."""


def without_head(call: LossCall, in_codes: bool = False) -> LossCall:
    """The call of ``CrossEntropyLoss`` with logits, for that of ``LinearCrossEntropyLoss``; others as they are.

    ``in_codes``: with codes instead of logits.

    Raises:
        RuntimeError: A tensor that the loss was computed from was overwritten.
    """
    loss = call.loss
    if not isinstance(loss, WITH_HEADS):
        return call
    call.require_unchanged()
    with torch.enable_grad(), muted():
        x = _codes(loss, call.input) if in_codes else _logits(loss, call.input)
    found = replace(call, input=x, edge=get_gradient_edge(x), is_certain=True, versions=[])
    if in_codes:
        return replace(found, loss=LinearCrossEntropyLoss(call))
    return replace(found, loss=cross_entropy_of(loss))


def has_codes(call: LossCall, seeds: str) -> bool:
    """Whether columns of this kind, at the logits of a loss with a head, have codes."""
    if not isinstance(call.loss, WITH_HEADS) or seeds not in ("sampled", "gradient"):
        return False
    loss: Any = call.loss
    is_plain = isinstance(loss.linear, Linear) and not loss.out_features and loss.num_classes <= CLASSES
    is_of_classes = not any(target.is_floating_point() for target in call.further_arguments)
    return bool(is_plain and is_of_classes and not (seeds == "gradient" and loss.label_smoothing))


def _logits(loss: Any, x: Tensor) -> Tensor:
    logits: Tensor = loss.linear(x.to(loss.linear.weight.dtype))
    return logits.reshape(*x.shape[:-1], loss.num_classes, *loss.out_features)


def _codes(loss: Any, x: Tensor) -> Tensor:
    linear, rows = loss.linear, x.reshape(-1, x.shape[-1])
    with without_autocast(x.device):
        codes: Tensor = HeadInCodes.apply(rows.to(linear.weight.dtype), linear.weight, linear.bias)
    return codes
