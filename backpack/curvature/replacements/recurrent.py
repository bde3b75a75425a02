"""Fused recurrent layers and cells, replaced by their steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack.curvature.replacements.registry import REPLACED
from backpack.nodes.recurrent_steps import STEPS, Step, direction
from backpack.uses.replay import Linear


def _layers(step: Step, options: dict[str, Any], weights: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    directions = 2 if options["bidirectional"] else 1
    each = len(weights) // (options["num_layers"] * directions)

    def function(linear: Linear, x: Tensor, *state: Tensor) -> Sequence[Tensor]:
        x = x if options["batch_first"] else x.transpose(0, 1)
        last: list[tuple[Tensor, ...]] = []
        for layer in range(options["num_layers"]):
            outputs = []
            for back in range(directions):
                place = layer * directions + back
                own = weights[place * each : (place + 1) * each]
                start = tuple(s[place] for s in state)
                out, end = direction(step, linear, x, start, own, options["has_biases"], bool(back))
                outputs.append(out)
                last.append(end)
            x = torch.cat(outputs, -1)
        out = x if options["batch_first"] else x.transpose(0, 1)
        return (out, *(torch.stack(states) for states in zip(*last, strict=True)))

    return function


def _options(
    has_biases: Any, num_layers: int, dropout: float, train: bool, bidirectional: bool, batch_first: Any = None
) -> dict[str, Any] | None:
    """What the steps depend on; ``None``: they are not written out for packed sequences, and unseen dropout."""
    if batch_first is None or not isinstance(has_biases, bool) or (dropout > 0 and train and num_layers > 1):
        return None
    options = {"num_layers": num_layers, "bidirectional": bidirectional}
    return options | {"has_biases": has_biases, "batch_first": batch_first}


def _whole_replaced(step: Step) -> Callable[..., Any]:
    def layer(input: Tensor, hx: Any, params: Any, has_biases: Any, *rest: Any) -> Any:
        given = _options(has_biases, *rest)
        if given is None:
            return NotImplemented
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        return tuple(_layers(step, given, params)(F.linear, input, *states))

    return layer


def _cell_replaced(step: Step) -> Callable[..., Any]:
    def cell(input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        found = step(F.linear(input, w_ih, b_ih), F.linear(states[0], w_hh, b_hh), states)
        return found if len(states) > 1 else found[0]

    return cell


for _function, _step in STEPS.items():
    if _function.__name__.endswith("_cell"):
        REPLACED[_function] = _cell_replaced(_step)
    else:
        REPLACED[_function] = _whole_replaced(_step)
