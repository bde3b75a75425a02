"""A file with the state of a run, which is replaced as a whole and read only by a run with the same identity."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TENSOR = "tensor of the file"
"""Key of a dictionary that stands for a tensor in JSON."""

State = dict[str, Any]
"""Tensors and what JSON can hold, in nested dictionaries and lists."""


@dataclass(eq=False)
class Checkpoint:
    """A safetensors file that the state of a run is saved to at intervals.

    Args:
        path: The file.
        seconds: The least time between two savings.
        identity: What a run must have in common with the one that wrote the file to go on from it, by name.
        remedy: What to do about a file of another run.
        unwritten: What it means if the file cannot be written for the first time.
    """

    path: Path
    seconds: float
    identity: dict[str, str]
    remedy: str = "Delete the file to begin anew, or give another one."
    unwritten: str = "Nothing was computed yet."
    written: float = field(default_factory=time.monotonic)

    def load(self) -> State | None:
        """The state that was saved last; ``None`` if there is none.

        Raises:
            ValueError: The file is of another run, or no checkpoint.
        """
        return self._load(self.path) if self.path.exists() else None

    def load_written(self) -> State | None:
        """The state that ``write`` had written before the run was killed, if the file is complete."""
        with suppress(OSError, ValueError):
            return self._load(self._new)
        return None

    def _load(self, path: Path) -> State:
        state = read(path)
        before = state.pop("identity")
        for name in sorted(before.keys() | self.identity.keys()):
            if before.get(name) != self.identity.get(name):
                raise ValueError(
                    f"The checkpoint {path} is of another run: its {name} was {before.get(name)}, now it is "
                    f"{self.identity.get(name)}. {self.remedy}"
                )
        return state

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self.written >= self.seconds

    @property
    def _new(self) -> Path:
        return self.path.with_name(self.path.name + ".new")

    def write(self, state: State) -> None:
        """Write a new file beside the old one.

        Raises:
            OSError: It cannot be written; the old one is still there.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}

        def named(tensor: Tensor) -> dict[str, Any]:
            name, pairs = str(len(tensors)), tensor.is_complex()  # of which the format does not know all types
            tensors[name] = torch.view_as_real(tensor.resolve_conj()) if pairs else tensor
            return {TENSOR: name, "pairs": pairs}

        metadata = {"backpack": json.dumps({**state, "identity": self.identity}, default=named)}
        with self._intact():
            try:
                save_file(_separate(tensors), self._new, metadata)
                _synchronize(self._new)
            except (OSError, SafetensorError):
                with suppress(OSError):
                    self._new.unlink()
                raise

    def replace(self) -> None:
        """Put the new file in the place of the old one, in one step: at any moment there is one of them.

        Raises:
            OSError: It cannot be done; the old file is still there.
        """
        with self._intact():
            os.replace(self._new, self.path)
            _synchronize(self.path.parent)
        self.written = time.monotonic()

    @contextmanager
    def _intact(self) -> Iterator[None]:
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"The checkpoint {self.path} could not be written: {error}. "
                + ("What was saved before is intact." if self.path.exists() else self.unwritten)
            ) from error


def read(path: Path, tensors: bool = True) -> State:
    """What a file holds, with the ``identity`` of the run that wrote it; without ``tensors``, ``None`` in their place.

    Raises:
        ValueError: It is no such file, or not all of one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {})["backpack"]
            found = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is no checkpoint of accumulate(): {error}.") from error

    def tensor_of(entry: dict[str, Any]) -> Any:
        if TENSOR not in entry:
            return entry
        tensor = found.get(entry[TENSOR])
        return torch.view_as_complex(tensor) if tensor is not None and entry["pairs"] else tensor

    state: State = json.loads(text, object_hook=tensor_of)
    return state


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, none of them a view of another one's memory, which the format does not know."""
    found: dict[str, Tensor] = {}
    storages: set[torch.UntypedStorage] = set()
    for name, value in tensors.items():
        own = value.detach().cpu().contiguous()
        if own.untyped_storage() in storages or own.untyped_storage().nbytes() != own.nbytes:
            own = own.clone()
        storages.add(own.untyped_storage())
        found[name] = own
    return found


def _synchronize(path: Path) -> None:
    """Have the system write a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
