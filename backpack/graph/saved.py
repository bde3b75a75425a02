"""Reads what nodes saved without a trace, also where ``torch.utils.checkpoint`` computes it again.

PyTorch unpacks a tensor of a checkpointed region once in a backward pass, and has to do so when the node runs. So a
tensor that was read before is given back to its region.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.utils import checkpoint
from torch.utils.checkpoint import _CheckpointFrame, _Handle

from backpack.torch_internals import is_packed

_EXECUTION_GROUP: Any = getattr(checkpoint, "GraphExecGroup", None)
"""``None``: this version of PyTorch has no groups of passes."""

_names: dict[str, tuple[str, ...]] = {}


def tensor_names(node: Node) -> tuple[str, ...]:
    """The names under which a kind of node saves tensors; a user's function has none."""
    name = node.name()
    if name not in _names:
        prefix = "_raw_saved_"
        found = tuple(entry.removeprefix(prefix) for entry in dir(node) if entry.startswith(prefix))
        _names[name] = () if found == ("tensors",) else found  # of a user's function, which has no names for them
    return _names[name]


def saved(node: Node, name: str) -> Any:
    """What a node saved under the name of an argument or result of its function.

    Raises:
        RuntimeError: It was freed, or modified in place since.
    """
    value = getattr(node, f"_saved_{name}")
    if isinstance(value, Tensor):
        raw = getattr(node, f"_raw_saved_{name}")
        if is_packed(raw):
            _give_back(raw, value)
    return value


def is_recomputed(node: Node) -> bool:
    """Whether what a node saved is computed again when it is read."""
    return any(_region(raw) is not None for raw in _raws(node))


def raws_by_name(node: Node) -> Iterator[tuple[str, Sequence[Any]]]:
    """The names under which a node saves tensors, each with their handles, which read without unpacking."""
    for name in ("tensors",) if isinstance(node, BackwardCFunction) else tensor_names(node):
        raw = getattr(node, f"_raw_saved_{name}")
        yield name, raw if isinstance(raw, (tuple, list)) else (raw,)


def _raws(node: Node) -> Iterator[Any]:
    for _, raws in raws_by_name(node):
        yield from raws


@contextmanager
def kept(node: Node) -> Iterator[None]:
    """Context in which a node runs by itself; what it saved is afterwards as before."""
    if not is_recomputed(node):
        yield
        return
    found = [(raw, raw.unpack_hook(raw.data)) for raw in _raws(node) if _region(raw) is not None]
    for raw, value in found:
        _give_back(raw, value)
    try:
        yield
    finally:
        for raw, value in found:
            _give_back(raw, value)


_regions: WeakSet[Any] = WeakSet()
"""Checkpointed regions of which something was read."""


def _region(raw: Any) -> Any:
    """The checkpointed region that a saved tensor belongs to; ``None``: it belongs to none."""
    frame = _frame_of(raw.unpack_hook) if is_packed(raw) else None
    if frame is not None:
        _regions.add(frame)
    return frame


def regions(nodes: Iterable[Node]) -> list[Any]:
    """The checkpointed regions that nodes belong to."""
    frames = (_region(raw) for node in nodes for raw in _raws(node))
    return list({id(frame): frame for frame in frames if frame is not None}.values())


def forget_recomputed() -> None:
    """Free the tensors that were computed again for passes of our own, or for reads outside of a pass."""
    running: Any = torch._C._current_graph_task_id()
    for frame in list(_regions):
        for key in [key for key in frame.recomputed if key != running and isinstance(key, int)]:
            del frame.recomputed[key]


def _frame_of(hook: Any) -> Any:
    for cell in getattr(hook, "__closure__", None) or ():
        content = cell.cell_contents
        if isinstance(content, _CheckpointFrame):
            return content
        if callable(content) and (frame := _frame_of(content)) is not None:
            return frame
    return None


def _give_back(raw: Any, value: Any) -> None:
    """Let a region return this value when the node unpacks the tensor."""
    frame = _region(raw)
    if frame is None or not isinstance(value, Tensor):
        return
    group: Any = _EXECUTION_GROUP._get_current_group() if _EXECUTION_GROUP is not None else None
    key = torch._C._current_graph_task_id() if group is None else group
    if key == -1:  # outside of a pass each read computes anew
        return
    holder, handle = raw.data, _Handle()
    frame.recomputed[key][handle] = value
    holder.handles[key] = handle
