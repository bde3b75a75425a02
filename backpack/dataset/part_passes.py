"""Runs the passes of ``accumulate()`` over the data set, for one part of the parameters after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from backpack.dataset.accumulated import Accumulated
from backpack.dataset.batch_pass import BatchPass
from backpack.dataset.batches import Batches, require_two_readings
from backpack.dataset.checkpoint import State
from backpack.dataset.collection import Collection
from backpack.dataset.dataset_pass import DatasetPass, own_path
from backpack.dataset.identity import digest_of, identity
from backpack.dataset.parts import Parts, divided, owners_of, refuse_joint, sizes_of
from backpack.dataset.processes import Processes
from backpack.dataset.randomness import Randomness
from backpack.dataset.store_files import StoreFiles
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.modules.forward_hooks import EXTENDED
from backpack.modules.parameters import name_of


@dataclass(eq=False)
class PartPasses:
    """What ``accumulate`` was called with, and its passes.

    ``folder``: for results of single samples; ``device``: that results are moved to; ``seconds``: least time between
    two savings of the ``checkpoint``; ``began``: the state of the generators before the first batch.
    """

    model: Module
    lossfunc: Any
    dataloader: Iterable[Any]
    extensions: tuple[BackpropExtension, ...]
    forward: Callable[[Module, Any], tuple[Tensor, Any]] | None
    denominator: Callable[[Any], float] | None
    sample_ids: Callable[[Any], Any] | None
    scaler: Any
    processes: Processes
    folder: Path | None
    device: torch.device | None
    checkpoint: Path | None
    seconds: float
    gather: bool
    progress: bool | None
    owners: Mapping[str, int] | None = None
    began: State | None = None

    def __post_init__(self) -> None:
        self.random = Randomness(self.dataloader)

    def all_parts(self, parts: Parts, store: Path | None, sharded: bool) -> Accumulated:
        """Compute one part after the other, and join the results."""
        second = tuple(e if e.beforehand() is None else e.given({}) for e in self.extensions)
        whole = Collection(self.model, second)  # refuses what cannot be, before a long pass
        parameters = whole.parameters
        names = divided(parameters, self.extensions, parts)
        if len(names) > 1:
            refuse_joint(self.extensions)
            require_two_readings(self.dataloader, f"{len(names)} parts take as many passes")
        if sharded:
            self.owners = owners_of(names, sizes_of(parameters, self.extensions), self.processes.count)
        files = None if store is None else self._files(store, whole, names)
        found = [self._part(number, names, files) for number in range(len(names))]
        if len({part.samples for part in found}) > 1:
            raise RuntimeError(
                f"The data had {' and '.join(str(part.samples) for part in found)} samples when they were read for one "
                f"part of the parameters after the other: let each pass over the loader give the same data."
            )
        return found[0] if len(found) == 1 else self._joined(found, parameters)

    def _files(self, store: Path, whole: Collection, names: Sequence[Sequence[str]]) -> StoreFiles:
        if whole.joined:
            raise ValueError(
                f"store= is for results of the data set, and those in .{', .'.join(whole.joined)} are of single "
                f"samples: compute them in a call of their own, with stream=."
            )
        batches = Batches(self.dataloader, 0, self.processes)
        own = identity(
            self.model,
            self.lossfunc,
            self.extensions,
            number_of_batches=batches.count(),
            number_of_samples=batches.samples(),
            number_of_processes=self.processes.count,
            parts=f"{[*map(len, names)]} parameters, names {digest_of(names)}",
            sharded=self.owners is not None,
        )
        shards = dict.fromkeys(self.processes.all_objects(own["weights of the model"]))
        own["weights of the model"] = " ".join(shards)  # the same for all processes, of a sharded model as well
        return StoreFiles(store, own, whole.parameters, self.processes, self.random)

    def _joined(self, found: Sequence[Accumulated], parameters: Mapping[str, Tensor]) -> Accumulated:
        """The results of all parts, in the order of the model, which are on the parameters as well."""
        grads = {name: grad for part in found for name, grad in part.grad.items()}
        results: dict[str, dict[str, Any]] = {}
        for savefield in found[0].results:
            own = {name: value for part in found for name, value in part.results[savefield].items()}
            results[savefield] = {name: own[name] for name in parameters if name in own}
            for name, value in own.items():
                setattr(parameters[name], savefield, value)
        in_order = {name: grads[name] for name in parameters if name in grads}
        return Accumulated(found[0].loss, found[0].samples, in_order, results, found[0].places)

    def _part(self, number: int, names: Sequence[Sequence[str]], files: StoreFiles | None) -> Accumulated:
        """Compute one part, or read from the files what an earlier call has computed of it."""
        own = names[number]
        path = self.checkpoint
        if path is not None and len(names) > 1:
            path = path.with_name(f"{path.name}.part-{number + 1}-of-{len(names)}")
        if files is not None and files.has(own):
            found = files.read(own)
        else:
            found = self._computed(own, len(names) > 1, path, files)
        if files is not None and path is not None:
            for checkpoint in (path, self._beforehand(path)):
                own_path(checkpoint, self.processes).unlink(missing_ok=True)
        return found

    def _computed(
        self, names: Sequence[str], are_part: bool, path: Path | None, files: StoreFiles | None
    ) -> Accumulated:
        if self.began is not None:
            self.random.write(self.began)
        only = names if are_part else None
        run = self._pass(self._with_bases(only, path), only, self.folder, path)
        self.began = run.began
        found = run.results(self.gather, self.owners)
        if files is not None:
            files.write([name for name in names if self._writes(name)], found)
        return found

    @staticmethod
    def _beforehand(path: Path) -> Path:
        return path.with_name(f"{path.name}.beforehand")

    def _writes(self, name: str) -> bool:
        return self.processes.rank == (0 if self.owners is None else self.owners[name])

    def _with_bases(self, only: Sequence[str] | None, path: Path | None) -> tuple[BackpropExtension, ...]:
        """The extensions, after a pass that computes what some of them need beforehand."""
        ahead = {e: needed for e in self.extensions if (needed := e.beforehand()) is not None}
        if not ahead:
            return self.extensions
        require_two_readings(self.dataloader, f"{' and '.join(type(e).__name__ for e in ahead)} takes two passes")
        path = path and self._beforehand(path)
        with_gradients = any(extension.seeds is None for extension in ahead.values())
        first = self._pass(tuple(ahead.values()), only, None, path, with_gradients)
        found = first.results(True, self.owners).results
        first.collection.clear()
        first.random.write(first.began)
        parameters = first.collection.parameters
        given = {}
        for extension in ahead:
            bases = extension.between(found.pop(extension.savefield))
            bases = bases if self.owners is None else self.processes.from_owners(bases, self.owners)
            given[extension] = extension.given({name_of(parameters[name]): value for name, value in bases.items()})
        return tuple(given.get(e, e) for e in self.extensions)

    def _pass(
        self,
        extensions: tuple[BackpropExtension, ...],
        only: Sequence[str] | None,
        folder: Path | None,
        path: Path | None,
        with_gradients: bool = True,
    ) -> DatasetPass:
        """One pass over the data, for these parameters; ``None``: all."""
        collection = Collection(self.model, extensions, self.device, True, only)
        batch_pass = BatchPass(self.model, self.lossfunc, collection, self.forward, self.denominator, self.scaler)
        batch_pass.with_gradients = with_gradients
        batches = Batches(self.dataloader, EXTENDED[self.model].batch_axis, self.processes, self.sample_ids)
        run = DatasetPass(batch_pass, batches, self.random)
        if path is not None:
            further = {} if only is None else {"parameters": only}
            run.save_to(path, self.seconds, folder_for_results=folder, **further)
        with torch.enable_grad():
            run.prepare(folder)
            run.compute(self.progress)
        return run
