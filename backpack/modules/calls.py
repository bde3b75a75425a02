"""Notes that calls of extended modules leave in the graph: the module and its arguments."""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import Module
from torch.nn.modules.loss import _Loss
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from backpack.graph import Edge, Graph
from backpack.modules.tensor_references import Noted, version_of

OUTPUT = "backpack output"
INPUT = "backpack input"

PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
"""Types of arguments that hold nothing else."""


@dataclass(eq=False)
class Note:
    """The note that a call of an extended module leaves at the node of each of its outputs.

    ``arguments`` are those of the call. They are cut off from the graph, which would live forever if one of its nodes
    held it. ``is_complete``: whether the module can be called with them. ``axis`` counts the samples of an input.
    ``place`` is that of this output among the leaves of all outputs.
    """

    module: ref[Module]
    arguments: tuple[Any, Any]
    is_complete: bool
    axis: int
    place: int
    is_packed: bool = False
    """Whether the output is a packed sequence, whose rows are no samples."""
    is_of_base: bool = False
    """Whether the note is not left at the output, but at the tensor that the output is a view of."""
    output: Noted | None = None
    """The output, by a weak reference, or detached where the call may have to be compared with another."""
    attached: tuple[Any, Any] | None = None
    """The arguments with their graph, if a gradient flows on to them."""
    random: list[Tensor] | None = None
    """The state of the generators when the call began, if that was asked for."""

    @property
    def value(self) -> Tensor | None:
        """The output, if it still exists and was not overwritten."""
        return None if self.output is None else self.output.value()

    @cached_property
    def inputs(self) -> list[Tensor]:
        """The tensors that the module was called with."""
        return [leaf for leaf in leaves_of(self.arguments) if isinstance(leaf, Tensor)]

    @cached_property
    def sizes(self) -> list[int]:
        """The different numbers of rows that the inputs have."""
        return list(dict.fromkeys(t.shape[self.axis_of(t)] for t in self.inputs if t.dim()))

    @cached_property
    def sizes_of_data(self) -> list[int]:
        """The same without integers, which may be indices, unless they are the first input."""
        found = [t for place, t in enumerate(self.inputs) if place == 0 or t.is_floating_point() or t.is_complex()]
        return list(dict.fromkeys(t.shape[self.axis_of(t)] for t in found if t.dim()))

    def axis_of(self, tensor: Tensor) -> int:
        """Which axis of an input counts its rows."""
        return self.axis if tensor.dim() > self.axis else 0

    def outputs(self, output: Any) -> Any:
        """The output that this note belongs to, taken from all outputs of a further call."""
        leaves = leaves_of(output)
        return leaves[self.place] if self.place < len(leaves) else None


def leaves_of(value: Any) -> list[Any]:
    """The leaves of a nested structure, also of dataclasses in it."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple) or type(value) is list:
        return [leaf for entry in value for leaf in leaves_of(entry)]
    if type(value) is dict:
        return [leaf for entry in value.values() for leaf in leaves_of(entry)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return [leaf for entry in fields for leaf in leaves_of(entry)]
    if isinstance(value, PLAIN):
        return [value]
    leaves = tree_leaves(value)
    return (
        leaves if len(leaves) == 1 and leaves[0] is value else [leaf for entry in leaves for leaf in leaves_of(entry)]
    )


def leave_note(
    module: Module, args: Any, kwargs: Any, output: Any, axis: int, random: list[Tensor] | None = None
) -> None:
    """Leave a note at the nodes of a module's outputs, and at those of inputs that require a gradient."""
    if type(output) is Tensor and len(args) == 1 and not kwargs and output._base is None:
        (x,), node = args, output.grad_fn
        if node is None:
            return
        if type(x) is Tensor and not x.requires_grad:
            note = Note(ref(module), ((x,), {}), True, axis, 0)
            note.output, note.random = _noted_output(output, random is not None), random
            left: Any = node.metadata
            left.setdefault(OUTPUT, {})[output.output_nr] = note
            return
    _leave_note(module, args, kwargs, output, axis, random)


def _leave_note(module: Module, args: Any, kwargs: Any, output: Any, axis: int, random: list[Tensor] | None) -> None:
    copied = _Copy()
    arguments = copied((args, kwargs))
    inputs = {}
    for tensor in leaves_of((args, kwargs)):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            edge = get_gradient_edge(tensor)
            inputs[edge.node, edge.output_nr] = tensor
    attached = _Copy(attached=True)((args, kwargs)) if inputs and copied.is_complete else None
    packed = any(isinstance(part, PackedSequence) for part in (output, *(output if type(output) is tuple else ())))
    note: Note | None = None
    cut: Note | None = None
    for place, tensor in enumerate(leaves_of(output)):
        if not isinstance(tensor, Tensor) or tensor.grad_fn is None:
            continue
        note = Note(ref(module), arguments, copied.is_complete, axis, place, packed)
        note.output, note.attached, note.random = _noted_output(tensor, random is not None), attached, random
        for value in (tensor, tensor._base):  # of a view, which an operation in place takes its own node from
            node = None if value is None else value.grad_fn
            if value is None or node is None:
                continue
            metadata: Any = node.metadata
            if (node, value.output_nr) in inputs:  # handed through, or overwritten: a node must not hold itself
                cut = cut or dataclasses.replace(note, attached=None)
                metadata.setdefault(OUTPUT, {}).setdefault(value.output_nr, cut)
            else:
                own = note if value is tensor else dataclasses.replace(note, is_of_base=True)
                metadata.setdefault(OUTPUT, {})[value.output_nr] = own
    if note is not None and inputs:
        cut = cut or dataclasses.replace(note, attached=None)
        for node, _ in inputs:
            metadata = node.metadata
            metadata[INPUT] = cut


class _Copy:
    """Copies the containers of arguments, which may get to hold an output, and cuts tensors off from the graph."""

    def __init__(self, attached: bool = False) -> None:
        self.attached, self.is_complete = attached, True

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if self.attached or value.is_inference() or not value.requires_grad else value.detach()
        if type(value) in (tuple, list):
            return type(value)([self(entry) for entry in value])
        if type(value) is dict:
            return {key: self(entry) for key, entry in value.items()}
        if isinstance(value, PLAIN):
            return value
        self.is_complete = False
        return [leaf.detach() for leaf in leaves_of(value) if isinstance(leaf, Tensor) and not leaf.is_inference()]


def _noted_output(output: Tensor, hold: bool) -> Noted:
    """An output by a weak reference, or detached where it is to be held: a node must not hold itself."""
    return Noted(output.detach() if hold else ref(output), version_of(output))


def noted(graph: Graph) -> tuple[dict[Edge, Note], list[Note]]:
    """The notes of extended modules' outputs in a graph, and one note of each call that has inputs or outputs there."""
    found: dict[Edge, Note] = {}
    calls: dict[int, Note] = {}
    for node, left in graph.notes.items():
        for number, note in left.get(OUTPUT, {}).items():
            calls[id(note)] = note
            if not isinstance(note.module(), _Loss):  # whose rows need not be samples
                found[node, number] = note
        if INPUT in left:
            calls[id(left[INPUT])] = left[INPUT]
    return found, list(calls.values())


def run_on_fewer(note: Note, n: int, with_graph: bool = False, whole: Container[int] = ()) -> Any:
    """What a module returns for all of its ``n`` samples but the last; ``None``: it fails.

    A copy with the same parameters runs, so that the module itself does not change. ``whole``: the memory of inputs
    that are not shortened.
    """
    module = note.module()
    if module is None or not note.is_complete:
        return None

    def fewer(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        own = value.dim() > 0 and value.shape[note.axis_of(value)] == n
        own = own and value.untyped_storage()._cdata not in whole
        return value.detach().narrow(note.axis_of(value), 0, n - 1) if own else value.detach()

    try:
        args, kwargs = tree_map(fewer, note.arguments)
        with _random_numbers_as_before(), torch.set_grad_enabled(with_graph):
            return _copy(module)(*args, **kwargs)
    except Exception:  # a module may raise anything
        return None


def _copy(module: Module) -> Callable[..., Any]:
    memo: dict[int, Any] = {id(p): p for p in module.parameters()}
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach()
    twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if not (getattr(hook, "__module__", None) or "").startswith("torch."):
                    del hooks[key]
    return twin


@contextmanager
def _random_numbers_as_before() -> Iterator[None]:
    state, numpy = random.getstate(), sys.modules.get("numpy")
    drawn = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(drawn)
