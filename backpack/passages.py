"""Calls of extended modules: what went in and came out, for rules and hooks that users write.

``module.input0``, ``module.input1``, ... and ``module.output`` exist on a module while such code runs for it. Nothing
is kept for that which autograd would let go: tensors are referred to weakly, except for classes of modules that have a
rule, and where the forward pass runs in a block with an ``extension_hook``.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager as Context
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Identity, Module
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten
from torch.utils.weak import TensorWeakRef

from backpack.bystanders import undisturbed

RULED: WeakSet[type[Module]] = WeakSet()
"""Classes of modules for which there is a rule."""

LEFT: WeakKeyDictionary[Module, list[str]] = WeakKeyDictionary()
"""What stays readable on modules, since their graph was to be retained."""

SERVED = re.compile(r"has no attribute '(input\d+|output)'")

_serving = threading.RLock()
"""A module's attributes are those of one thread's call at a time."""


def is_ruled(module: Module) -> bool:
    """Whether there is a rule for the class of a module, or a base of it."""
    return bool(RULED) and any(cls in RULED for cls in type(module).__mro__)


def forget(module: Module) -> None:
    """Take away what stayed readable."""
    for name in LEFT.pop(module, ()):
        vars(module).pop(name, None)


class Noted(NamedTuple):
    """A tensor of the forward pass, and how often it had been written to."""

    held: Any
    version: int

    def value(self) -> Tensor | None:
        """The tensor, if it is still there as it was."""
        tensor = self.held() if isinstance(self.held, TensorWeakRef) else self.held
        return None if tensor is None or _version(tensor) != self.version else tensor


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@dataclass(eq=False)
class Passage:
    """One call of a module.

    ``outputs``: their numbers at the node that computed them; ``edges``: of the inputs, where gradients flow to them.
    """

    module: Module
    values: dict[str, tuple[list[Any], TreeSpec | None]]
    outputs: list[int]
    edges: list[GradientEdge | None]
    overwritten: bool

    @classmethod
    def of(cls, module: Module, inputs: Sequence[Any], output: Any, tensors: list[Tensor], keep: bool) -> Passage:
        """Of a call that has just ended; ``tensors``: outputs that require a gradient."""
        returned = {id(tensor) for tensor in tensors}

        def note(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if not keep:
                return Noted(TensorWeakRef(value), _version(value))
            # An output that is kept would keep the hook that holds it.
            return Noted(value.detach() if id(value) in returned else value, _version(value))

        def noted(value: Any) -> tuple[list[Any], TreeSpec | None]:
            if isinstance(value, Tensor):
                return [note(value)], None
            leaves, spec = tree_flatten(value)
            return [note(leaf) for leaf in leaves], spec

        values: dict[str, tuple[list[Any], TreeSpec | None]] = {}
        edges: list[GradientEdge | None] = []
        overwritten = False
        for place, value in enumerate(inputs):
            same = id(value) in returned
            if same and not isinstance(module, Identity):
                overwritten = True
            else:
                values[f"input{place}"] = noted(value)
            follows = keep and isinstance(value, Tensor) and value.requires_grad and not same
            edges.append(get_gradient_edge(value) if follows else None)
        values["output"] = noted(output)
        return cls(module, values, [tensor.output_nr for tensor in tensors], edges, overwritten)

    def readable(self) -> dict[str, Any]:
        """The attributes that can be served, but those that the module has of its own."""
        module, found = self.module, {}
        for name, (notes, spec) in self.values.items():
            taken = any(name in names for names in (module._modules, module._buffers, module._parameters))
            if taken or name in vars(module) or hasattr(type(module), name):
                continue
            leaves = [note.value() if isinstance(note, Noted) else note for note in notes]
            gone = (isinstance(note, Noted) and leaf is None for note, leaf in zip(notes, leaves, strict=True))
            if not any(gone):
                found[name] = leaves[0] if spec is None else tree_unflatten(leaves, spec)
        return found

    @contextmanager
    def served(self) -> Iterator[None]:
        """The module has its inputs and outputs as attributes."""
        with _serving:
            left = self.module in LEFT
            forget(self.module)
            added = self.readable()
            vars(self.module).update(added)
            try:
                yield
            except AttributeError as error:
                if SERVED.search(str(error)) is None:
                    raise
                raise AttributeError(
                    f"{error}: the tensor was freed or overwritten after the forward pass, since autograd does not "
                    f"need it. It is kept where a rule for {type(self.module).__name__} was registered before the "
                    f"forward pass (set_module_extension), or the forward pass ran inside a backpack(...) block that "
                    f"has an extension_hook."
                ) from error
            finally:
                for name in added:
                    vars(self.module).pop(name, None)
                if left:
                    self.leave()

    def leave(self) -> None:
        """Let the attributes stay until the module is called again."""
        forget(self.module)
        added = self.readable()
        vars(self.module).update(tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, added))
        LEFT[self.module] = list(added)

    def gradients(self, node: Node | None, g_out: tuple[Tensor | None, ...]) -> Sequence[Tensor | None]:
        """Those of the inputs, computed when they are read."""
        return InputGradients(self, node, g_out)


def serve(passage: Passage | None) -> Context[None]:
    """Its inputs and outputs, if there was such a call."""
    return nullcontext() if passage is None else passage.served()


class InputGradients(Sequence[Any]):
    """Gradients of a module's inputs, ``None`` where an input needs none; each read starts a backward pass."""

    def __init__(self, passage: Passage, node: Node | None, g_out: tuple[Tensor | None, ...]) -> None:
        self._passage, self._node, self._g_out = passage, node, g_out

    def __len__(self) -> int:
        return len(self._passage.edges)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return tuple(self[k] for k in range(len(self))[place])
        edge = self._passage.edges[place]
        if edge is None and self._passage.overwritten:
            raise RuntimeError(
                f"g_inp of {type(self._passage.module).__name__}: the gradient of an input that the module overwrites "
                f"is not available. Set inplace=False."
            )
        if edge is None or self._node is None:
            return None
        given = [(k, grad) for k, grad in zip(self._passage.outputs, self._g_out, strict=True) if grad is not None]
        notes = [note for held, _ in self._passage.values.values() for note in held if isinstance(note, Noted)]
        with undisturbed(tensor for note in notes if (tensor := note.value()) is not None):
            (found,) = torch.autograd.grad(
                [GradientEdge(self._node, k) for k, _ in given],
                edge,
                [grad for _, grad in given],
                retain_graph=True,
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        return found
