"""Results in a folder, each parameter's in a file of its own, which is written as soon as its part is complete."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import Tensor

from backpack.dataset.accumulated import Accumulated
from backpack.dataset.checkpoint import Checkpoint, State
from backpack.dataset.processes import Processes
from backpack.dataset.randomness import Randomness
from backpack.modules.parameters import is_transposed_kernel, listed
from backpack.utils.kroneckers import Eigen

REMEDY = "Give an empty folder as store=, or delete this one to begin anew."


def file_of(folder: Path, name: str) -> Path:
    """The file of a parameter."""
    return folder / f"{quote(name, safe='')}.safetensors"


def file_of_run(folder: Path, rank: int | str, count: int | str) -> Path:
    """The file that says what run a process belongs to; with a space in its name, so that no parameter has it."""
    return folder / f"run {rank} of {count}.safetensors"


@dataclass(eq=False)
class StoreFiles:
    """The files that a run writes.

    Args:
        folder: The folder, common to all processes.
        identity: What a later call must have in common with the one that wrote the files to go on from them.
        parameters: All parameters of the model that have results, by name.
        processes: The processes of the run.
        random: The generators, which go back to where an earlier call began.

    Raises:
        ValueError: The folder has files of another run.
    """

    folder: Path
    identity: dict[str, str]
    parameters: Mapping[str, Tensor]
    processes: Processes
    random: Randomness

    def __post_init__(self) -> None:
        path = file_of_run(self.folder, self.processes.rank, self.processes.count)
        run = self._checkpoint(path)
        state = run.load()
        if state is not None:
            self.random.write(state["began"])
        else:
            there = [name for name in self.parameters if file_of(self.folder, name).exists()]
            if there:
                raise ValueError(
                    f"store={str(self.folder)!r} has files of another run, as those of {listed(there)}. {REMEDY}"
                )
            self.processes.all_objects(None)  # no process writes before all have looked
            run.write({"began": self.random.read(), "names": list(self.parameters)})
            run.replace()
        self.processes.all_objects(None)

    def _checkpoint(self, path: Path) -> Checkpoint:
        return Checkpoint(path, 0.0, self.identity, REMEDY, "The files of earlier parts are intact.")

    def has(self, names: Iterable[str]) -> bool:
        """Whether the files of some parameters are there."""
        return self.processes.same(lambda: all(file_of(self.folder, name).exists() for name in names))

    def write(self, names: Iterable[str], found: Accumulated) -> None:
        """Write the results of some parameters, which then leave memory."""
        for name in names:
            parameter = self.parameters[name]
            results = {field: _named(own[name], field) for field, own in found.results.items() if name in own}
            checkpoint = self._checkpoint(file_of(self.folder, name))
            checkpoint.write(
                {
                    "loss": found.loss,
                    "samples": found.samples,
                    "grad": found.grad.get(name),
                    "shape": list(parameter.shape),
                    "transposed": is_transposed_kernel(parameter),
                    "results": results,
                }
            )
            checkpoint.replace()
        for savefield in found.results:
            for parameter in self.parameters.values():
                vars(parameter).pop(savefield, None)
        found.results.clear()
        self.processes.all_objects(None)

    def read(self, names: Iterable[str]) -> Accumulated:
        """Loss, number of samples and gradient, from the files of a part that is complete."""
        states = {name: self._checkpoint(file_of(self.folder, name)).load() or {} for name in names}
        first: State = next(iter(states.values()))
        devices = {name: self.parameters[name].device for name in states}
        grads = {name: state["grad"].to(devices[name]) for name, state in states.items() if state["grad"] is not None}
        return Accumulated(first["loss"].to(next(iter(devices.values()))), first["samples"], grads)


def _named(result: Any, savefield: str) -> Any:
    """A result in a form that a file can hold."""
    if isinstance(result, Eigen):
        return result._asdict()
    if isinstance(result, Tensor) or (isinstance(result, list) and all(isinstance(own, Tensor) for own in result)):
        return result
    raise TypeError(
        f"store= holds tensors, lists of tensors and eigendecompositions, and the results in .{savefield} are of type "
        f"{type(result).__name__}: leave store= out."
    )
