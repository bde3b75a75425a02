"""The backward pass: brings cotangents to uses, runs the quantities, writes the results to the parameters.

Parameters are finished one by one while the pass runs: a hook on the output of each recorded call notes the
cotangent, a hook on the parameter itself, which PyTorch runs when all its uses have contributed, computes what the
active extensions ask for.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.hooks import RemovableHandle
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from backpack.compat import graph_is_kept, graph_task, unobserved, when_backward_ends
from backpack.recorder import Call, Recording, Source
from backpack.samples import Subset
from backpack.uses import Explicit, Individual, Use, join
from backpack.uses.pullback import map_samples


class Quantity(Protocol):
    """What the engine needs to know of an extension."""

    savefield: str
    subset: Subset
    reads: tuple[str, ...]
    needs_all_parameters: bool

    def compute(self, grads: Individual) -> Tensor:
        """The result for one parameter."""

    def measure(self, grads: Individual) -> Tensor:
        """What of one parameter the results of all depend on."""

    def combine(self, measures: list[Tensor]) -> Tensor:
        """What the result of each parameter needs to know of all."""

    def compute_jointly(self, grads: Individual, joint: Tensor) -> Tensor:
        """The result for one parameter, given what ``combine`` returned."""


class _Thread(threading.local):
    """What one thread is doing."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.recording: Recording | None = None
        self.root: Module | None = None
        self.depth = 0
        self.frame: FrameType | None = None
        self.disabled = 0
        self.muted = False


HERE = _Thread()


@dataclass(eq=False)
class Arrival:
    """Cotangents ``[v, ...]`` that reached the outputs of one use."""

    call: Call
    use: Use
    grads: dict[int, Tensor]

    def individual(self, subset: Subset, shape: torch.Size, dtype: torch.dtype) -> Individual:
        device = next(iter(self.grads.values())).device
        rows = self.call.rows(subset.rows(self.call.n, device))
        return self.use.arrive(self.grads, rows, shape, dtype)


@dataclass(eq=False)
class Contributions:
    """All that reached one parameter, or one tensor computed from parameters, in one backward pass."""

    tensor: Tensor
    arrivals: list[Arrival]
    explicit: dict[Any, list[Individual]]

    def individual(self, subset: Subset) -> Individual:
        """The individual gradients of the samples in ``subset``."""
        counts = {arrival.call.n for arrival in self.arrivals}
        if len(counts) > 1:
            raise RuntimeError(
                f"A parameter of shape {list(self.tensor.shape)} was used with batches of {sorted(counts)} samples: "
                f"which of them belong together cannot be told. Let one call of the extended module see the whole batch."
            )
        parts = [a.individual(subset, self.tensor.shape, self.tensor.dtype) for a in self.arrivals]
        return join([*parts, *self.explicit.get(subset.key, [])])


@dataclass(eq=False)
class Block:
    """One ``with backpack(...)``: its extensions, and what the running backward pass has delivered so far."""

    extensions: tuple[Quantity, ...]
    extension_hook: Callable[[Module], None] | None = None
    debug: bool = False
    retain_graph: bool = False
    task: int = -1
    arrivals: dict[int, list[Arrival]] = field(default_factory=dict)
    explicit: dict[int, dict[Any, list[Individual]]] = field(default_factory=dict)
    sources: dict[int, Source] = field(default_factory=dict)
    postponed: list[tuple[Quantity, Contributions, Tensor]] = field(default_factory=list)
    grads: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    hooked: set[int] = field(default_factory=set)
    finished: set[int] = field(default_factory=set)
    grad_mode: bool = False

    def clear(self) -> None:
        """Forget what a backward pass delivered."""
        for store in (self.arrivals, self.explicit, self.sources, self.grads, self.hooked, self.finished):
            store.clear()
        self.postponed.clear()

    def _enter_pass(self) -> None:
        if self.task != graph_task():
            self.clear()
            self.task = graph_task()
            self.grad_mode = torch.is_grad_enabled()
            when_backward_ends(self._end_pass)

    def receive(self, call: Call, place: int, grad: Tensor) -> None:
        """Note the cotangent of one of a call's outputs."""
        self._enter_pass()
        if id(call) in self.grads:
            self.grads[id(call)][place] = grad[None]
            return
        uses = [(source, use) for source, use in call.uses if not source.void]
        if not uses:
            return
        call.check()
        for extension in self.extensions:
            extension.subset.rows(call.n, grad.device)
        grads = self.grads[id(call)] = {place: grad[None]}
        for source, use in uses:
            self.sources[id(source.tensor)] = source
            self.arrivals.setdefault(id(source.tensor), []).append(Arrival(call, use, grads))

    def _fetch(self, tensor: Tensor) -> Contributions:
        key = id(tensor)
        self.sources.pop(key, None)
        return Contributions(tensor, self.arrivals.pop(key, []), self.explicit.pop(key, {}))

    def _subsets(self) -> dict[Any, Subset]:
        return {extension.subset.key: extension.subset for extension in self.extensions}

    def source_done(self, key: int) -> None:
        """Pull the individual gradients of a computed tensor on to its parameters; its graph is still there."""
        if key not in self.arrivals:
            return
        source = self.sources[key]
        contributions = self._fetch(source.tensor)
        for subset_key, subset in self._subsets().items():
            dense = contributions.individual(subset).dense()
            for parameter in source.parameters:
                pulled = Explicit(_pull(source.tensor, parameter, dense))
                self.explicit.setdefault(id(parameter), {}).setdefault(subset_key, []).append(pulled)
                self.sources.setdefault(id(parameter), Source(parameter, (parameter,), source.name))

    def parameter_done(self, parameter: Tensor, name: str, received: bool) -> None:
        """All uses have contributed: compute the results."""
        self._enter_pass()
        key = id(parameter)
        if key not in self.arrivals and key not in self.explicit:
            if self.extensions and received:
                raise RuntimeError(
                    f"Parameter {name} of shape {list(parameter.shape)} receives a gradient, but none of its uses was "
                    f"seen: it was used outside of a forward call of the extended module, or inside of something that "
                    f"hides its functions (a compiled or scripted module, a custom autograd.Function, a data-parallel "
                    f"replica, a checkpointed or disabled region). Call the extended module itself, or freeze the "
                    f"parameter with requires_grad_(False)."
                )
            return
        contributions = self._fetch(parameter)
        for extension in self.extensions:
            vars(parameter).pop(extension.savefield, None)  # its memory is needed for the new result
        views: dict[Any, Individual] = {}
        for subset_key, subset in self._subsets().items():
            views[subset_key] = contributions.individual(subset)
            views[subset_key].prepare(
                name for extension in self.extensions if extension.subset.key == subset_key for name in extension.reads
            )
        for extension in self.extensions:
            grads = views[extension.subset.key]
            if self.debug:
                print(f"[DEBUG] {type(extension).__name__} on parameter {name} {list(parameter.shape)}")
            if extension.needs_all_parameters:
                self.postponed.append((extension, contributions, extension.measure(grads)))
            else:
                setattr(parameter, extension.savefield, extension.compute(grads))
        self.finished.add(key)
        self._modules_done(parameter)

    def _modules_done(self, parameter: Tensor) -> None:
        if self.extension_hook is None:
            return
        for module in WATCHED[parameter].owners:
            if all(id(p) in self.finished for p in trainable(module)):
                self.module_done(module)

    def module_done(self, module: Module) -> None:
        """Tell the user that a module has all its results."""
        self._enter_pass()
        if self.extension_hook is not None and id(module) not in self.hooked:
            self.hooked.add(id(module))
            self.extension_hook(module)

    def _end_pass(self) -> None:
        """What no hook of a parameter has fetched, and what needs all parameters."""
        with torch.set_grad_enabled(self.grad_mode):
            for source in list(self.sources.values()):
                if source.tensor.grad_fn is not None:
                    self.source_done(id(source.tensor))
            for source in list(self.sources.values()):
                self.parameter_done(source.tensor, source.name, received=False)
            for extension in self.extensions:
                own = [(found, measure) for other, found, measure in self.postponed if other is extension]
                if own:
                    joint = extension.combine([measure for _, measure in own])
                    for found, _ in own:
                        value = extension.compute_jointly(found.individual(extension.subset), joint)
                        setattr(found.tensor, extension.savefield, value)
        self.clear()


def _pull(tensor: Tensor, parameter: Tensor, cotangents: Tensor) -> Tensor:
    """Cotangents ``[v, n, *tensor]`` to ``[v, n, *parameter]``."""

    def pull(cotangent: Tensor) -> Tensor:
        create = torch.is_grad_enabled()
        return torch.autograd.grad(tensor, parameter, cotangent, retain_graph=True, create_graph=create)[0]

    HERE.muted, before = True, HERE.muted
    try:
        return map_samples(pull, cotangents, ())
    finally:
        HERE.muted = before


# ---------------------------------------------------------------------------------------------------------------
# Hooks on tensors


def _block(home: list[Block]) -> Block | None:
    """The block that a hook belongs to. Backward passes on a GPU run on PyTorch's threads: then that of the forward."""
    blocks = HERE.blocks or home
    return blocks[-1] if blocks and not HERE.muted else None


def deliver(call: Call, place: int, out: Tensor) -> None:
    """Attach the hooks that bring the cotangent of a call's output."""
    home = HERE.blocks
    kept = [call]

    def on_cotangent(grad: Tensor) -> None:
        if HERE.muted or not kept:
            return
        block = _block(home)
        if block is not None:
            block.receive(kept[0], place, grad)
        if not graph_is_kept() and not (block is not None and block.retain_graph):
            kept.clear()

    out.register_hook(on_cotangent)
    for tensor in {source.tensor for source, _ in call.uses if source.tensor.grad_fn is not None}:
        _hook_source(tensor, home)


def _hook_source(tensor: Tensor, home: list[Block]) -> None:
    """On a tensor computed from parameters: by its number, since a hook that held it would keep its graph alive."""
    if tensor in COMPUTED:
        return
    COMPUTED[tensor] = True
    key = id(tensor)

    def on_total(grad: Tensor) -> None:
        block = _block(home)
        if block is not None:
            block.source_done(key)

    tensor.register_hook(on_total)


COMPUTED: Any = WeakTensorKeyDictionary()
"""Tensors computed from parameters that have their hook."""


@dataclass(eq=False)
class Watched:
    """A parameter of extended modules: its hook, and the modules that own it."""

    handle: RemovableHandle
    owners: WeakSet[Module]


WATCHED: Any = WeakTensorKeyDictionary()
"""Parameter to ``Watched``."""


def trainable(module: Module) -> list[Tensor]:
    """The parameters of the module itself that receive gradients."""
    return [p for p in module._parameters.values() if p is not None and p.requires_grad]


def watch(module: Module, seen: set[tuple[int, int]]) -> list[tuple[str, Tensor]]:
    """See to it that each trainable parameter has its hook; returns them with their names.

    ``seen`` spares those of earlier calls. (Should a number in it be used again by a new parameter, that one's
    results are computed when the backward pass ends instead of while it runs.)
    """
    found = []
    for prefix, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.requires_grad:
                path = f"{prefix}.{name}" if prefix else name
                found.append((path, parameter))
                if (id(owner), id(parameter)) not in seen:
                    seen.add((id(owner), id(parameter)))
                    watched = WATCHED.get(parameter)
                    if watched is None:
                        hook = parameter.register_hook(_parameter_hook(TensorWeakRef(parameter), path, HERE.blocks))
                        watched = WATCHED[parameter] = Watched(hook, WeakSet())
                    watched.owners.add(owner)
    return found


def _parameter_hook(parameter: Any, name: str, home: list[Block]) -> Callable[[Tensor], None]:
    def on_total(grad: Tensor) -> None:
        block = _block(home)
        if block is not None:
            block.parameter_done(parameter(), name, received=True)

    return on_total


# ---------------------------------------------------------------------------------------------------------------
# Hooks on modules


@dataclass(eq=False)
class Extended:
    """What is kept of an extended module."""

    handles: list[RemovableHandle]
    settled: dict[Any, tuple[Any, ...]] = field(default_factory=dict)
    batch_axis: int = 0
    seen: set[tuple[int, int]] = field(default_factory=set)


EXTENDED: WeakKeyDictionary[Module, Extended] = WeakKeyDictionary()


def attach(module: Module, batch_axis: int = 0) -> None:
    """Put the hooks on one module."""
    if module not in EXTENDED:
        enter = module.register_forward_pre_hook(_enter, with_kwargs=True)
        leave = module.register_forward_hook(_leave, always_call=True)
        EXTENDED[module] = Extended([enter, leave], batch_axis=batch_axis)


def detach(module: Module) -> None:
    """Take all hooks off one module and its parameters."""
    extended = EXTENDED.pop(module, None)
    for handle in extended.handles if extended is not None else ():
        handle.remove()
    for parameter in module._parameters.values():
        watched = None if parameter is None else WATCHED.pop(parameter, None)
        if watched is not None:
            watched.handle.remove()


def _enter(module: Module, args: Any, kwargs: Any) -> None:
    """The outermost extended module opens the recording."""
    drop_interrupted()
    if HERE.recording is not None:
        HERE.depth += module is HERE.root
        return
    extended = EXTENDED.get(module)
    if extended is None or HERE.disabled or HERE.muted or not torch.is_grad_enabled():
        return
    parameters = watch(module, extended.seen)
    if parameters:
        recording = Recording(parameters, (args, kwargs), extended.batch_axis, deliver, extended.settled)
        recording.__enter__()
        HERE.recording, HERE.root, HERE.depth, HERE.frame = recording, module, 1, sys._getframe(1)


def drop_interrupted() -> None:
    """Close the recording of a forward pass that ended without running its hooks, as a keyboard interrupt does."""
    if HERE.recording is None:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not HERE.frame:
        frame = frame.f_back
    if frame is None:
        HERE.recording.__exit__(None, None, None)
        HERE.recording = HERE.root = HERE.frame = None


def _leave(module: Module, args: Any, output: Any) -> None:
    """The outermost extended module closes the recording; any other notes its output."""
    if module is HERE.root:
        HERE.depth -= 1
        if HERE.depth == 0:
            recording, HERE.recording, HERE.root, HERE.frame = HERE.recording, None, None, None
            assert recording is not None
            recording.__exit__(None, None, None)
            HERE.muted = True
            try:
                recording.settle(output)
            finally:
                HERE.muted = False
    if HERE.disabled or module._modules:
        return
    with unobserved():
        if trainable(module) or module not in EXTENDED:
            return
        leaves = [output] if isinstance(output, Tensor) else tree_leaves(output)
        tensor = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad), None)
        if tensor is not None:
            tensor.register_hook(_module_hook(module, HERE.blocks))


def _module_hook(module: Module, home: list[Block]) -> Callable[[Tensor], None]:
    def on_cotangent(grad: Tensor) -> None:
        block = _block(home)
        if block is not None:
            block.module_done(module)

    return on_cotangent
