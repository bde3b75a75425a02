"""Hooks of the forward pass, which leave notes at the nodes of extended modules' outputs.

The outermost extended module notes its arguments, a loss its input, and any module without children its inputs and
outputs. Nothing else happens before a backward pass begins.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.jit import ScriptModule
from torch.nn import Module, RNNBase
from torch.nn.parameter import Parameter, is_lazy
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef

from backpack.modules.calls import leave_note
from backpack.modules.loss_calls import WITH_HEADS, is_known_loss, leave_loss
from backpack.modules.module_io import LEFT, RULED, forget, is_ruled, leave_module_io
from backpack.modules.parameters import PARAMETERS, SHARDED, ParameterInfo, forget_parameter, trainable
from backpack.modules.thread_state import HERE
from backpack.torch_internals import caller, gathered_parameters, interpreted, is_fully_sharded


@dataclass(eq=False)
class Extended:
    """The state of one extended module.

    ``owned``: pairs of the ``id`` of a module in it and of a trainable parameter, as of the last backward pass.
    """

    handles: list[RemovableHandle]
    batch_axis: int = 0
    owned: list[int] = field(default_factory=list)
    trainable: ref[Tensor] | None = None
    """A parameter that was trainable the last time."""


EXTENDED: WeakKeyDictionary[Module, Extended] = WeakKeyDictionary()


def attach(module: Module) -> None:
    """Put the hooks on one module."""
    if module in EXTENDED:
        return
    batch_axis = int(isinstance(module, RNNBase) and not module.batch_first)
    _take_off_copies(module)
    handles = [module.register_forward_hook(_leave, with_kwargs=True, always_call=True)]
    if module._modules or is_fully_sharded(module):
        handles.append(module.register_forward_pre_hook(_enter))
    EXTENDED[module] = Extended(handles, batch_axis)


def attach_all(module: Module) -> None:
    """Put the hooks on a module and all modules in it."""
    for part in module.modules():
        if not isinstance(part, ScriptModule):
            attach(part)
    note_parameters(module)


def detach(module: Module) -> None:
    """Take all hooks off one module, and forget its parameters."""
    forget(module)
    extended = EXTENDED.pop(module, None)
    for handle in extended.handles if extended is not None else ():
        handle.remove()
    _take_off_copies(module)
    for parameter in module._parameters.values():
        if parameter is not None:
            forget_parameter(parameter)


def _take_off_copies(module: Module) -> None:
    """Take off the hooks that a copy of an extended module has."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if hook is _leave or hook is _enter]:
            del hooks[key]
            for further in (module._forward_hooks_with_kwargs, module._forward_hooks_always_called):
                further.pop(key, None)


def note_parameters(module: Module) -> list[Tensor]:
    """Note all trainable parameters of an extended module and the modules in it; returns all parameters.

    This happens when a backward pass begins. Most of the time nothing has changed since the last one.
    """
    extended, found = EXTENDED.get(module), list[Tensor]()
    if extended is None:
        return found
    owned: list[int] = []
    visited, pending = {id(module)}, [module]
    while pending:
        part = pending.pop()
        for parameter in part._parameters.values():
            if parameter is not None:
                found.append(parameter)
            if _is_trainable(parameter):
                owned += id(part), id(parameter)
        for child in part._modules.values():
            if child is not None and id(child) not in visited:
                visited.add(id(child))
                pending.append(child)
    if owned == extended.owned:
        return found
    extended.owned = owned
    for prefix, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if _is_trainable(parameter):
                path = f"{prefix}.{name}" if prefix else name
                if parameter not in PARAMETERS:
                    PARAMETERS[parameter] = ParameterInfo(path)
                PARAMETERS[parameter].add(owner, path)
    return found


def _is_trainable(parameter: Tensor | None) -> TypeGuard[Tensor]:
    if parameter is None or not parameter.requires_grad:
        return False
    return type(parameter) is Parameter or not is_lazy(parameter)


@interpreted
def _enter(module: Module, args: Any) -> None:
    """Notice when the forward pass of the outermost extended module begins; for modules that have others in them."""
    drop_interrupted()
    here = HERE
    if here.root is not None:
        here.depth += module is here.root
    elif not (here.disabled or here.muted) and torch.is_grad_enabled() and _learns(module):
        if here.blocks and here.blocks[-1].may_rerun_model:
            here.random = random_state()  # the module may have to run again
        here.frame, here.depth = caller(), 1
        here.root = module
    if "torch.distributed.fsdp" in sys.modules and is_fully_sharded(module):
        _note_gathered(module)


def random_state() -> list[Tensor]:
    """The states of PyTorch's generators of random numbers."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _learns(module: Module) -> bool:
    """Whether an extended module, or one in it, has a trainable parameter; a copy of one is extended first."""
    if module not in EXTENDED:
        if hasattr(module, "_is_replica"):  # of a data-parallel module, which lives for one forward pass
            return False
        attach_all(module)
    extended = EXTENDED[module]
    known = None if extended.trainable is None else extended.trainable()
    if known is not None and known.requires_grad:
        return True
    found = next((parameter for parameter in module.parameters() if parameter.requires_grad), None)
    extended.trainable = None if found is None else ref(found)
    return found is not None


def _note_gathered(module: Module) -> None:
    """Note the whole parameters that a fully sharded module has gathered for its forward pass."""
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
    """Leave the notes of a call: of the outermost extended module, of a loss, and of a module without children."""
    here = HERE
    root, random = here.root, here.random
    if module is root:
        here.depth -= 1
        if here.depth == 0:
            _close()
    if here.disabled or here.muted or not torch.is_grad_enabled():
        return
    if "torch.distributed.fsdp" in sys.modules and is_fully_sharded(module):
        _note_gathered(module)
    if here.root is None and (module is root or (root is None and _learns(module))):
        leave_note(module, args, kwargs, output, EXTENDED[module].batch_axis, random)
    is_loss = isinstance(module, WITH_HEADS) or (root is None and not any(p.requires_grad for p in module.parameters()))
    if module._modules and is_loss:
        _leave_loss(module, args, kwargs, output)
    if module._modules and not (RULED and is_ruled(module)):
        return
    if LEFT:
        forget(module)
    if not module._modules and (root is None or is_known_loss(module)) and not trainable(module):
        _leave_loss(module, args, kwargs, output)
    leave_module_io(module, args, kwargs, output, bool(here.blocks and here.blocks[-1].extension_hook))


def _leave_loss(module: Module, args: Any, kwargs: Any, output: Any) -> None:
    """Note the call of a module without trainable parameters: a loss, if it is one of PyTorch's or returns a scalar.

    Whether one that returns a value for each row or position is a loss is known when a backward pass begins.
    """
    if not isinstance(output, Tensor):
        return
    is_certain = output.dim() == 0 or is_known_loss(module)
    leave_loss(module, args, kwargs, output, is_certain)
