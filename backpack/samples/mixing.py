"""Finds where samples are mixed: in regions that belong to no sample, but depend on data and not only on parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.nn import Module

from backpack.graph import LEAF, Graph, kind, saved, tensor_names, variable_of
from backpack.graph.saved import kept
from backpack.modules.calls import Note, run_on_fewer
from backpack.modules.parameters import PARAMETERS
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
                found[entry] = mixer_at(entry, graph, owners)
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


def mixer_at(entry: Node, graph: Graph, owners: Owners) -> str:
    """What mixes the samples whose cotangents enter a region through a node, for messages."""
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
