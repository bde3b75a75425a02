"""Recurrent layers and cells, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from backpack.uses.replay import Linear

Step = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]
"""Gates of the input, gates of the state, and the state, to the new state; its first tensor is the output."""


def _lstm_step(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    xr, xz, xn = x.chunk(3, -1)
    hr, hz, hn = h.chunk(3, -1)
    z = (xz + hz).sigmoid()
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return ((state[0] - n) * z + n,)  # as PyTorch writes it: its parts have second derivatives of their own


def _tanh_step(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((x + h).tanh(),)


def _relu_step(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((x + h).relu(),)


STEPS: dict[Any, Step] = {
    torch.lstm: _lstm_step,
    torch.gru: _gru_step,
    torch.rnn_tanh: _tanh_step,
    torch.rnn_relu: _relu_step,
    torch.lstm_cell: _lstm_step,
    torch.gru_cell: _gru_step,
    torch.rnn_tanh_cell: _tanh_step,
    torch.rnn_relu_cell: _relu_step,
}


def direction(
    step: Step,
    linear: Linear,
    x: Tensor,
    state: tuple[Tensor, ...],
    weights: Sequence[Tensor],
    biased: bool,
    back: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction over ``x[n, t, i]``: its outputs ``[n, t, h]`` and last state."""
    w_ih, w_hh = weights[:2]
    b_ih, b_hh = weights[2:4] if biased else (None, None)
    projection = weights[-1] if len(weights) == (5 if biased else 3) else None
    gates = linear(x, w_ih, b_ih).unbind(1)
    outputs = []
    for gate in reversed(gates) if back else gates:
        state = step(gate, linear(state[0], w_hh, b_hh), state)
        if projection is not None:
            state = (linear(state[0], projection), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if back else outputs, 1), state
