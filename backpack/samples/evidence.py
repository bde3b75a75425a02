"""Evidence for where samples begin: nodes that saved an input of a module tell which of its rows belong to a sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack.graph import kind, saved, shape_of
from backpack.modules.calls import Note
from backpack.samples.layout_rules import broadcast_from
from backpack.samples.layouts import AnyLayout
from backpack.samples.owners import Owners
from backpack.torch_internals import is_packed, memory_of

SAVED = {
    "Addmm": {1: "mat1", 2: "mat2"},
    "Mm": {0: "self", 1: "mat2"},
    "Bmm": {0: "self", 1: "mat2"},
    "Baddbmm": {1: "batch1", 2: "batch2"},
    "Mul": {0: "self", 1: "other"},
    "Convolution": {0: "input"},
    "NativeLayerNorm": {0: "input"},
    "NativeGroupNorm": {0: "input"},
    "NativeBatchNorm": {0: "input"},
    "Embedding": {0: "indices"},
    "MkldnnRnnLayer": {0: "input"},
}
"""For kinds of nodes, the names under which they save their inputs, by the input's place."""


def saved_inputs(node: Node) -> Iterator[tuple[int, Tensor]]:
    """The inputs that a node saved, and their places; none that are computed again when they are read."""
    for k, name in SAVED.get(kind(node), {}).items():
        raw = getattr(node, f"_raw_saved_{name}", None)  # a product with a number has none
        if raw is not None and not is_packed(raw):
            found = getattr(node, f"_saved_{name}")
            if found is not None:
                yield k, found


def proved(owners: Owners, calls: Sequence[Note], n: int) -> bool | None:
    """Whether the samples at nodes that saved an input of a module are its ``n`` rows; ``None``: no node tells.

    One such node is a proof. So are several nodes that saved whole tensors, if these belong to different samples. A
    node speaks against it if each entry belongs to a single sample, but no row does. So does it if several samples have
    all inputs of this size in common.
    """
    inputs: dict[int, tuple[Tensor, int]] = {}
    storages: set[int] = set()
    shared: set[int] = set()
    whole: dict[tuple[int, int], int] = {}
    for call in calls:
        for tensor in call.inputs:
            storages.add(memory_of(tensor))
            if tensor.dim() and tensor.shape[call.axis_of(tensor)] == n and tensor.numel():
                inputs[memory_of(tensor)] = (tensor, call.axis_of(tensor))
    against = False
    for node in owners.sends:
        if kind(node) == "EmbeddingBag" and memory_of(saved(node, "offsets")) in storages:
            if owners.owned[node, 0].axes == [0]:
                return True
            against = True
        for k, value in saved_inputs(node):
            storage = memory_of(value)
            own = layout_of_saved(node, owners, k, value) if storage in storages else None
            if own is None or own.n != n:
                continue
            owner = own.owners(value.shape, torch.device("cpu"))
            if n > 1 and len(samples := owner.unique()) == 1:
                whole[storage, int(value.storage_offset())] = int(samples)
                if len(set(whole.values())) > 1:
                    return True
            if storage in inputs:
                evidence = _evidence(owner.expand(value.shape), *inputs[storage], value)
                if evidence is Evidence.FOR:
                    return True
                against = against or evidence is Evidence.AGAINST
                shared.update({storage} if evidence is Evidence.SHARED else ())
    return False if against or (shared and shared == set(inputs)) else None


class Evidence(Enum):
    """What the samples of saved entries tell about a layout."""

    FOR = "the samples are the rows of an input"
    AGAINST = "the samples are something else"
    SHARED = "several samples have entries in common"
    NOTHING = "there are entries of one row at most"


def _evidence(owner: Tensor, tensor: Tensor, axis: int, like: Tensor) -> Evidence:
    """Whether entries of ``like``, a view of the memory of ``tensor``, belong to samples by that tensor's rows."""
    memory = tensor.untyped_storage().nbytes()
    size = memory // tensor.element_size()
    rows = torch.full((size,), -1)
    index = torch.arange(tensor.shape[axis]).reshape([-1 if a == axis else 1 for a in range(tensor.dim())])
    rows.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(index.expand(tensor.shape))
    own = torch.arange(memory // like.element_size())  # real parts are smaller than complex entries
    own = own * like.element_size() // tensor.element_size()
    entries = own.as_strided(like.shape, like.stride(), like.storage_offset()).flatten()
    owner = owner.flatten()
    of_entry = torch.full((size,), -1).index_put((entries,), owner)
    if bool((of_entry[entries] != owner).any()):
        return Evidence.SHARED
    there = owner >= 0
    row, owner = rows[entries][there].clamp(min=0), owner[there]
    of_row = torch.full((tensor.shape[axis],), -1).index_put((row,), owner)
    if not bool((of_row[row] == owner).all()):
        return Evidence.AGAINST
    if len(row.unique()) < 2:
        return Evidence.NOTHING
    return Evidence.FOR if len(owner.unique()) > 1 else Evidence.AGAINST


def layout_of_saved(node: Node, owners: Owners, k: int, saved: Tensor) -> AnyLayout | None:
    """Where the samples lie in input ``k`` of a node's function, which the node saved."""
    number, layout = owners.first_owned(node)
    shape = shape_of(node, number)
    if kind(node) == "Embedding":
        return None if layout.occupies([len(shape) - 1]) else layout.moved(range(len(shape) - 1))
    if kind(node) == "Mul":
        return broadcast_from(saved.shape, layout, shape)
    return owners.sends[node][k]
