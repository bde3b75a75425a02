"""Running a module again: on selected samples, with other functions, or piece by piece.

It leaves no trace: not on the module, nor in its buffers, nor in the random numbers that others draw. The outputs are
used only if they agree with those of the user's forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import Module
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map

from backpack.curvature.replacements import TwiceDifferentiable
from backpack.graph import read, regions
from backpack.graph.users_hooks import Guarding
from backpack.modules.calls import Note, leaves_of
from backpack.torch_internals import is_fully_sharded, uncompiled

NOT_TAKEN = (RuntimeError, ValueError, IndexError, KeyError, TypeError, AssertionError)
"""What a module may raise that cannot run on fewer samples."""


@contextmanager
def run_again(root: Module) -> Iterator[list[str]]:
    """What runs inside leaves no attribute of the module and its submodules changed, nor statistics in buffers.

    Yields a list that afterwards names the buffers that were changed and that the next forward pass may depend on.
    """
    before = [(module, dict(vars(module))) for module in root.modules()]
    buffers = [(m._buffers, name, b) for m in root.modules() if m.training for name, b in m._buffers.items()]
    copies = {id(b): b.clone() for _, _, b in buffers if b is not None}
    for own, name, buffer in buffers:
        own[name] = copies.get(id(buffer))
    changed: list[str] = []
    versions = {id(copied): copied._version for copied in copies.values()}
    try:
        with Guarding():
            yield changed
    finally:
        for module in root.modules():
            for name, buffer in module._buffers.items() if not isinstance(module, _NormBase) else ():
                if buffer is not None and module.training and versions.get(id(buffer)) != buffer._version:
                    changed.append(name)
        for own, name, buffer in buffers:
            own[name] = buffer
        for module, attributes in before:
            for name, value in list(vars(module).items()):
                if name not in attributes:
                    delattr(module, name)
                elif value is not attributes[name]:
                    vars(module)[name] = attributes[name]


@contextmanager
def drawing_again(state: list[Tensor] | None) -> Iterator[None]:
    """What is drawn inside is what was drawn after ``state``, if that is known; the generators do not move."""
    with torch.random.fork_rng():
        if state is not None:
            torch.set_rng_state(state[0])
            if len(state) > 1:
                torch.cuda.set_rng_state_all(state[1:])
        yield


def is_observed(module: Module) -> bool:
    """Whether a user's hook runs with a module's forward pass."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    names = [getattr(hook, "__module__", None) or "" for hook in hooks]
    return not all(name.startswith(("backpack.", "torch.")) for name in names)


def outputs_again(note: Note, rows: Tensor | None, n: int, double_backward: bool) -> list[Any]:
    """All outputs of a module, of the selected samples alone; none if it cannot run again.

    ``double_backward``: with functions that have second derivatives.
    """
    root = note.module()
    if root is None or not note.is_complete:
        return []
    if any(map(is_fully_sharded, root.modules())):
        return []  # processes would not gather parameters in step
    if rows is not None and any(map(is_observed, root.modules())):
        return []  # what a hook has kept would be replaced

    def select(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for axis in (note.axis, 0):
            if rows is not None and value.dim() > axis and value.shape[axis] == n:
                return value.index_select(axis, rows)
        return value

    args, kwargs = tree_map(select, note.attached or note.arguments)
    with torch.enable_grad(), drawing_again(note.random), run_again(root) as changed, ExitStack() as contexts:
        if (stance := uncompiled()) is not None:
            contexts.enter_context(stance)
        if double_backward:
            contexts.enter_context(TwiceDifferentiable())
        try:
            outputs = leaves_of(root(*args, **kwargs))
        except NOT_TAKEN:  # it has a state for all samples, or relies on their number
            return []
    if changed and rows is not None:
        return []  # it computes with what its last forward pass has left
    if double_backward:
        _recompute_twice_differentiably(outputs, leaves_of((args, kwargs)))
    return outputs


def output_of(note: Note, outputs: Sequence[Any]) -> Tensor | None:
    """The output at which a call left a note, among those of another run; ``None``: it is gone or has no graph."""
    found = outputs[note.place] if note.place < len(outputs) else None
    return found if isinstance(found, Tensor) and found.grad_fn is not None else None


def _recompute_twice_differentiably(outputs: Sequence[Any], inputs: Sequence[Any]) -> None:
    """Let checkpointed regions of a graph be computed again with functions that have second derivatives, too."""
    found, known = (
        regions(read([get_gradient_edge(t) for t in tensors if isinstance(t, Tensor) and t.requires_grad]).order)
        for tensors in (outputs, inputs)
    )
    for frame in found:
        if all(frame is not other for other in known):
            frame.recompute_fn = partial(_in_the_same_way, frame.recompute_fn)


def _in_the_same_way(recompute: Callable[..., None], *args: Any) -> None:
    with TwiceDifferentiable():
        recompute(*args)


def agree(output: Tensor, expected: Tensor, rounded: bool = False, size: float = 0.0) -> bool:
    """Whether two outputs differ by rounding only; ``rounded``: the expected one was computed in 16 bits.

    ``size``: of what was rounded, where that is larger than what is expected.
    """
    if rounded:
        output, expected = output.bfloat16(), expected.bfloat16()
    eps = torch.finfo(expected.dtype).eps
    tolerance = min(eps**0.5, 2**12 * eps)
    size = max(1e-30, size, expected.abs().max().item() if expected.numel() else 0.0)
    same = output.shape == expected.shape and output.dtype == expected.dtype
    return same and torch.allclose(output, expected, rtol=tolerance, atol=tolerance * size)
