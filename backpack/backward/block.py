"""A block ``with backpack(...)``: what it computes, and what has been stored in the running backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import Module

from backpack.extensions.interface import Quantity
from backpack.modules.module_io import ModuleIO, serve
from backpack.modules.parameters import PARAMETERS, SHARDED, trainable
from backpack.modules.thread_state import HERE, muted
from backpack.samples import SampleIds


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Contractions are in the data type of the parameters, also where ``backward`` runs under ``torch.autocast``."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


@dataclass(eq=False)
class Block:
    """One ``with backpack(...)``: its extensions, and what the running backward pass has computed so far.

    ``finished``: ids of parameters that have all results of first order; ``hooked``: ids of modules for which the
    user's hook was called; ``module_io``: calls of modules whose results are not complete yet; ``pulled``: columns at
    the outputs of modules with a rule; ``applied``: rules that were applied, each with its module; ``stored``: where
    results were stored; ``ran``: whether a backward pass of an extended module ran inside of the block.
    """

    extensions: tuple[Quantity, ...]
    extension_hook: Callable[[Module], None] | None = None
    debug: bool = False
    retain_graph: bool = False
    ids: SampleIds | None = None
    """Which sample each leading entry of a model's output belongs to; ``None``: their first axis counts them."""
    hooked: set[int] = field(default_factory=set)
    finished: set[int] = field(default_factory=set)
    module_io: dict[int, ModuleIO] = field(default_factory=dict)
    pulled: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    applied: set[tuple[int, int]] = field(default_factory=set)
    stored: list[tuple[Tensor, str]] = field(default_factory=list)
    ran: bool = False
    may_rerun_model: bool = False
    """Whether an extension may have to run the model again, with functions that have second derivatives."""
    keeps_graph: bool = False
    """Whether a result needs the graph after the backward pass, so that PyTorch must not free it."""
    averaged: int | None = None
    """How many samples the loss is a mean over, ``None`` for a sum, where an extension must know."""
    loss_factor: float = 1.0
    """The factor of a gradient scaler, by which the loss is multiplied before ``backward()``."""
    taker: Callable[[Tensor, str, Any], None] | None = None
    """Function that takes each result; ``None``: results are stored on the parameters."""
    only: Callable[[Tensor], bool] | None = None
    """Which parameters results are computed for, if not for all; others may have some that are as cheap."""
    manager: ref[Any] | None = None
    """The context manager of the block."""

    def __post_init__(self) -> None:
        self.first_order = [extension for extension in self.extensions if extension.seeds is None]
        self.second_order: list[Any] = [extension for extension in self.extensions if extension.seeds is not None]
        self.with_rules = [extension for extension in self.extensions if extension.rules]
        groups: dict[Any, list[Quantity]] = {}
        for extension in self.first_order:
            groups.setdefault(extension.subset.key, []).append(extension)
        self.groups = list(groups.values())
        """The extensions of first order, grouped by the subset of samples that they are computed for."""
        self.reads_module_io = bool(self.extension_hook or self.retain_graph or self.with_rules)

    def clear(self) -> None:
        """Forget the state of a backward pass, and delete the results that it stored and that were not confirmed."""
        for parameter, savefield in self.stored:
            vars(parameter).pop(savefield, None)
        self.stored.clear()
        self.keeps_graph = False
        for store in (self.hooked, self.finished, self.module_io, self.pulled, self.applied):
            store.clear()

    def take_off(self, parameters: Iterable[Tensor]) -> None:
        """Delete the results of an earlier pass, so that nobody takes them for new ones."""
        for parameter in parameters:
            fields = vars(parameter)
            for extension in self.extensions:
                fields.pop(extension.savefield, None)

    def check(self, n: int, parameters: Sequence[Tensor]) -> None:
        """Raise where an extension does not fit a batch of ``n`` samples, or these parameters."""
        device = parameters[0].device if parameters else torch.device("cpu")
        for extension in self.extensions:
            extension.subset.rows(n, device)
            if extension.against is not None:
                extension.against.rows(n, device)
            extension.check(parameters, n if self.ids is None else self.ids.count)

    def store(self, parameter: Tensor, savefield: str, value: Any) -> None:
        """Write a result."""
        if self.taker is not None:
            self.taker(parameter, savefield, value)
            return
        setattr(parameter, savefield, value)
        self.stored.append((parameter, savefield))

    def parameter_done(self, parameter: Tensor) -> None:
        """Note that a parameter has all its results of first order."""
        self.finished.add(id(parameter))
        self.owners_done(parameter, self.finished)

    def owners_done(self, parameter: Tensor, finished: set[int]) -> None:
        """Call the user's hook with those modules of a parameter that have all their results now."""
        if self.extension_hook is None or parameter not in PARAMETERS:
            return
        for module in PARAMETERS[parameter].owners:
            if all(id(p) in finished for p in trainable(module)):
                self.module_done(module)

    def outputs_arrived(self, io: ModuleIO, node: Node, grads: tuple[Tensor | None, ...]) -> None:
        """The cotangents of a module's outputs have arrived at the node that computed the first."""
        if HERE.muted or HERE.inner is not None:
            return
        if self.retain_graph:
            io.leave()
        g_out = tuple(grads[number] for number in io.numbers)
        for extension in self.with_rules:
            rule = extension.rule_for(io.module)
            if rule is not None:
                self._apply(extension, rule, io, node, g_out)
        if not trainable(io.module) or not self.first_order:
            self.module_done(io.module, io)
        elif self.extension_hook is not None:
            io.hold()
            self.module_io[id(io.module)] = io

    def _apply(
        self, extension: Quantity, rule: Any, io: ModuleIO, node: Node, g_out: tuple[Tensor | None, ...]
    ) -> None:
        """Let a user's rule compute the results of a module's parameters."""
        module, key = io.module, (id(extension), id(io.module))
        if key in self.applied:
            raise RuntimeError(
                f"{type(module).__name__} was called several times, and the results of {type(rule).__name__} for each "
                f"call can't be joined. Call it once, or do without the rule: none is needed for any module."
            )
        self.applied.add(key)
        g_inp = io.gradients(node, g_out)
        columns = torch.cat(self.pulled.pop(key)) if key in self.pulled else None
        with muted(), io.served():
            rule.check_hyperparameters_module_extension(extension, module, g_inp, g_out)
            for name in rule.params:
                parameter = module._parameters.get(name)
                if parameter is None or not parameter.requires_grad:
                    continue
                if parameter in PARAMETERS and len(PARAMETERS[parameter].owners) > 1:
                    raise RuntimeError(
                        f"Parameter {name} of {type(module).__name__} belongs to several modules: the result of "
                        f"{type(rule).__name__} can't be joined with that of the others. Do without the rule."
                    )
                value = getattr(rule, name)(extension, module, g_inp, g_out, columns)
                self.store(parameter, extension.savefield, value)

    def module_done(self, module: Module, io: ModuleIO | None = None) -> None:
        """Call the user's hook with a module that has all its results."""
        if self.extension_hook is not None and id(module) not in self.hooked:
            self.hooked.add(id(module))
            with muted(), serve(io or self.module_io.pop(id(module), None)):
                self.extension_hook(module)

    def hand_over(self) -> None:
        """Move results from gathered parameters, which users do not see, to the sharded ones."""
        for whole, reference in list(SHARDED.items()) if SHARDED else ():
            sharded = reference()
            for extension in self.extensions if sharded is not None else ():
                if extension.savefield in vars(whole):
                    setattr(sharded, extension.savefield, vars(whole).pop(extension.savefield))
