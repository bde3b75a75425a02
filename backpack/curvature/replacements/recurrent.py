"""Fused recurrent layers and cells, replaced by their steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack.curvature.replacements.twice_differentiable import REPLACED
from backpack.nodes.recurrent_steps import STEPS, Step, direction


def _states(hx: Any) -> tuple[Tensor, ...]:
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


def _layers(
    step: Step,
    input: Tensor,
    hx: Any,
    params: Any,
    has_biases: Any,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: Any = None,
) -> Any:
    """A recurrent layer with the arguments of ``torch.lstm``; packed sequences and dropout are not replaced."""
    if batch_first is None or not isinstance(has_biases, bool) or (dropout > 0 and train and num_layers > 1):
        return NotImplemented
    directions = 2 if bidirectional else 1
    each = len(params) // (num_layers * directions)
    x = input if batch_first else input.transpose(0, 1)
    last: list[tuple[Tensor, ...]] = []
    for layer in range(num_layers):
        outputs = []
        for back in range(directions):
            place = layer * directions + back
            own = params[place * each : (place + 1) * each]
            start = tuple(state[place] for state in _states(hx))
            out, end = direction(step, F.linear, x, start, own, has_biases, bool(back))
            outputs.append(out)
            last.append(end)
        x = torch.cat(outputs, -1)
    out = x if batch_first else x.transpose(0, 1)
    return (out, *(torch.stack(states) for states in zip(*last, strict=True)))


def _cell(step: Step, input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
    """One step, with the arguments of ``torch.lstm_cell``."""
    states = _states(hx)
    found = step(F.linear(input, w_ih, b_ih), F.linear(states[0], w_hh, b_hh), states)
    return found if len(states) > 1 else found[0]


for _function, _step in STEPS.items():
    REPLACED[_function] = partial(_cell if _function.__name__.endswith("_cell") else _layers, _step)
