"""Puts copies in the place of the parameters that nodes saved, so that the graph keeps their present values.

PyTorch saves parameters themselves, and refuses to use them once they were changed in place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from backpack.graph.nodes import LEAF, variable_of
from backpack.graph.saved import raws_by_name, regions
from backpack.torch_internals import is_packed, memory_of


def copy_saved_parameters(nodes: Sequence[Node]) -> None:
    """Let nodes use copies of the parameters that they saved, also where they saved views of them.

    What shares memory shares its copy, so that this takes the memory of one copy of each saved parameter. It is freed
    with the graph. Nodes of ``torch.utils.checkpoint`` save nothing: their regions are computed again with copies of
    all parameters in the graph.
    """
    parameters = [variable_of(node) for node in nodes if node.name() == LEAF]
    parameters = [leaf for leaf in parameters if isinstance(leaf, Parameter)]  # no input whose gradient is asked for
    memory = {_memory(parameter) for parameter in parameters} - {None}
    copies: dict[Any, Any] = {}
    for node in nodes:
        for saved, value in _saved_tensors(node):
            if _memory(value) in memory:
                own = copy.deepcopy(value.detach(), copies)
                with suppress(RuntimeError):  # before PyTorch told so: it was saved by the hooks of a user
                    saved.register_hooks(lambda _, own=own: own, lambda own: own)
    found = [frame for frame in regions(nodes) if getattr(frame.recompute_fn, "func", None) is not _compute_again]
    if found:
        pairs = [(p, copy.deepcopy(p.detach(), copies)) for p in parameters if _memory(p) is not None]
        for frame in found:
            frame.recompute_fn = partial(_compute_again, pairs, frame.recompute_fn)


def _saved_tensors(node: Node) -> Iterable[tuple[Any, Tensor]]:
    """The tensors that a node saved without hooks, each with the handle whose ``register_hooks`` replaces it."""
    for name, raws in raws_by_name(node):
        if any(map(is_packed, raws)):
            continue
        found: Any = node.saved_tensors if isinstance(node, BackwardCFunction) else getattr(node, f"_saved_{name}")
        values = found if isinstance(found, (tuple, list)) else [found]
        yield from ((raw, value) for raw, value in zip(raws, values, strict=True) if isinstance(value, Tensor))


def _memory(tensor: Tensor) -> int | None:
    """Identifies the memory that a tensor is a view of; ``None``: it has no memory of its own."""
    has_memory = tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)
    return memory_of(tensor) if has_memory else None


def _compute_again(pairs: Sequence[tuple[Tensor, Tensor]], recompute: Callable[..., None], *args: Any) -> None:
    """Compute a checkpointed region again with the parameters' earlier values."""
    present = [parameter.data for parameter, _ in pairs]
    try:
        for parameter, own in pairs:
            parameter.data = own
        recompute(*args)
    finally:
        for (parameter, _), data in zip(pairs, present, strict=True):
            parameter.data = data
