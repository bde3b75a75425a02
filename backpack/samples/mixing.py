"""Finds where samples are mixed: in regions that belong to no sample, but depend on data and not only on parameters."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Module

from backpack.graph import LEAF, Edge, Graph, kind, read, saved, tensor_names, variable_of
from backpack.graph.saved import kept
from backpack.modules.calls import Note, run_on_fewer
from backpack.modules.parameters import PARAMETERS
from backpack.samples.layouts import Scattered
from backpack.samples.owners import Owners
from backpack.torch_internals import memory_of

DRAWN = ("NativeDropout",)
"""Kinds of nodes that save the random numbers that they draw."""

Saved = tuple[Node, str, Tensor]
"""A node, and what it saved under a name."""


def mixed_data(
    graph: Graph, owners: Owners, entries: Iterable[Node], calls: Sequence[Note], n: int | None
) -> tuple[dict[Node, str], set[int]]:
    """The entries of regions in which data are, with what mixes the samples there; and the memory of shared inputs.

    ``entries``: nodes through which cotangents enter regions that belong to no sample; shared inputs are those that are
    for all samples. ``n`` is ``None`` where samples are no rows of the inputs.
    """
    inputs = {
        memory_of(tensor): (call, place)
        for call in calls
        for place, tensor in enumerate(call.inputs)
        if n is None or (tensor.dim() and tensor.shape[call.axis_of(tensor)] != 1)
    }
    found: dict[Node, str] = {}
    known: dict[Node, bool] = {}
    by_samples: dict[int, bool] = {}
    own: set[int] = set()
    for entry in entries:
        for node in graph.behind([entry]):
            if node not in known:
                known[node] = False
                for storage in {memory_of(tensor) for _, _, tensor in without_history(node)}:
                    if storage in inputs and storage not in by_samples:
                        own = own or {memory_of(held) for one in owners.sends for _, _, held in without_history(one)}
                        by_samples[storage] = n is None or storage in own or not _is_for_all(*inputs[storage], n)
                    known[node] = known[node] or by_samples.get(storage, False)
            if known[node]:
                found[entry] = _mixer(entry, graph, owners)
                break
    return found, {storage for storage, is_one in by_samples.items() if not is_one}


_for_all: WeakKeyDictionary[Module, dict[Any, bool]] = WeakKeyDictionary()
"""Which arguments of a module are for all samples, by place, shape and number of samples."""


def _is_for_all(call: Note, place: int, n: int) -> bool:
    """Whether an input has no sample's rows, but is for all of them: the module takes it whole with one sample less."""
    module = call.module()
    if module is None or len(call.inputs) < 2:
        return False
    known = _for_all.setdefault(module, {})
    key = (place, tuple(call.inputs[place].shape), n)
    if key not in known:
        fewer = call.outputs(run_on_fewer(call, n, whole={memory_of(call.inputs[place])}))
        known[key] = isinstance(fewer, Tensor) and n - 1 in fewer.shape and n not in fewer.shape[:1]
    return known[key]


def unproved(
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
                        return _mixer(entry, graph, owners)
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


def without_history(node: Node) -> Iterator[Saved]:
    """The tensors that a node saved, without its own result and tensors that are computed from parameters."""
    if node.name() == LEAF or kind(node) in DRAWN:
        return
    values = [(name, saved(node, name)) for name in tensor_names(node) if not name.startswith("result")]
    if isinstance(node, BackwardCFunction):  # a user's function, which may also keep tensors as attributes
        with kept(node):
            values += [(f"tensor {k}", value) for k, value in enumerate(node.saved_tensors)]
        values += list(vars(node).items())
    for name, value in values:
        for tensor in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(tensor, Tensor) and not tensor.requires_grad:
                yield node, name, tensor


def _may_hold(tensor: Tensor, n: int | None) -> bool:
    return any(size and size % (n or 1) == 0 for size in tensor.shape)


def _mixer(entry: Node, graph: Graph, owners: Owners) -> str:
    pending: list[Node] = [entry]
    consumers: list[tuple[Node, int]] = []
    while pending and not consumers:  # an entry may be behind transpositions
        arriving = [one for node in pending for one in graph.incoming[node]]
        consumers = [(node, k) for node, k, _ in arriving if node in owners.sends]
        pending = [node for node, _, _ in arriving]
    mixing = [node for node, k in consumers if owners.sends[node][k] is None]
    return described((mixing or [node for node, _ in consumers])[0], graph)


def described(node: Node, graph: Graph) -> str:
    """A node for messages: its function, and the name of a parameter, which tells the layer."""
    leaves = [other for other, _ in graph.inputs_of(node) if other.name() == LEAF]
    names = [info.name for leaf in leaves if (info := PARAMETERS.get(variable_of(leaf))) is not None]
    return f"{kind(node)}{f' of parameter {names[0]}' if names else ''}"


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
