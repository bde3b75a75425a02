"""The backward pass: runs the quantities on what is delivered, and writes the results to the parameters.

Parameters are finished one by one while the pass runs: a hook on the output of each recorded call brings the
cotangent, a hook on the parameter itself, which PyTorch runs when all its uses have contributed, computes what the
active extensions ask for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor
from torch.nn import Module

from backpack.compat import graph_task, running_node, when_backward_ends
from backpack.passages import Passage, serve
from backpack.quantities import Quantity
from backpack.recorder import Call, Recording
from backpack.watched import SHARDED, WATCHED, trainable


class Receiver(Protocol):
    """A pass that cotangents are delivered to."""

    def receive(self, call: Call, place: int, grads: Tensor) -> None:
        """Note the cotangents ``[v, ...]`` of one of a call's outputs."""

    def module_passed(self, passage: Passage, g_out: tuple[Tensor | None, ...]) -> None:
        """The cotangents of a module's outputs have arrived."""


class _Thread(threading.local):
    """What one thread is doing."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.recording: Recording | None = None
        self.closing = ExitStack()
        self.root: Module | None = None
        self.depth = 0
        self.frame: FrameType | None = None
        self.disabled = 0
        self.muted = False
        self.inner: Receiver | None = None
        self.expanded = False


HERE = _Thread()


@contextmanager
def muted() -> Iterator[None]:
    """What happens inside is not recorded, nor delivered."""
    HERE.muted, before = True, HERE.muted
    try:
        yield
    finally:
        HERE.muted = before


@contextmanager
def expanded() -> Iterator[None]:
    """Modules that run inside are recorded with functions that have second derivatives in the place of fused ones."""
    HERE.expanded, before = True, HERE.expanded
    try:
        yield
    finally:
        HERE.expanded = before


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Contractions are in the data type of the parameters, also where ``backward`` runs under ``torch.autocast``."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


@dataclass(eq=False)
class Block:
    """One ``with backpack(...)``: its extensions, and what the running backward pass has delivered so far."""

    extensions: tuple[Quantity, ...]
    extension_hook: Callable[[Module], None] | None = None
    debug: bool = False
    retain_graph: bool = False
    task: int = -1
    seen: set[int] = field(default_factory=set)
    hooked: set[int] = field(default_factory=set)
    finished: set[int] = field(default_factory=set)
    passages: dict[int, Passage] = field(default_factory=dict)
    pulled: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    applied: set[tuple[int, int]] = field(default_factory=set)
    stored: list[tuple[Tensor, str]] = field(default_factory=list)
    grad_mode: bool = False
    loss_factor: float = 1.0
    """That of a scaler, by which the loss is multiplied before ``backward()``."""
    loss_seen: bool = False
    is_planned: bool = False
    """Whether a pass of first order is under way, which knows that there are uses of parameters."""
    is_continued: bool = False
    """Whether a pass that ended at a model's output is continued below, by a pass of our own."""
    taker: Callable[[Tensor, str, Any], None] | None = None
    """What takes the results, in place of the parameters."""
    manager: ref[Any] | None = None
    """The context manager that takes the block off again."""

    def __post_init__(self) -> None:
        self.first_order = [extension for extension in self.extensions if extension.seeds is None]
        self.second_order: list[Any] = [extension for extension in self.extensions if extension.seeds is not None]
        self.with_rules = [extension for extension in self.extensions if extension.rules]
        groups: dict[Any, list[Quantity]] = {}
        for extension in self.first_order:
            groups.setdefault(extension.subset.key, []).append(extension)
        self.groups = list(groups.values())
        """Those of first order, by the samples that they are of."""
        self.reads_passages = bool(self.extension_hook or self.retain_graph or self.with_rules)
        self.has_callbacks = bool(self.second_order) or self.reads_passages
        """Whether hooks of the forward pass take part in a backward pass, and its end has to be noticed by PyTorch."""

    def clear(self) -> None:
        """Forget what a backward pass delivered; of one that has failed, also what it stored."""
        for parameter, savefield in self.stored:
            vars(parameter).pop(savefield, None)
        self.stored.clear()
        for store in (self.seen, self.hooked, self.finished, self.passages, self.pulled, self.applied):
            store.clear()

    def enter_pass(self) -> None:
        """Begin anew when another backward pass has begun."""
        if self.has_callbacks and self.task != graph_task() and not self.is_continued:
            self.clear()
            self.task = graph_task()
            self.loss_seen = False
            self.grad_mode = torch.is_grad_enabled()
            when_backward_ends(self._end_pass)

    def check_subsets(self, n: int, device: torch.device) -> None:
        """Raise where a subset does not fit a batch of ``n`` samples."""
        for extension in self.extensions:
            extension.subset.rows(n, device)

    def store(self, parameter: Tensor, savefield: str, value: Any) -> None:
        """Write a result."""
        if self.taker is not None:
            self.taker(parameter, savefield, value)
            return
        setattr(parameter, savefield, value)
        self.stored.append((parameter, savefield))

    def receive(self, call: Call, place: int, grads: Tensor) -> None:
        """Note that a pass has come to one of a call's outputs."""
        if self.second_order:
            self.enter_pass()
            self._check_loss()
            for source in call.sources:
                self.seen.update(map(id, source.parameters))

    def _check_loss(self) -> None:
        if self.second_order and not self.loss_seen:
            names = ", ".join(type(extension).__name__ for extension in self.second_order)
            raise RuntimeError(
                f"{names}: the backward pass did not start from an extended loss. Write lossfunc = extend(lossfunc) "
                f"before the forward pass, and call backward() on its output."
            )

    def parameter_done(self, parameter: Tensor, name: str, grad: Tensor | None = None) -> None:
        """A parameter has its gradient. ``grad``: what it receives."""
        self.enter_pass()
        if grad is not None and self.extensions and id(parameter) not in self.seen:
            raise RuntimeError(
                f"Parameter {name} of shape {list(parameter.shape)} receives a gradient, but none of its uses was "
                f"seen: it was used outside of a forward call of the extended module, or inside of something that "
                f"hides its functions (a compiled or scripted module, a custom autograd.Function, a data-parallel "
                f"replica, a checkpointed or disabled region). Call the extended module itself, or freeze the "
                f"parameter with requires_grad_(False)."
            )
        self.finished.add(id(parameter))
        self.owners_done(parameter, self.finished)

    def owners_done(self, parameter: Tensor, finished: set[int]) -> None:
        """Tell the user of the modules that have all their results now."""
        if self.extension_hook is None or parameter not in WATCHED:
            return
        for module in WATCHED[parameter].owners:
            if all(id(p) in finished for p in trainable(module)):
                self.module_done(module)

    def module_passed(self, passage: Passage, g_out: tuple[Tensor | None, ...]) -> None:
        """The cotangents of a module's outputs have arrived."""
        self.enter_pass()
        if self.retain_graph:
            passage.leave()
        for extension in self.with_rules:
            rule = extension.rule_for(passage.module)
            if rule is not None:
                self._apply(extension, rule, passage, g_out)
        if not trainable(passage.module):
            self.module_done(passage.module, passage)
        elif self.extension_hook is not None:
            passage.hold()
            self.passages[id(passage.module)] = passage

    def _apply(self, extension: Quantity, rule: Any, passage: Passage, g_out: tuple[Tensor | None, ...]) -> None:
        """Let a user's rule compute the results of a module's parameters."""
        self._check_loss()
        module, key = passage.module, (id(extension), id(passage.module))
        if key in self.applied:
            raise RuntimeError(
                f"{type(module).__name__} was called several times, and the results of {type(rule).__name__} for each "
                f"call can't be joined. Call it once, or do without the rule: none is needed for any module."
            )
        self.applied.add(key)
        g_inp = passage.gradients(running_node(), g_out)
        columns = torch.cat(self.pulled.pop(key)) if key in self.pulled else None
        with muted(), passage.served():
            rule.check_hyperparameters_module_extension(extension, module, g_inp, g_out)
            for name in rule.params:
                parameter = module._parameters.get(name)
                if parameter is None or not parameter.requires_grad:
                    continue
                if parameter in WATCHED and len(WATCHED[parameter].owners) > 1:
                    raise RuntimeError(
                        f"Parameter {name} of {type(module).__name__} belongs to several modules: the result of "
                        f"{type(rule).__name__} can't be joined with that of the others. Do without the rule."
                    )
                self.seen.add(id(parameter))
                value = getattr(rule, name)(extension, module, g_inp, g_out, columns)
                self.store(parameter, extension.savefield, value)

    def module_done(self, module: Module, passage: Passage | None = None) -> None:
        """Tell the user that a module has all its results."""
        if self.extension_hook is not None and id(module) not in self.hooked:
            self.hooked.add(id(module))
            with muted(), serve(passage or self.passages.pop(id(module), None)):
                self.extension_hook(module)

    def _end_pass(self) -> None:
        """A pass has ended well; one of first order may still be continued."""
        if self.extensions and not (self.is_planned or self.seen or self.stored):
            self.nothing_reached()
        self.hand_over()
        if not self.first_order:
            self.stored.clear()
            self.clear()

    def nothing_reached(self) -> None:
        """Raise, since a pass that an extended module took part in came to no parameter."""
        raise RuntimeError(
            "The backward pass reached no trainable parameter of an extended module, so nothing was computed. "
            "Call extend(model) before the forward pass; of frozen parameters, requires_grad_() those whose "
            "results are wanted."
        )

    def hand_over(self) -> None:
        """Move results from gathered parameters, which users do not see, to the sharded ones."""
        for whole, reference in list(SHARDED.items()) if SHARDED else ():
            sharded = reference()
            for extension in self.extensions if sharded is not None else ():
                if extension.savefield in vars(whole):
                    setattr(sharded, extension.savefield, vars(whole).pop(extension.savefield))
