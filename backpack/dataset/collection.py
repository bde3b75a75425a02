"""What the batches of a process, and then all processes, have given for each extension and parameter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from backpack.dataset.processes import Processes
from backpack.dataset.stores import FileRows, Rows, Sums
from backpack.engine import SHARDED
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.merging import Joined, Summed

GRAD = "grad"


@dataclass(eq=False)
class Part:
    """An extension for one batch: the number of its factor in the loss of all, and its samples among the selected.

    ``places`` is ``None`` where nothing of the batch is wanted.
    """

    extension: BackpropExtension
    factor: float
    places: Tensor | None


@dataclass(eq=False)
class Collection:
    """Results by parameter name and ``savefield``, merged as they come.

    Args:
        model: Whose parameters are looked at.
        extensions: As users gave them.
        device: Where results are kept; ``None``: where they are computed.
    """

    model: Module
    extensions: tuple[BackpropExtension, ...]
    device: torch.device | None = None
    sums: dict[tuple[str, str], Sums] = field(default_factory=dict)
    rows: dict[tuple[str, str], Rows | FileRows] = field(default_factory=dict)
    selected: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for extension in self.extensions:
            part = extension.on_batch(None, 1.0)
            if extension.rules and part.rules is not extension.rules:
                raise ValueError(
                    f"{type(extension).__name__} has rules of users, which say nothing of what it needs to know of a "
                    f"batch for its result of several."
                )
            if part.batches is None:
                raise ValueError(
                    f"{type(extension).__name__} has no meaning for more than one batch: its results do not merge."
                )
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("The model has no parameter that requires a gradient.")
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.selected = self.selected or {extension.savefield: 0 for extension in self.extensions}

    def clear(self) -> None:
        """Take results of earlier backward passes off the parameters."""
        for parameter in self.parameters.values():
            for extension in self.extensions:
                vars(parameter).pop(extension.savefield, None)

    def merging(self, savefield: str) -> Any:
        """How the results of an extension merge."""
        if savefield == GRAD:
            return Summed(1)
        return next(e for e in self.extensions if e.savefield == savefield).on_batch(None, 1.0).batches

    def name_of(self, parameter: Tensor) -> str | None:
        """The name of a parameter of the model, or of the sharded one that it was gathered from."""
        reference = SHARDED.get(parameter) if SHARDED else None
        return self.names.get(id(parameter if reference is None else reference()))

    def take(self, parameters: Iterable[Tensor], parts: Iterable[Part]) -> None:
        """Take the results of a batch off parameters."""
        for parameter in parameters:
            for part in parts:
                result = vars(parameter).pop(part.extension.savefield, None)
                name = None if result is None else self.name_of(parameter)
                if name is not None and part.places is not None:
                    self.keep(name, part.extension.savefield, part.extension.batches, result, part.factor, part.places)

    def keep(
        self, name: str, savefield: str, merging: Any, result: Any, factor: float, places: Tensor | None = None
    ) -> None:
        """Merge one result."""
        if isinstance(merging, Joined):
            assert places is not None
            store = self.rows.setdefault((name, savefield), Rows())
            store.add(merging.rows(result, factor), places, self.device)
        else:
            sums = self.sums.setdefault((name, savefield), Sums(merging))
            sums.add(result, factor, 0 if places is None else len(places), self.device)

    def finish(
        self, processes: Processes, factor: float, selected: dict[str, int], gather: bool
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
        """The results of all processes by ``savefield`` and name, on the parameters as well, and their places.

        Args:
            processes: Whose results are merged.
            factor: Of the loss of all, by which nothing was multiplied yet.
            selected: How many samples all processes have for each extension.
            gather: Bring results of single samples to all processes.
        """
        found: dict[str, dict[str, Any]] = {GRAD: {}, **{extension.savefield: {} for extension in self.extensions}}
        forms: dict[tuple[str, str], list[Any]] = {}
        for own in processes.all_objects({key: sums.form() for key, sums in self.sums.items()}):
            forms |= own
        for (name, savefield), form in sorted(forms.items(), key=lambda entry: entry[0]):
            sums = self.sums.pop((name, savefield), None) or Sums(self.merging(savefield))
            if processes.count > 1:
                sums.reduce(form, processes)
            found[savefield][name] = sums.merging.finish(sums.state, factor, selected.get(savefield, 0))
        places: dict[str, Tensor] = {}
        for (_, savefield), store in self.rows.items():  # those of parameters that all batches use are complete
            if isinstance(store, Rows):
                known = torch.cat(store.places)
                if len(known) > len(places.get(savefield, ())):
                    places[savefield] = known
        whole = {e.savefield for e in self.extensions if type(e).of_whole is not BackpropExtension.of_whole}
        for name, savefield in sorted(set().union(*processes.all_objects([*self.rows]))):
            store = self.rows.pop((name, savefield), None) or Rows()
            if isinstance(store, FileRows):
                store.flush()
                processes.all_objects(None)  # the others have written theirs as well
                if not store.path.exists():
                    continue
                rows = store.finish()
            elif processes.count == 1 or gather or savefield in whole:
                if processes.count > 1:
                    store.gather(processes)
                rows = store.finish(torch.arange(selected[savefield]))
                places.pop(savefield, None)
            elif store.chunks:
                rows = store.finish(places[savefield])
            else:
                continue
            found[savefield][name] = self.merging(savefield).finish(rows, factor)
        for extension in self.extensions:
            for name, value in found[extension.savefield].items():
                found[extension.savefield][name] = extension.of_whole(value)
                setattr(self.parameters[name], extension.savefield, found[extension.savefield][name])
        return found, places


def part_of(
    extension: BackpropExtension, chosen: Tensor | None, start: int, samples: int, factor: float, scale: float
) -> Part:
    """What to compute of the ``samples`` from number ``start`` on.

    Args:
        extension: As the user gave it.
        chosen: The numbers of those selected, of all data; ``None``: all.
        start: Number of the first sample.
        samples: How many there are.
        factor: With which the loss of these samples enters that of all.
        scale: By which it is multiplied before ``backward()``, which second order does not see.
    """
    if extension.seeds is None:
        factor /= scale
    if chosen is None:
        return Part(extension.on_batch(None, factor), factor, torch.arange(start, start + samples))
    own = chosen - start
    places = ((own >= 0) & (own < samples)).nonzero().flatten()
    if len(places) == 0:
        return Part(extension.on_batch([0], factor), factor, None)
    return Part(extension.on_batch(own[places].tolist(), factor), factor, places)
