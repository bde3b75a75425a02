"""All hooks: on extended modules, on their parameters, on the outputs of recorded calls and of losses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import Module
from torch.nn.modules.loss import _Loss
from torch.nn.parameter import Parameter, is_lazy
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef

from backpack import averaged_hessian as averaged_hessian  # it registers passes
from backpack import columns as columns  # as well
from backpack import products as products
from backpack.compat import (
    caller,
    ends_at,
    gathered_parameters,
    graph_is_kept,
    graph_task,
    hook,
    interpreted,
    is_fully_sharded,
    running_node,
    uncompiled,
    unobserved,
)
from backpack.engine import HERE, Block, muted
from backpack.landmarks import MARK, Origin
from backpack.loss_call import PASSES, LossCall
from backpack.losses import ROOTS
from backpack.passages import LEFT, Passage, forget, is_ruled, rest, wake
from backpack.recomputed import free_if_recomputed
from backpack.recorder import Call, Parameters, Recording, Source, tensors_in
from backpack.rerun import random_state
from backpack.samples.notes import leave_note
from backpack.seeds import SeedPass, tap
from backpack.watched import SHARDED, WATCHED, Watched, trainable, unwatch

# ---------------------------------------------------------------------------------------------------------------
# Hooks on tensors


def _block(home: list[Block], grad: Tensor | None) -> Block | None:
    """The block that a hook belongs to. Backward passes on a GPU run on PyTorch's threads: then that of the forward."""
    blocks = HERE.blocks or (home if grad is not None and grad.device.type != "cpu" else [])
    return blocks[-1] if blocks and not HERE.muted and HERE.inner is None else None


def _is_over(block: Block | None) -> bool:
    """Whether the running pass frees the graph from its present node on, so that none comes here again."""
    return not (graph_is_kept() or (block is not None and block.retain_graph) or ends_at(running_node()))


def deliver(call: Call, place: int, out: Tensor, shape: torch.Size) -> None:
    """Attach the hooks that bring the cotangent of a call's output, of this shape, which is ``out`` or a view of it."""
    home = HERE.blocks
    kept = [call]

    def on_cotangent(grad: Tensor | None) -> None:
        if HERE.muted or not kept or grad is None:  # none arrives behind what was replaced
            return
        if grad.shape != shape:
            grad = grad.reshape(shape)
        if isinstance(HERE.inner, SeedPass):
            tap(HERE.inner, partial(HERE.inner.receive, kept[0], place), grad)
            return
        block = _block(home, grad)
        if block is not None:
            if block.task != graph_task():
                _wake(block, home)
            block.receive(kept[0], place, grad[None])
        if _is_over(block):
            kept.clear()

    hook(out, on_cotangent)
    if HERE.recording is not None:
        free_if_recomputed(call, HERE.recording, out)


def watch(module: Module, extended: Extended) -> tuple[bool, ...]:
    """See to it that each trainable parameter of a module and all below it has its hook.

    Returns which of the modules are in training mode. They are looked at once, in each forward pass anew: most of the
    time nothing has changed since the last one.
    """
    owned: list[int] = []
    modes: list[bool] = []
    visited, pending = {id(module)}, [module]
    while pending:
        part = pending.pop()
        modes.append(part.training)
        for parameter in part._parameters.values():
            if _is_trainable(parameter):
                owned += id(part), id(parameter)
        for child in part._modules.values():
            if child is not None and id(child) not in visited:
                visited.add(id(child))
                pending.append(child)
    if owned != extended.owned:
        extended.parameters, extended.owned = _watch_anew(module, extended.parameters.sources), owned
    return tuple(modes)


def _is_trainable(parameter: Tensor | None) -> TypeGuard[Tensor]:
    if parameter is None or not parameter.requires_grad:
        return False
    return type(parameter) is Parameter or not is_lazy(parameter)


def _watch_anew(module: Module, known: dict[int, Source]) -> Parameters:
    found: dict[int, Source] = {}
    for prefix, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if _is_trainable(parameter):
                key, path = id(parameter), f"{prefix}.{name}" if prefix else name
                if key not in found:
                    found[key] = known.get(key) or Source(parameter, (parameter,), path)
                watched = WATCHED.get(parameter)
                if watched is None:
                    watched = Watched(path)
                    WATCHED[parameter] = watched
                    if RECORD:
                        on_total = _parameter_hook(TensorWeakRef(parameter), watched, HERE.blocks)
                        watched.handle = parameter.register_hook(on_total)
                watched.add(owner)
    return Parameters(found.values())


def _parameter_hook(parameter: Any, watched: Watched, home: list[Block]) -> Callable[[Tensor], None]:
    def on_total(grad: Tensor) -> None:
        block = _block(home, grad)
        if block is not None and (HERE.blocks or block.task == graph_task()):
            block.parameter_done(parameter(), watched.name, grad)

    return on_total


# ---------------------------------------------------------------------------------------------------------------
# Hooks on modules


@dataclass(eq=False)
class Extended:
    """What is kept of an extended module.

    ``owned``: the numbers of its modules and trainable parameters, in pairs, when it was last called.
    """

    handles: list[RemovableHandle]
    settled: dict[Any, tuple[Any, ...]] = field(default_factory=dict)
    batch_axis: int = 0
    owned: list[int] = field(default_factory=list)
    parameters: Parameters = field(default_factory=Parameters)


EXTENDED: WeakKeyDictionary[Module, Extended] = WeakKeyDictionary()

RECORD = True
"""Whether forward passes are recorded for second order. First order reads the graph; benchmarks measure it alone."""


def attach(module: Module, batch_axis: int = 0) -> None:
    """Put the hooks on one module."""
    if module not in EXTENDED:
        enter = module.register_forward_pre_hook(_enter, with_kwargs=True)
        leave = module.register_forward_hook(_leave, with_kwargs=True, always_call=True)
        EXTENDED[module] = Extended([enter, leave], batch_axis=batch_axis)


def detach(module: Module) -> None:
    """Take all hooks off one module and its parameters."""
    forget(module)
    extended = EXTENDED.pop(module, None)
    for handle in extended.handles if extended is not None else ():
        handle.remove()
    for parameter in module._parameters.values():
        if parameter is not None:
            unwatch(parameter)


@interpreted
def _enter(module: Module, args: Any, kwargs: Any) -> None:
    """The outermost extended module opens the recording."""
    if not RECORD:
        _enter_unrecorded(module)
        return
    drop_interrupted()
    if HERE.recording is not None:
        HERE.depth += module is HERE.root
        if is_fully_sharded(module):
            _watch_gathered(module, HERE.recording)
        return
    extended = EXTENDED.get(module)
    if extended is None or HERE.disabled or HERE.muted or not torch.is_grad_enabled():
        return
    modes = watch(module, extended)
    if extended.owned and RECORD:
        axis, settled = extended.batch_axis, extended.settled
        recording = Recording(extended.parameters, (args, kwargs), axis, deliver, settled, HERE.expanded, modes)
        if HERE.blocks and any(PASSES[extension.backprop].twice for extension in HERE.blocks[-1].second_order):
            recording.random = random_state()  # the module may have to run again
        # Noted before it is begun: an interrupt at any point in between is found by what runs next.
        HERE.recording, HERE.root, HERE.depth, HERE.frame = recording, module, 1, caller()
        if (stance := uncompiled()) is not None:
            HERE.closing.enter_context(stance)
        recording.__enter__()
        if is_fully_sharded(module):
            _watch_gathered(module, recording)


def _enter_unrecorded(module: Module) -> None:
    if HERE.root is not None:
        HERE.depth += module is HERE.root
        return
    wanted = not HERE.disabled and not HERE.muted and torch.is_grad_enabled()
    if wanted and any(p.requires_grad for p in module.parameters()):
        HERE.root, HERE.depth = module, 1


def _watch_gathered(module: Module, recording: Recording) -> None:
    """Record uses of the whole parameters that a fully sharded module has gathered for its forward pass."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for whole, sharded in gathered_parameters(module):
        if whole.requires_grad:
            SHARDED[whole] = TensorWeakRef(sharded)
            recording.tensors.append(ref(whole))
            recording.sources[id(whole)] = Source(whole, (whole,), names.get(id(whole), "of a fully sharded module"))
    watch(module, EXTENDED[module])


def drop_interrupted() -> None:
    """Close the recording of a forward pass that ended without running its hooks, as a keyboard interrupt does."""
    if HERE.recording is None:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not HERE.frame:
        frame = frame.f_back
    if frame is None:
        _close(HERE.recording)


def _close(recording: Recording) -> None:
    """End a recording; what is interrupted in here is done again by ``drop_interrupted``."""
    recording.__exit__(None, None, None)
    HERE.closing.close()
    HERE.recording = HERE.root = HERE.frame = None


@interpreted
def _leave(module: Module, args: Any, kwargs: Any, output: Any) -> None:
    """The outermost extended module closes the recording; any other notes its output."""
    recorded = HERE.recording is not None
    if module is HERE.root:
        HERE.depth -= 1
        if HERE.depth == 0 and not RECORD:
            HERE.root = None
            leave_note(module, args, kwargs, output, EXTENDED[module].batch_axis)
        elif HERE.depth == 0:
            recording = HERE.recording
            assert recording is not None
            _close(recording)
            with muted():
                _conclude(recording, module, args, kwargs, output)
    if HERE.disabled or HERE.muted or not torch.is_grad_enabled() or (module._modules and not is_ruled(module)):
        return
    with unobserved():
        if LEFT:
            forget(module)
        tensors = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        if tensors and module in EXTENDED:
            loss, ruled = _is_loss(module, tensors[0], recorded), is_ruled(module)
            keep = loss or ruled or bool(HERE.blocks and HERE.blocks[-1].extension_hook)
            passage = Passage.of(module, (*args, *kwargs.values()), output, tensors, keep)
            if RECORD and loss and _hook_loss(passage, args, kwargs, tensors[0], ruled):
                return
            _leave_passage(passage, tensors, eager=RECORD and (ruled or not recorded))


def _conclude(recording: Recording, module: Module, args: Any, kwargs: Any, output: Any) -> None:
    """Settle where samples lie, and leave at the outputs what a pull-back of seeds will need to know."""
    axis = EXTENDED[module].batch_axis
    leave_note(module, args, kwargs, output, axis)
    outputs = [
        (place, tensor, recording.layout_of(tensor, place, axis))
        for place, tensor in enumerate([output] if isinstance(output, Tensor) else tree_leaves(output))
        if isinstance(tensor, Tensor) and tensor.grad_fn is not None
    ]
    recording.settle([(tensor, layout) for _, tensor, layout in outputs if layout is not None])
    intact = [get_gradient_edge(t) for t in tensors_in((args, kwargs)) if t.requires_grad] == recording.inputs
    for place, tensor, layout in outputs:
        edge = get_gradient_edge(tensor)
        if edge in recording.inputs:  # handed through: what it comes from is known already
            continue
        hook(tensor, _waking(HERE.blocks))
        metadata: Any = edge.node.metadata
        metadata[(MARK, edge.output_nr)] = Origin(
            n=recording.n or 0,
            layout=layout,
            place=place,
            uses=recording.uses,
            calls=recording.calls,
            tensors=recording.tensors,
            widest=recording.widest,
            root=ref(module),
            arguments=(args, kwargs) if intact else None,
            input_axis=axis,
            grouped=recording.grouped,
            output=tensor.detach() if recording.fused or recording.random is not None else None,
            random=recording.random,
        )


def _is_loss(module: Module, output: Tensor, recorded: bool) -> bool:
    """Whether a module is a loss: it has no trainable parameter, and PyTorch's are known, others return a scalar."""
    known = isinstance(module, _Loss) or not ROOTS.keys().isdisjoint(type(module).__mro__)
    if not known and (recorded or output.dim() > 0):
        return False
    return not module._modules and not trainable(module)


def _hook_loss(passage: Passage, args: Any, kwargs: Any, output: Tensor, ruled: bool) -> bool:
    """On the output of a loss: second-order quantities start from its input when the cotangent arrives.

    Returns whether nothing more is to be done with the passage.
    """
    kwargs = dict(kwargs)
    input, args = (args[0], args[1:]) if args else (kwargs.pop("input", None), args)
    if not isinstance(input, Tensor) or not input.requires_grad:
        return False
    home, alone = HERE.blocks, len(passage.numbers) == 1 and not ruled
    call = LossCall(passage.module, input, get_gradient_edge(input), args, kwargs)
    kept = [(call, passage if alone else None)]

    def on_cotangent(grad: Tensor) -> None:
        block = _block(home, grad)
        if HERE.muted or HERE.inner is not None or not kept:
            return
        _wake(block, home)
        if block is not None:
            call, passed = kept[0]
            block.enter_pass()
            block.loss_seen = True
            if block.second_order:
                call.run(block, grad)
            if block.reads_passages and passed is not None:
                block.module_passed(passed, (grad,))
        if _is_over(block):
            kept.clear()

    hook(output, on_cotangent)
    return alone


def _leave_passage(passage: Passage, tensors: list[Tensor], eager: bool) -> None:
    """What came in and out of a module may be read when the cotangents arrive at what computed its outputs.

    ``eager``: no output of a root or of a loss wakes what is left at nodes, or it is read for sure.
    """
    node = tensors[0].grad_fn
    if node is not None and not eager:
        rest(passage, node)
    elif node is None or len(tensors) == 1:
        hook(tensors[0], _on_cotangents(passage, HERE.blocks))
    else:  # those of several outputs arrive together, if one node computed them
        node.register_prehook(_on_cotangents(passage, HERE.blocks))


def _on_cotangents(passage: Passage, home: list[Block]) -> Callable[[Any], None]:
    kept, numbers = [passage], passage.numbers

    def on_cotangents(grads: Any) -> None:
        if HERE.muted or not kept:
            return
        own = tuple(grads[number] for number in numbers) if isinstance(grads, tuple) else (grads,)
        block = _block(home, next((grad for grad in own if grad is not None), None))
        receiver = HERE.inner or block
        if receiver is not None:
            receiver.module_passed(kept[0], own)
        if HERE.inner is None and _is_over(block):
            kept.clear()

    return on_cotangents


def _waking(home: list[Block]) -> Callable[[Tensor], None]:
    """On an output of an extended module: what was left at nodes below is wanted now."""

    def on_cotangent(grad: Tensor) -> None:
        _wake(_block(home, grad), home)

    return on_cotangent


def _wake(block: Block | None, home: list[Block]) -> None:
    """Hook what was left at the nodes that the backward pass has still to visit, where a block wants it."""
    if block is not None and block.reads_passages and (node := running_node()) is not None:
        block.enter_pass()
        for passage, below in wake(node):
            below.register_prehook(_on_cotangents(passage, home))
            if trainable(passage.module):  # hooks on nodes do not run where a pull-back of seeds stops
                block.passages[id(passage.module)] = passage
