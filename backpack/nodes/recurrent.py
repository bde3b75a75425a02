"""Fused recurrent layers: the function of a node, a whole layer, runs again step by step, as linear maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack.nodes.recurrent_steps import STEPS, direction
from backpack.nodes.registry import Place, form
from backpack.samples import Layout, Rows
from backpack.uses import Cotangents, Individual, Use, join
from backpack.uses.replay import Linear, Replay

LSTM = 2
"""The mode that the node of an LSTM saves."""


@dataclass(eq=False)
class RecurrentUse(Use):
    """Weight ``k - 1`` of a node that is one direction of a layer. All uses of the node share one replay."""

    node: Node
    k: int
    replay: Replay
    weights: list[Tensor]

    def arrive(self, cotangents: Cotangents, rows: Rows, shape: torch.Size, dtype: torch.dtype) -> Individual:
        replay, weights = vars(cotangents).setdefault("replays", {}).setdefault(self.node, (self.replay, self.weights))
        return join(replay.individuals(cotangents, rows, dtype)[id(weights[self.k - 1])])


@form("MkldnnRnnLayer")
def lstm(place: Place) -> Use | None:
    """``[t, n, ...]`` of inputs and outputs."""
    biased, back = place.saved("has_biases"), place.saved("reverse")
    if (
        place.layout != Layout(place.layout.n, 1)
        or place.saved("mode") != LSTM
        or not 1 <= place.k <= (4 if biased else 2)
    ):
        return None
    weights = [place.saved(f"weight{number}") for number in range(4 if biased else 2)]
    x, *state = (place.saved(name) for name in ("input", "hx_", "cx_"))

    def function(linear: Linear, x: Tensor, *state: Tensor) -> Sequence[Tensor]:
        start = tuple(s.reshape(-1, s.shape[-1]) for s in state)
        out, end = direction(STEPS[torch.lstm], linear, x.transpose(0, 1), start, weights, biased, back)
        return (out.transpose(0, 1), *(s.reshape(given.shape) for s, given in zip(end, state, strict=True)))

    inputs = [(x, 1), *((s, s.dim() - 2) for s in state)]
    replay = Replay(function, inputs, [axis for _, axis in inputs])
    return RecurrentUse(place.node, place.k, replay, weights)
