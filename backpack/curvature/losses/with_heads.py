"""Losses with a linear layer in them: second order sees the layer, and a loss of its outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import CrossEntropyLoss

from backpack.modules.loss_calls import WITH_HEADS, LossCall
from backpack.modules.thread_state import muted


def without_head(call: LossCall) -> LossCall:
    """The call of ``CrossEntropyLoss`` with logits, for that of ``LinearCrossEntropyLoss``; others as they are.

    Raises:
        RuntimeError: A tensor that the loss was computed from was overwritten.
    """
    loss = call.loss
    if not isinstance(loss, WITH_HEADS):
        return call
    call.require_unchanged()
    with torch.enable_grad(), muted():
        logits = _logits(loss, call.input)
    return replace(
        call, loss=cross_entropy_of(loss), input=logits, edge=get_gradient_edge(logits), is_certain=True, versions=[]
    )


def cross_entropy_of(loss: Any) -> CrossEntropyLoss:
    """The loss of the logits."""
    ignored = -100 if loss.ignore_index is None else loss.ignore_index
    return CrossEntropyLoss(loss.weight, None, ignored, None, loss.reduction, loss.label_smoothing)


def _logits(loss: Any, x: Tensor) -> Tensor:
    logits: Tensor = loss.linear(x)
    return logits.reshape(*x.shape[:-1], loss.num_classes, *loss.out_features)
