"""Keeps users' tensor hooks and retained gradients out of passes of our own.

PyTorch runs the hooks of a tensor, and fills the gradient that ``retain_grad()`` asks for, in every pass through its
node; but a pass of seeds computes no gradient of the user's. The tensors that we can protect are the inputs and outputs
of modules without children, the inputs of extended losses, and all tensors of forward passes inside of a block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

from torch import Tensor
from torch.overrides import TorchFunctionMode

from backpack.graph import Graph


class _Thread(threading.local):
    retained: list[Tensor] | None = None
    """Tensors whose gradients will be deleted; ``None``: no pass of our own runs on this thread."""


_here = _Thread()


@contextmanager
def undisturbed(tensors: Iterable[ref[Tensor] | Tensor]) -> Iterator[None]:
    """Context in which no hook of a user runs on these tensors; their retained gradients are afterwards as before."""
    retained: list[Tensor] = []
    for known in tensors:
        tensor = known if isinstance(known, Tensor) else known()
        if tensor is None:
            continue
        tensor._fix_weakref()  # type: ignore[attr-defined]  # the reference was perhaps to one that had been dropped
        hooks = tensor._backward_hooks or {}
        for key, hook in list(hooks.items()):
            hooks[key] = guarded(hook)
        if tensor.retains_grad:
            retained.append(tensor)
    grads = [tensor.grad for tensor in retained]
    before, _here.retained = _here.retained, [*retained, *(_here.retained or ())]
    try:
        forget_retained()
        yield
    finally:
        _here.retained = before
        for tensor, grad in zip(retained, grads, strict=True):
            tensor.grad = grad


def forget_retained() -> None:
    """Delete the gradients that a pass of our own retained: the next pass must not add to them.

    Inside of ``torch.vmap`` they would be batched tensors of another size.
    """
    for tensor in _here.retained or ():
        tensor.grad = None


def guarded(hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """A hook that does nothing in passes of our own; hooks of this package and of PyTorch are returned as they are."""
    if _is_ours(hook):
        return hook

    def guard(grad: Tensor) -> Any:
        return hook(grad) if _here.retained is None else None

    return guard


MODULE_IO = "backpack module io"
"""Key of a node's metadata: for each call of a module whose output the node computed, its inputs and outputs."""

RETAINED = "backpack retained"
"""Key of a node's metadata: the tensors that retain their gradient."""


def note_retained(tensor: Tensor) -> None:
    """Note at its node that a tensor retains its gradient."""
    if tensor.grad_fn is not None:
        metadata: Any = tensor.grad_fn.metadata
        metadata.setdefault(RETAINED, []).append(ref(tensor))


def observed(graph: Graph) -> Iterator[ref[Tensor] | Tensor]:
    """The tensors of the user that nodes have notes of."""
    for left in graph.notes.values():
        for _, inputs, output, last, *_ in left.get(MODULE_IO, ()):
            if isinstance(inputs, ref):
                yield inputs
                yield last
                continue
            for note in (*inputs, output):
                for leaf in note[0] if type(note) is tuple else [note]:
                    held = getattr(leaf, "held", None)
                    if held is not None:
                        yield held
        yield from left.get(RETAINED, ())


class Guarding(TorchFunctionMode):
    """Context in which new hooks are guarded, and ``retain_grad()`` does nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.register_hook:
            args = (args[0], guarded(args[1]))
        elif func is Tensor.retain_grad:
            return None
        return func(*args, **(kwargs or {}))


def _is_ours(hook: Any) -> bool:
    """Whether a hook is this module's or PyTorch's; the hooks of a fully sharded module gather its parameters."""
    name = getattr(hook, "__module__", None) or ""
    return name == __name__ or name.startswith("torch.")
