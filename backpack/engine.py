"""The backward pass: runs the quantities on what is delivered, and writes the results to the parameters.

Parameters are finished one by one while the pass runs: a hook on the output of each recorded call brings the
cotangent, a hook on the parameter itself, which PyTorch runs when all its uses have contributed, computes what the
active extensions ask for.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Module

from backpack.bystanders import undisturbed
from backpack.compat import graph_task, running_node, when_backward_ends
from backpack.delivery import Contributions, Delivery
from backpack.missed import find_missed, leave_out, pull_on
from backpack.passages import Passage, serve
from backpack.quantities import Quantity
from backpack.recorder import Call, Recording
from backpack.samples import Subset
from backpack.uses import Derived, Explicit
from backpack.watched import SHARDED, WATCHED, Watched, trainable, without_rules


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
    delivery: Delivery = field(default_factory=Delivery)
    postponed: list[tuple[Quantity, Contributions, Tensor]] = field(default_factory=list)
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
    starts: list[tuple[Node, dict[int, int]]] = field(default_factory=list)
    """Where the pass came into outputs of extended modules, and how often these used each parameter."""
    stopped: list[tuple[GradientEdge, Tensor]] = field(default_factory=list)
    """Outputs of extended modules at which the pass ends, and their cotangents."""
    uses: Counter[int] = field(default_factory=Counter)
    """While the pass is continued from there: how often each parameter is used on the way."""
    partial: set[int] = field(default_factory=set)
    """Parameters of which the pass reached some uses only."""
    asked: bool = False
    """Whether a parameter receives a gradient."""
    unexplained: list[str] = field(default_factory=list)
    """Names of parameters that are used where nothing is recorded as well."""
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

    def clear(self) -> None:
        """Forget what a backward pass delivered; of one that has failed, also what it stored."""
        self.delivery.clear()
        self.postponed.clear()
        self.unexplained.clear()
        for parameter, savefield in self.stored:
            vars(parameter).pop(savefield, None)
        self.stored.clear()
        self.starts.clear()
        self.stopped.clear()
        for store in (self.seen, self.hooked, self.finished, self.passages, self.pulled, self.applied, self.partial):
            store.clear()

    def enter_pass(self) -> None:
        """Begin anew when another backward pass has begun."""
        if self.task != graph_task() and not self.uses:
            self.clear()
            self.task = graph_task()
            self.loss_seen = self.asked = False
            self.grad_mode = torch.is_grad_enabled()
            when_backward_ends(self._look_for_missed)
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
        """Note the cotangent of one of a call's outputs, ``[1, ...]``."""
        self.enter_pass()
        self._check_loss()
        for source in call.sources:
            self.seen.update(map(id, source.parameters))
        if self.first_order:
            self.check_subsets(call.n, grads.device)
            reached = self.delivery.receive(call, place, grads)
            if self.uses and not self.starts and call.outputs == 1 and not call.recomputed:
                for source in reached:
                    if source.tensor.grad_fn is None and self.uses[id(source.tensor)] == 1:
                        self.parameter_done(source.tensor, source.name)

    def _check_loss(self) -> None:
        if self.second_order and not self.loss_seen:
            names = ", ".join(type(extension).__name__ for extension in self.second_order)
            raise RuntimeError(
                f"{names}: the backward pass did not start from an extended loss. Write lossfunc = extend(lossfunc) "
                f"before the forward pass, and call backward() on its output."
            )

    def source_done(self, key: int) -> None:
        """Pull the individual gradients of a computed tensor on to its parameters; its graph is still there."""
        if key not in self.delivery.arrivals:
            return
        source = self.delivery.sources[key]
        contributions = self.delivery.fetch(source.tensor)
        with muted(), undisturbed(source.parameters), without_autocast(source.tensor.device):
            for subset_key, subset in self._subsets().items():
                grads = contributions.individual(subset)
                for parameter in source.parameters:
                    pulled = Explicit(Derived(grads, source.tensor, parameter).dense())
                    self.delivery.derive(source, parameter, subset_key, pulled)

    def _subsets(self) -> dict[Any, Subset]:
        return {extension.subset.key: extension.subset for extension in self.first_order}

    def parameter_done(
        self, parameter: Tensor, name: str, grad: Tensor | None = None, watched: Watched | None = None
    ) -> None:
        """All uses have contributed: compute the results. ``grad``: what the parameter receives."""
        self.enter_pass()
        self.asked = self.asked or grad is not None
        if grad is not None and self.extensions and id(parameter) not in self.seen:
            raise RuntimeError(
                f"Parameter {name} of shape {list(parameter.shape)} receives a gradient, but none of its uses was "
                f"seen: it was used outside of a forward call of the extended module, or inside of something that "
                f"hides its functions (a compiled or scripted module, a custom autograd.Function, a data-parallel "
                f"replica, a checkpointed or disabled region). Call the extended module itself, or freeze the "
                f"parameter with requires_grad_(False)."
            )
        if id(parameter) in self.partial:
            self.delivery.fetch(parameter)
        contributions = self.delivery.fetch(parameter)
        if contributions:
            with without_autocast(parameter.device):
                self._compute(contributions, name, grad, watched)
        self.finished.add(id(parameter))
        self.owners_done(parameter, self.finished)

    def _compute(self, contributions: Contributions, name: str, grad: Tensor | None, watched: Watched | None) -> None:
        parameter = contributions.tensor
        if grad is not None and watched is not None and not self._explained(watched, contributions, grad):
            self.unexplained.append(name)
        for group in self.groups:
            extensions = without_rules(group, parameter, name)
            if not extensions:
                continue
            for extension in extensions:
                vars(parameter).pop(extension.savefield, None)  # its memory is needed for the new result
            grads = contributions.individual(extensions[0].subset)
            grads.prepare([name for extension in extensions for name in extension.reads])
            for extension in extensions:
                if self.debug:
                    print(f"[DEBUG] {type(extension).__name__} on parameter {name} {list(parameter.shape)}")
                if extension.needs_all_parameters:
                    self.postponed.append((extension, contributions, extension.measure(grads)))
                else:
                    self.store(parameter, extension.savefield, extension.compute(grads))

    def _explained(self, watched: Watched, contributions: Contributions, grad: Tensor) -> bool:
        """Whether nothing else makes up a parameter's gradient; looked at once in each mode."""
        mode = watched.training
        if mode in watched.explained or contributions.further or grad.numel() == 0:
            return True
        watched.explained.add(mode)
        with torch.no_grad():
            return contributions.explain(grad)

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

    def _look_for_missed(self) -> None:
        """A pass that ends before parameters, as ``inputs=`` can have it, leaves no result on them, and no old one.

        But of those below an output of an extended module at which it ends, all results are wanted.
        """
        if self.stopped:
            try:
                with torch.set_grad_enabled(self.grad_mode):
                    pull_on(self.stopped, self.delivery, self.uses)
            finally:
                self.uses.clear()
        if self.first_order:
            missed, self.partial = find_missed(self.delivery, self.starts, self.seen, self.asked)
            if missed:
                leave_out(missed, self.first_order, self.asked)

    def _end_pass(self) -> None:
        """What no hook of a parameter has fetched, and what needs all parameters."""
        with torch.set_grad_enabled(self.grad_mode):
            for source in self.delivery.computed():
                self.source_done(id(source.tensor))
            for source in list(self.delivery.sources.values()):
                self.parameter_done(source.tensor, source.name)
            for extension in self.first_order:
                own = [(found, measure) for other, found, measure in self.postponed if other is extension]
                if own:
                    joint = extension.combine([measure for _, measure in own])
                    for found, _ in own:
                        with without_autocast(found.tensor.device):
                            value = extension.compute_jointly(found.individual(extension.subset), joint)
                        self.store(found.tensor, extension.savefield, value)
        self._hand_over()
        if self.extensions and not self.seen and not self.stored:
            raise RuntimeError(
                "The backward pass reached no trainable parameter of an extended module, so nothing was computed. "
                "Call extend(model) before the forward pass; of frozen parameters, requires_grad_() those whose "
                "results are wanted."
            )
        self.stored.clear()
        unexplained = ", ".join(self.unexplained)
        self.clear()
        if unexplained:
            warnings.warn(
                f"The gradients of {unexplained} have a part that belongs to no sample: these parameters are also used "
                f"outside of the forward calls of the extended module (a penalty like weight decay that is added to "
                f"the loss, a functional use elsewhere), or a hook changes a gradient. Individual quantities leave "
                f"that part out, and do not add up to p.grad. This is looked at in a model's first backward pass only.",
                stacklevel=2,
            )

    def _hand_over(self) -> None:
        """Move results from gathered parameters, which users do not see, to the sharded ones."""
        for whole, reference in list(SHARDED.items()) if SHARDED else ():
            sharded = reference()
            for extension in self.extensions if sharded is not None else ():
                if extension.savefield in vars(whole):
                    setattr(sharded, extension.savefield, vars(whole).pop(extension.savefield))
