"""Interrupted runs: what is needed to go on, in one safetensors file that is replaced as a whole."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from backpack.extensions.backprop_extension import BackpropExtension


def identity(
    model: Module, lossfunc: Module, extensions: Iterable[BackpropExtension], **further: object
) -> dict[str, str]:
    """What two runs must have in common for one to go on where the other ended."""
    shapes = {name: [*value.shape, str(value.dtype)] for name, value in model.state_dict().items()}
    return {
        "model": f"{type(model).__name__}, state {hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]}",
        "weights of the model": _digest(model),
        "training mode": str(sorted(name for name, module in model.named_modules() if module.training)),
        "loss": f"{lossfunc!r}, reduction {getattr(lossfunc, 'reduction', None)}, weights {_digest(lossfunc)}",
        "extensions": "; ".join(map(describe, extensions)),
        **{name.replace("_", " "): str(value) for name, value in further.items()},
    }


def describe(extension: BackpropExtension) -> str:
    """An extension with all its options."""
    options = {k: v for k, v in sorted(vars(extension).items()) if k not in ("subset", "rules")}
    rules = {module.__name__: type(rule).__name__ for module, rule in extension.rules.items()}
    return f"{type(extension).__name__}({options}, rules={rules}, subsampling={extension.subset.key})"


def _digest(module: Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted((*module.named_parameters(), *module.named_buffers())):
        local = value.to_local() if hasattr(value, "to_local") else value
        digest.update(name.encode())
        digest.update(local.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


class Randomness:
    """The states of all random number generators that a run may draw from."""

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


@dataclass(eq=False)
class Checkpoint:
    """A file that a run is saved to at intervals.

    Args:
        path: Of the file; a run with the same ``identity`` goes on from it.
        seconds: Between two times that it is written, at least.
    """

    path: Path
    seconds: float
    identity: dict[str, str]
    written: float = field(default_factory=time.monotonic)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was saved last; ``None`` if there is nothing.

        Raises:
            ValueError: It is of another run, or no checkpoint.
        """
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                header = json.loads((file.metadata() or {})["backpack"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{self.path} is no checkpoint of accumulate(): {error}.") from error
        before = header.pop("identity")
        for name in sorted(before.keys() | self.identity.keys()):
            if before.get(name) != self.identity.get(name):
                raise ValueError(
                    f"The checkpoint {self.path} is of another run: its {name} was {before.get(name)}, now it is "
                    f"{self.identity.get(name)}. Delete the file to begin anew, or give another one."
                )
        return tensors, header

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self.written >= self.seconds

    def save(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        """Replace the file as a whole: at any moment there is the old one or the new one.

        Raises:
            OSError: It cannot be written; the old one is still there.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        new = self.path.with_name(self.path.name + ".new")
        metadata = {"backpack": json.dumps({**header, "identity": self.identity})}
        try:
            save_file(_separate(tensors), new, metadata)
            _synchronize(new)
            os.replace(new, self.path)
            _synchronize(self.path.parent)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                new.unlink()
            raise OSError(
                f"The checkpoint {self.path} could not be written: {error}. "
                + ("What was saved before is intact." if self.path.exists() else "Nothing was computed yet.")
            ) from error
        self.written = time.monotonic()


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, and none of them a view of another one's memory, which the format does not have."""
    found, storages = {}, set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != value.nbytes:
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        found[name] = value
    return found


def _synchronize(path: Path) -> None:
    """Have the system write a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
