"""Proves that a model mixes no samples: regions that belong to no sample are free of data."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Module

from backpack.graph import Edge, Graph, kind, read, saved
from backpack.modules.calls import Note, run_on_fewer
from backpack.samples.layouts import Scattered
from backpack.samples.mixing import Saved, described, mixer_at, without_history
from backpack.samples.owners import Owners
from backpack.torch_internals import memory_of


def possible_mixer(
    graph: Graph,
    owners: Owners,
    entries: Iterable[Node],
    notes: Mapping[Edge, Note],
    n: int | None,
    for_all: Container[int],
) -> str | None:
    """What may mix samples, where no proof says that nothing does; ``None``: there is a proof.

    A region is free of data if each tensor that its nodes saved is a parameter or buffer, has no size that ``n``
    samples could have, or stays the same when the module runs on one sample less. ``n`` is ``None`` where samples are
    no rows of the inputs. ``for_all``: memory of inputs for all samples.
    """
    for node in owners.sends:
        if kind(node) == "NativeBatchNorm" and saved(node, "training"):
            layout = owners.owned[node, 0]
            if layout.axes != [1] and not (isinstance(layout, Scattered) and layout.of_all is not None):
                return described(node, graph)
    constants = Constants(notes)
    rerun: Rerun | None = None
    for entry in entries:
        for node in graph.behind([entry]):
            for found in without_history(node):
                if _may_hold(found[2], n) and found[2] not in constants:
                    rerun = rerun or (None if n is None else Rerun(graph, notes, n, for_all))
                    if rerun is None or not rerun.is_same(found):
                        return mixer_at(entry, graph, owners)
                    constants.add(found[2])
    return None


def holds_computed_values(graph: Graph, entries: Iterable[Node], notes: Mapping[Edge, Note]) -> bool:
    """Whether data may be behind these nodes: numbers that no parameters were used for, and that are no constants."""
    constants = Constants(notes)
    return any(
        tensor.is_floating_point() and tensor.dim() > 0 and tensor not in constants
        for node in graph.behind(entries)
        for _, _, tensor in without_history(node)
    )


def _may_hold(tensor: Tensor, n: int | None) -> bool:
    return any(size and size % (n or 1) == 0 for size in tensor.shape)


KEPT = 2**16
"""Largest number of entries of a tensor whose values are kept to recognize it."""

_same: WeakKeyDictionary[Module, list[Tensor]] = WeakKeyDictionary()
"""For each module, tensors whose values stayed the same when it ran on one sample less."""


class Constants:
    """Tensors of modules that are no data: parameters, buffers, copies of them, and tensors that were added."""

    def __init__(self, notes: Mapping[Edge, Note]) -> None:
        modules = [*dict.fromkeys(module for note in notes.values() if (module := note.module()) is not None)]
        self._known: list[Tensor] = _same.setdefault(modules[0], []) if modules else []
        self._tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        self._storages = {memory_of(t) for t in self._tensors}

    def __contains__(self, tensor: Tensor) -> bool:
        if memory_of(tensor) in self._storages:
            return True
        similar = (t for t in (*self._tensors, *self._known) if t.shape == tensor.shape and t.dtype == tensor.dtype)
        return any(torch.equal(t, tensor) for t in similar)

    def add(self, tensor: Tensor) -> None:
        """Recognize these values from now on."""
        if tensor.numel() <= KEPT:
            self._known.append(tensor.detach().clone())
            del self._known[:-64]


@dataclass(eq=False)
class Rerun:
    """The graph of a module that ran once more, on one sample less."""

    graph: Graph
    notes: Mapping[Edge, Note]
    n: int
    for_all: Container[int]
    pairs: dict[Node, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for edge, note in self.notes.items():
            tensor = note.outputs(run_on_fewer(note, self.n, with_graph=True, whole=self.for_all))
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                self._pair(edge[0], tensor.grad_fn)

    def _pair(self, one: Node, other: Node) -> None:
        edges = read([GradientEdge(other, 0)]).edges
        pending = [(one, other)]
        while pending:
            one, other = pending.pop()
            if one in self.pairs or one.name() != other.name():
                continue
            self.pairs[one] = other
            following = zip(self.graph.edges[one], edges[other], strict=False)
            pending += [(a, b) for (a, _), (b, _) in following if a is not None and b is not None]

    def is_same(self, found: Saved) -> bool:
        """Whether the node saved the same values in this run."""
        node, name, tensor = found
        other = self.pairs.get(node)
        values = {} if other is None else {key: value for _, key, value in without_history(other)}
        return name in values and values[name].shape == tensor.shape and torch.equal(values[name], tensor)
