"""The states of all random number generators that a run may draw from."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from backpack.dataset.checkpoint import State


class Randomness:
    """The generators of PyTorch, Python and NumPy, and those that a loader has of its own."""

    def __init__(self, loader: Any) -> None:
        sampler = getattr(loader, "sampler", None)
        generators = (getattr(loader, "generator", None), getattr(sampler, "generator", None))
        self._own = list({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())

    def read(self) -> State:
        """The states of all generators."""
        state: State = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "own": [generator.get_state() for generator in self._own],
            "python": random.getstate(),
        }
        if "numpy" in sys.modules:
            numbers = sys.modules["numpy"].random.get_state(legacy=False)
            state["numpy"] = {**numbers, "state": {**numbers["state"], "key": numbers["state"]["key"].tolist()}}
        return state

    def write(self, state: State) -> None:
        """Go back to states that were read."""
        torch.set_rng_state(state["cpu"])
        for number, value in enumerate(state["cuda"]):
            torch.cuda.set_rng_state(value, number)
        for generator, value in zip(self._own, state["own"], strict=True):
            generator.set_state(value)
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        if "numpy" in state:
            import numpy

            numbers = state["numpy"]
            key = numpy.array(numbers["state"]["key"], dtype=numpy.uint32)
            numpy.random.set_state({**numbers, "state": {**numbers["state"], "key": key}})
