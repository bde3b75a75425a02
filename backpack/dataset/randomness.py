"""The states of all random number generators that a run may draw from."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import torch
from torch import Tensor


class Randomness:
    """Of PyTorch, Python, NumPy, and those of a loader's own."""

    def __init__(self, loader: Any) -> None:
        sampler = getattr(loader, "sampler", None)
        generators = (getattr(loader, "generator", None), getattr(sampler, "generator", None))
        self._own = list({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())

    def read(self) -> tuple[dict[str, Tensor], str]:
        """Tensors, and JSON."""
        tensors = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors |= {f"cuda{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
        tensors |= {f"own{number}": generator.get_state() for number, generator in enumerate(self._own)}
        other: dict[str, Any] = {"python": random.getstate()}
        if "numpy" in sys.modules:
            state = sys.modules["numpy"].random.get_state(legacy=False)
            other["numpy"] = {**state, "state": {**state["state"], "key": state["state"]["key"].tolist()}}
        return tensors, json.dumps(other)

    def write(self, tensors: dict[str, Tensor], text: str) -> None:
        """Go back to states that were read."""
        torch.set_rng_state(tensors["cpu"])
        for name, state in tensors.items():
            if name.startswith("cuda"):
                torch.cuda.set_rng_state(state, int(name[4:]))
            elif name.startswith("own"):
                self._own[int(name[3:])].set_state(state)
        other = json.loads(text)
        version, internal, gauss = other["python"]
        random.setstate((version, tuple(internal), gauss))
        if "numpy" in other:
            import numpy

            state = other["numpy"]
            state["state"]["key"] = numpy.array(state["state"]["key"], dtype=numpy.uint32)
            numpy.random.set_state(state)
