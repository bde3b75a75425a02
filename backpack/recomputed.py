"""Activation checkpointing: what was recorded in a region that is computed again is dropped, and comes back with it.

``torch.utils.checkpoint`` (not reentrant) frees what a region keeps, and runs it again when the backward pass needs the
first of it. The inputs of calls that were recorded in the region are freed as well; the second run records the same
calls, in the same order, and theirs take their place until they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_map

from backpack.compat import checkpointed_region
from backpack.engine import HERE, Block, muted
from backpack.recorder import Call, Parameters, Recording, Source, among, is_start
from backpack.samples import Rows
from backpack.uses import Individual, PullbackUse, Use


@dataclass(eq=False)
class Dropped(Use):
    """A use, of this kind, whose inputs are freed until its region is computed again."""

    kind: type[Use]

    def bind(self, grad: Tensor, rows: Rows, shape: torch.Size) -> Individual:
        raise RuntimeError(
            "A parameter's individual gradients need an input that activation checkpointing has freed, and its region "
            "was not computed again. Use the parameter outside of the checkpointed region."
        )


@dataclass(eq=False)
class Region:
    """The calls of one checkpointed region, and what is needed to record them again."""

    home: list[Block]
    n: int | None
    replace: bool
    sources: dict[int, Source]
    data: dict[int, ref[Tensor]]
    calls: list[ref[Call]] = field(default_factory=list)

    def run(self, recompute: Callable[..., None], *args: Any) -> None:
        """Compute the region again; within a block, or where functions were replaced, with a recording."""
        unwanted = HERE.muted or not (HERE.blocks or self.home)
        with muted():
            if unwanted and not self.replace:
                recompute(*args)
                return
            found: dict[Call, None] = {}
            with Again(self, args, partial(_note, found)):
                recompute(*args)
        if len(found) != len(self.calls):
            raise RuntimeError(
                f"A checkpointed region used parameters {len(self.calls)} times, and {len(found)} times when "
                f"it was computed again: it must do the same in both."
            )
        for reference, again in zip(self.calls, found, strict=True):
            call = reference()
            if call is not None and call.recomputed and not unwanted:
                pairs = zip(call.uses, again.uses, strict=True)
                call.uses, call.versions = [(source, use) for (source, _), (_, use) in pairs], again.versions


class Again(Recording):
    """The recording of a region that is computed again: its tensors are not held by their graph."""

    def __init__(self, region: Region, args: tuple[Any, ...], note: Callable[..., None]) -> None:
        super().__init__(Parameters(), args, 0, note, {}, region.replace)
        self.sources, self.n = dict(region.sources), region.n
        self.data.update(region.data)
        self._attached = any(block.grad_mode for block in (HERE.blocks or region.home)[-1:])

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any, tensors: list[Tensor], *rest: Any) -> None:
        if not self._attached:
            args, kwargs = tree_map(self._detached, (args, kwargs))
            tensors = among(args, kwargs)
        super()._record(func, args, kwargs, out, tensors, *rest)

    def _detached(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) in self.sources or not value.requires_grad:
            return value
        found = value.detach()
        self.data[id(found)] = ref(found)
        return found


def _note(found: dict[Call, None], call: Call, *_: Any) -> None:
    """A call of the region itself; one in a region within belongs to that."""
    if droppable(call) and checkpointed_region() is None:
        found[call] = None


REGIONS: WeakKeyDictionary[Any, Region] = WeakKeyDictionary()


def droppable(call: Call) -> bool:
    """Whether a call's inputs come back: of parameters themselves, and where autograd keeps the inputs as well."""
    return (
        all(source.tensor.grad_fn is None for source in call.sources)
        and not any(isinstance(use, PullbackUse) for _, use in call.uses)
        and any(isinstance(use, Dropped) or use.recorded() for _, use in call.uses)
    )


def is_dropped(call: Call) -> bool:
    """Whether inputs of a call are still to come."""
    return any(isinstance(use, Dropped) for _, use in call.uses)


def drop(call: Call) -> None:
    """Free a call's inputs."""
    call.uses = [(source, Dropped(type(use)) if use.recorded() else use) for source, use in call.uses]
    call.versions = []


def free_if_recomputed(call: Call, recording: Recording, out: Tensor) -> None:
    """Free the inputs of a call that is made in a checkpointed region.

    But not where a pull-back may stop at its output ``out``, so that nothing would be computed again: its inputs need
    no gradient, and are mostly the model's.
    """
    frame = checkpointed_region()
    if frame is None or not droppable(call):
        return
    if frame not in REGIONS:
        sources = {key: source for key, source in recording.sources.items() if source.tensor.grad_fn is None}
        region = Region(HERE.blocks, recording.n, recording.replace, sources, recording.data)
        REGIONS[frame] = region
        frame.recompute_fn, frame.early_stop = partial(region.run, frame.recompute_fn), False
    region = REGIONS[frame]
    if all(known() is not call for known in region.calls[-1:]):  # of several outputs, the first
        region.calls.append(ref(call))
        if is_start(get_gradient_edge(out)):
            return
        call.recomputed = True
        call.edges = [[get_gradient_edge(d) if d.requires_grad else None for d in use.data()] for _, use in call.uses]
        drop(call)
