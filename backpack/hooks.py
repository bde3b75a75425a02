"""Hooks of the forward pass: what extended modules leave at the nodes of their outputs.

The outermost extended module notes what it was called with, a loss its input, and any module without children what came
in and out. Nothing else happens before a backward pass begins.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.loss import _Loss
from torch.nn.parameter import Parameter, is_lazy
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef

from backpack.compat import caller, gathered_parameters, interpreted, is_fully_sharded
from backpack.curvature.loss_call import has_second_derivatives_of_model, leave_loss
from backpack.losses import ROOTS
from backpack.curvature.rerun import random_state
from backpack.engine import HERE
from backpack.passages import LEFT, forget, is_ruled, leave_passage
from backpack.samples.notes import leave_note
from backpack.watched import SHARDED, WATCHED, Watched, trainable, unwatch


@dataclass(eq=False)
class Extended:
    """What is kept of an extended module.

    ``owned``: the numbers of its modules and trainable parameters, in pairs, when they were last looked at.
    """

    handles: list[RemovableHandle]
    batch_axis: int = 0
    owned: list[int] = field(default_factory=list)


EXTENDED: WeakKeyDictionary[Module, Extended] = WeakKeyDictionary()


def attach(module: Module, batch_axis: int = 0) -> None:
    """Put the hooks on one module."""
    if module in EXTENDED:
        return
    handles = [module.register_forward_hook(_leave, with_kwargs=True, always_call=True)]
    if module._modules or is_fully_sharded(module):
        handles.append(module.register_forward_pre_hook(_enter))
    EXTENDED[module] = Extended(handles, batch_axis)


def detach(module: Module) -> None:
    """Take all hooks off one module, and forget its parameters."""
    forget(module)
    extended = EXTENDED.pop(module, None)
    for handle in extended.handles if extended is not None else ():
        handle.remove()
    for parameter in module._parameters.values():
        if parameter is not None:
            unwatch(parameter)


def watch(module: Module) -> None:
    """See to it that each trainable parameter of an extended module and all below it is known.

    They are looked at when a backward pass begins: most of the time nothing has changed since the last one.
    """
    extended = EXTENDED.get(module)
    if extended is None:
        return
    owned: list[int] = []
    visited, pending = {id(module)}, [module]
    while pending:
        part = pending.pop()
        for parameter in part._parameters.values():
            if _is_trainable(parameter):
                owned += id(part), id(parameter)
        for child in part._modules.values():
            if child is not None and id(child) not in visited:
                visited.add(id(child))
                pending.append(child)
    if owned == extended.owned:
        return
    extended.owned = owned
    for prefix, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if _is_trainable(parameter):
                if parameter not in WATCHED:
                    WATCHED[parameter] = Watched(f"{prefix}.{name}" if prefix else name)
                WATCHED[parameter].add(owner)


def _is_trainable(parameter: Tensor | None) -> TypeGuard[Tensor]:
    if parameter is None or not parameter.requires_grad:
        return False
    return type(parameter) is Parameter or not is_lazy(parameter)


@interpreted
def _enter(module: Module, args: Any) -> None:
    """Of modules that have others in them: notice the outermost."""
    drop_interrupted()
    if module not in EXTENDED:  # a copy
        return
    if HERE.root is not None:
        HERE.depth += module is HERE.root
    elif not (HERE.disabled or HERE.muted) and torch.is_grad_enabled() and _learns(module):
        if HERE.blocks and has_second_derivatives_of_model(HERE.blocks[-1]):
            HERE.random = random_state()  # the module may have to run again
        HERE.frame, HERE.depth = caller(), 1
        HERE.root = module
    if is_fully_sharded(module):
        _watch_gathered(module)


def _learns(module: Module) -> bool:
    """Whether a parameter of a module, or of one in it, is trainable."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _watch_gathered(module: Module) -> None:
    """Know the whole parameters that a fully sharded module has gathered for its forward pass."""
    for whole, sharded in gathered_parameters(module):
        if whole.requires_grad:
            SHARDED[whole] = TensorWeakRef(sharded)


def drop_interrupted() -> None:
    """Forget a forward pass that ended without running its hooks, as a keyboard interrupt does."""
    if HERE.root is None:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not HERE.frame:
        frame = frame.f_back
    if frame is None:
        _close()


def _close() -> None:
    HERE.root = HERE.frame = HERE.random = None
    HERE.depth = 0


@interpreted
def _leave(module: Module, args: Any, kwargs: Any, output: Any) -> None:
    """The outermost extended module notes its outputs, those without children their passage."""
    root, random = HERE.root, HERE.random
    if module is root:
        HERE.depth -= 1
        if HERE.depth == 0:
            _close()
    if is_fully_sharded(module):
        _watch_gathered(module)
    extended = EXTENDED.get(module)  # of a copy: none
    if extended is None or HERE.disabled or HERE.muted or not torch.is_grad_enabled():
        return
    if HERE.root is None and (module is root or (root is None and _learns(module))):
        leave_note(module, args, kwargs, output, extended.batch_axis, random)
    if module._modules and not is_ruled(module):
        return
    if LEFT:
        forget(module)
    loss = _is_loss(module, output, root)
    if loss:
        leave_loss(module, args, kwargs, output)
    leave_passage(module, args, kwargs, output, loss or bool(HERE.blocks and HERE.blocks[-1].extension_hook))


def _is_loss(module: Module, output: Any, root: Module | None) -> bool:
    """Whether a module is a loss: it has no trainable parameter, and PyTorch's are known, others return a scalar."""
    if not isinstance(output, Tensor) or module._modules:
        return False
    if not isinstance(module, _Loss) and ROOTS.keys().isdisjoint(type(module).__mro__):
        if root is not None or output.dim() > 0:
            return False
    return not trainable(module)
