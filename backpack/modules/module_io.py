"""The inputs and outputs of calls of extended modules, for rules and hooks that users write.

``module.input0``, ``module.input1``, ... and ``module.output`` exist on a module while such code runs for it. No
tensor is kept that autograd would free: there are weak references only, except for classes of modules that have a rule,
and in blocks with an ``extension_hook``.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager as Context
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Identity, Module
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from backpack.graph import Graph
from backpack.graph.users_hooks import MODULE_IO, undisturbed
from backpack.modules.tensor_references import Noted, version_of

RULED: WeakSet[type[Module]] = WeakSet()
"""Classes of modules for which there is a rule."""

LEFT: WeakKeyDictionary[Module, list[str]] = WeakKeyDictionary()
"""Attributes that stay on modules after the backward pass, since it was to retain the graph."""

SERVED = re.compile(r"has no attribute '(input\d+|output)'")

_serving = threading.RLock()
"""A module's attributes are those of one thread's call at a time."""


def is_ruled(module: Module) -> bool:
    """Whether there is a rule for the class of a module, or a base of it."""
    return bool(RULED) and any(cls in RULED for cls in type(module).__mro__)


def forget(module: Module) -> None:
    """Remove the attributes that stayed on a module."""
    for name in LEFT.pop(module, ()):
        vars(module).pop(name, None)


def _weakly(tensor: Tensor) -> Noted:
    return Noted(ref(tensor), version_of(tensor))


def _note(value: Any, hold: Callable[[Tensor], Noted]) -> Any:
    """A note of a value: ``hold`` of a tensor; of anything else, its leaves, tensors being held, and its structure."""
    if isinstance(value, Tensor):
        return hold(value)
    leaves, spec = tree_flatten(value)
    return [hold(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec


def _leaves(note: Any) -> list[Any]:
    return [note] if isinstance(note, Noted) else note[0]


def _value(note: Any) -> Any:
    """The value that ``_note`` has made a note of; ``None`` in place of tensors that are gone or were overwritten."""
    leaves = [leaf.value() if isinstance(leaf, Noted) else leaf for leaf in _leaves(note)]
    return leaves[0] if isinstance(note, Noted) else tree_unflatten(leaves, note[1])


@dataclass(eq=False, slots=True)
class ModuleIO:
    """The inputs and outputs of one call of a module, with a ``Noted`` in place of each tensor.

    ``numbers``: which outputs of the node that computed the first output the module returned; ``edges``: the graph's
    edges of the inputs, where gradients flow to them; ``overwritten``: the places of inputs that were returned.
    """

    module: Module
    inputs: list[Any]
    output: Any
    numbers: list[int]
    edges: list[GradientEdge | None]
    overwritten: list[int]

    def readable(self) -> dict[str, Any]:
        """The attributes whose tensors still exist, except names that the module itself uses."""
        module, found = self.module, {}
        notes = {f"input{place}": note for place, note in enumerate(self.inputs) if place not in self.overwritten}
        for name, note in {**notes, "output": self.output}.items():
            taken = any(name in names for names in (module._modules, module._buffers, module._parameters))
            if taken or name in vars(module) or hasattr(type(module), name):
                continue
            if not any(isinstance(leaf, Noted) and leaf.value() is None for leaf in _leaves(note)):
                found[name] = _value(note)
        return found

    def tensors(self) -> Iterator[Tensor]:
        """The inputs and outputs that still exist."""
        for noted in self._noted():
            if (tensor := noted.value()) is not None:
                yield tensor

    def hold(self) -> None:
        """Keep what still exists, since autograd frees it when the module's backward pass has run."""
        for noted in self._noted():
            noted.hold()

    def _noted(self) -> Iterator[Noted]:
        notes = (*self.inputs, self.output)
        return (leaf for note in notes for leaf in _leaves(note) if isinstance(leaf, Noted))

    @contextmanager
    def served(self) -> Iterator[None]:
        """Give the module its inputs and outputs as attributes, while the context lasts."""
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
        """The gradients of the inputs, computed when they are read."""
        return InputGradients(self, node, g_out)


def leave_module_io(module: Module, args: Any, kwargs: Any, output: Any, keep: bool) -> None:
    """Leave a note of a module's inputs and outputs at the node that computed these; ``keep``: hold the tensors."""
    node = output.grad_fn if isinstance(output, Tensor) else None
    if keep or kwargs or node is None or len(args) != 1 or type(args[0]) is not Tensor or (RULED and is_ruled(module)):
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if tensors:
            _leave(module, (*args, *kwargs.values()), output, tensors, keep or is_ruled(module))
        return
    x = args[0]
    metadata: Any = node.metadata
    before = metadata.get(MODULE_IO, ())
    metadata[MODULE_IO] = *before, (ref(module), ref(x), version_of(x), ref(output), output._version, output.output_nr)


def _leave(module: Module, inputs: Sequence[Any], output: Any, tensors: list[Tensor], keep: bool) -> None:
    edges: list[GradientEdge | None] = [None] * len(inputs)
    node = get_gradient_edge(tensors[0]).node
    numbers = [edge.output_nr for tensor in tensors if (edge := get_gradient_edge(tensor)).node is node]
    outputs = list(map(id, tensors))
    same = [place for place, value in enumerate(inputs) if id(value) in outputs]
    overwritten = [] if same and isinstance(module, Identity) else same
    hold = _weakly
    if keep:

        def hold(tensor: Tensor) -> Noted:  # an output that is kept would keep the node that holds it
            return Noted(tensor.detach() if id(tensor) in outputs else tensor, version_of(tensor))

        for place, value in enumerate(inputs):
            if isinstance(value, Tensor) and value.requires_grad and place not in same:
                edges[place] = get_gradient_edge(value)
    notes = [hold(value) if isinstance(value, Tensor) else _note(value, hold) for value in inputs]
    metadata: Any = node.metadata
    left = (ref(module), notes, _note(output, hold), numbers, edges, overwritten)
    metadata[MODULE_IO] = *metadata.get(MODULE_IO, ()), left


def module_io_of(graph: Graph) -> dict[Node, list[ModuleIO]]:
    """The calls of modules, by the node that computed their first output."""
    found: dict[Node, list[ModuleIO]] = {}
    for node, notes in graph.notes.items():
        for left in notes.get(MODULE_IO, ()):
            module = left[0]()
            if module is not None:
                found.setdefault(node, []).append(_restored(module, *left[1:]))
    return found


def _restored(module: Module, input: Any, second: Any, third: Any, *rest: Any) -> ModuleIO:
    """The ``ModuleIO`` of a note, which has a short form for modules with one input and one output."""
    if not isinstance(input, ref):
        return ModuleIO(module, input, second, third, *rest)
    version, number = rest
    same = [0] if input is third and not isinstance(module, Identity) else []
    return ModuleIO(module, [Noted(input, second)], Noted(third, version), [number], [None], same)


def serve(io: ModuleIO | None) -> Context[None]:
    """The context in which a module has its inputs and outputs as attributes; of no call, an empty one."""
    return nullcontext() if io is None else io.served()


class InputGradients(Sequence[Any]):
    """Gradients of a module's inputs, ``None`` where an input needs none; each read starts a backward pass."""

    def __init__(self, io: ModuleIO, node: Node | None, g_out: tuple[Tensor | None, ...]) -> None:
        self._io, self._node, self._g_out = io, node, g_out

    def __len__(self) -> int:
        return len(self._io.edges)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return tuple(self[k] for k in range(len(self))[place])
        edge = self._io.edges[place]
        if edge is None and self._io.overwritten:
            raise RuntimeError(
                f"g_inp of {type(self._io.module).__name__}: the gradient of an input that the module overwrites "
                f"is not available. Set inplace=False."
            )
        if edge is None or self._node is None:
            return None
        given = [(k, grad) for k, grad in zip(self._io.numbers, self._g_out, strict=True) if grad is not None]
        with undisturbed(self._io.tensors()):
            (found,) = torch.autograd.grad(
                [GradientEdge(self._node, k) for k, _ in given],
                edge,
                [grad for _, grad in given],
                retain_graph=True,
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        return found
