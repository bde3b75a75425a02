"""Runs a backward pass: reads its graph, puts prehooks on nodes, and takes them off when the pass has ended."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack.backward.block import Block
from backpack.backward.call import Call, executed_for
from backpack.backward.collector import Prepared, refusal
from backpack.backward.empty_batch import has_no_entries, store_results
from backpack.backward.first_order import FirstOrderPass
from backpack.backward.plan import Plan
from backpack.backward.preparation import (
    look_for_mixed,
    prepare,
    refuse_complex,
    refuse_other_losses,
    samples_averaged,
    wanted_leaves,
)
from backpack.graph import Edge, Graph, count_outputs, read, shape_of, variable_of
from backpack.modules.calls import Note, noted
from backpack.modules.forward_hooks import note_parameters
from backpack.modules.loss_calls import LossCall, losses_in
from backpack.modules.module_io import ModuleIO, module_io_of
from backpack.modules.parameters import SHARDED, info_of, listed, name_of

ComputeCurvature = Callable[[Block, Call, Prepared, Mapping[Edge, Note], "dict[Node, list[ModuleIO]]"], None]
"""Function that computes the extensions of second order."""


def differentiate(
    block: Block,
    compute_curvature: ComputeCurvature,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run a backward pass, with the extensions of a block.

    ``compute_curvature``: computes those of second order, before the pass itself begins.
    """
    call = Call(function, args, kwargs)
    if not call.roots or call.given.get("is_grads_batched"):
        return function(*args, **kwargs)
    graph = read(call.roots)
    notes, calls = noted(graph)
    asked = call.asked
    if call.creates_graph and not call.is_for_parameters and not any(edge in notes for edge in asked):
        return function(*args, **kwargs)  # a derivative inside of what is to be differentiated
    losses = list(losses_in(graph))
    module_io = module_io_of(graph) if block.reads_module_io else {}
    if not calls and not losses and not module_io:
        if block.extensions:
            _refuse_unseen([variable_of(leaf) for leaf in _received(wanted_leaves(graph), asked)])
        block.ran |= bool(module_io_of(graph))  # of frozen modules: nothing is to be computed
        return function(*args, **kwargs)
    block.clear()
    if has_no_entries(notes):
        block.ran = True
        return _of_no_sample(block, call, graph, notes, losses)
    running = _Running(block, graph, notes, calls, losses, module_io)
    block.ran = True
    if block.extensions:
        _refuse_hidden(running.prepared, asked)
        _refuse_unseen([variable_of(leaf) for leaf in _received(running.unseen, asked)])
    try:
        if running.prepared is not None and block.second_order:
            compute_curvature(block, call, running.prepared, notes, module_io)
        running.attach()
        first = running.first
        if not asked or first is None:
            result = call.run(block.keeps_graph)
        elif call.is_for_parameters:
            first.is_partial = not first.plan.expected.keys() <= {node for node, _ in asked}
            result = call.run(block.keeps_graph or (first.is_partial and first.may_defer))
        else:
            result = _differentiate_by_others(first, call, Partial(graph, first.plan, notes, asked))
        with torch.set_grad_enabled(call.creates_graph):
            _end(block, running, call.is_for_parameters)
    except BaseException:
        block.clear()
        raise
    finally:
        running.detach()
    return result


def _of_no_sample(
    block: Block, call: Call, graph: Graph, notes: Mapping[Edge, Note], losses: Sequence[tuple[Node, int, LossCall]]
) -> Any:
    """A pass for a batch without a sample."""
    _take_old_results_off(block, list(notes.values()))
    try:
        if block.second_order and not losses:
            refuse_other_losses(block)
        wanted = wanted_leaves(graph)
        leaves = _received(filter(wanted.__contains__, graph.order), call.asked if call.is_for_parameters else ())
        store_results(block, notes, losses, leaves)
        result = call.run()
        block.hand_over()
        block.stored.clear()
        return result
    finally:
        block.clear()


def _take_old_results_off(block: Block, calls: Sequence[Note]) -> None:
    """Note the parameters of the modules that take part, and leave no result of an earlier pass on them."""
    modules = [module for note in calls if (module := note.module()) is not None]
    block.take_off({id(p): p for module in modules for p in note_parameters(module)}.values())


def _received(leaves: Iterable[Node], asked: Sequence[Edge]) -> list[Node]:
    """Those of the leaves that receive gradients."""
    return [leaf for leaf in leaves if not asked or (leaf, 0) in asked]


def _is_in_penalty(graph: Graph, leaf: Node) -> bool:
    """Whether all that is computed of a parameter has its shape, or is a scalar."""
    shapes, seen = ((), shape_of(leaf, 0)), {leaf}
    pending = [leaf]
    while pending:
        for node, *_ in graph.incoming[pending.pop()]:
            if node not in seen:
                if any(shape_of(node, number) not in shapes for number in range(count_outputs(node))):
                    return False
                seen.add(node)
                pending.append(node)
    return True


def _refuse_hidden(prepared: Prepared | None, asked: Sequence[Edge]) -> None:
    for parameter, function in prepared.plan.hidden if prepared is not None else ():
        if _received([get_gradient_edge(parameter).node], asked):
            raise refusal(name_of(parameter), function)


def _refuse_unseen(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters[:1]:
        raise RuntimeError(
            f"Parameter {name_of(parameter)} of shape {list(parameter.shape)} receives a gradient, but none of its "
            f"uses was seen: it was used outside of a forward call of the extended module, before extend() was "
            f"called, or inside of something that hides its functions (a scripted module, a data-parallel replica, a "
            f"disabled region). Call extend(model) before the forward pass and the extended module itself, or freeze "
            f"the parameter with requires_grad_(False)."
        )


class _Running:
    """A backward pass under way, and its prehooks. ``first``: the pass of first order; ``None``: there is none.

    Raises:
        RuntimeError: An extension cannot be computed.
    """

    def __init__(
        self,
        block: Block,
        graph: Graph,
        notes: Mapping[Edge, Note],
        calls: Sequence[Note],
        losses: Sequence[tuple[Node, int, LossCall]],
        module_io: dict[Node, list[ModuleIO]],
    ) -> None:
        self.block, self.graph, self.module_io = block, graph, module_io
        self.first: FirstOrderPass | None = None
        self._handles: list[Any] = []
        _take_old_results_off(block, calls)
        self.prepared = prepare(graph, notes, calls, block.ids)
        if self.prepared is None:
            if block.extensions and not calls:
                _warn_of_no_model(graph, losses)
            return
        wanted = self.prepared.only(block.only)
        block.check(self.prepared.n, [variable_of(leaf) for leaf in wanted.plan.expected])
        if any(extension.needs_own_losses for extension in block.extensions):
            block.averaged = samples_averaged(block, losses, self.prepared.n)
        if block.second_order and not losses:
            refuse_other_losses(block)
        refuse_complex(block, self.prepared)
        look_for_mixed(block, self.prepared, notes, calls)
        if block.first_order:
            self.first = FirstOrderPass(block, wanted)

    @property
    def unseen(self) -> set[Node]:
        """The nodes of parameters of extended modules of which the pass has found no use that belongs to samples."""
        if self.prepared is None:
            return wanted_leaves(self.graph)
        outside = {get_gradient_edge(parameter).node for parameter in self.prepared.plan.outside}
        unused = outside - self.prepared.plan.expected.keys()
        return {leaf for leaf in unused if not _is_in_penalty(self.graph, leaf)}

    def attach(self) -> None:
        """Put the prehooks on."""
        for node, module_io in self.module_io.items():
            for io in module_io:
                self._handles.append(node.register_prehook(partial(self.block.outputs_arrived, io, node)))
        for node, prehook in self.first.prehooks() if self.first is not None else ():
            self._handles.append(node.register_prehook(prehook))

    def detach(self) -> None:
        """Take the prehooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _warn_of_no_model(graph: Graph, losses: Sequence[tuple[Node, int, LossCall]]) -> None:
    """Warn if only losses are extended. Others, that have left no note of their call, are frozen."""
    known = {id(call.loss) for _, _, call in losses}
    if known and all(id(io.module) in known for own in module_io_of(graph).values() for io in own):
        warnings.warn(
            "The backward pass started from an extended loss, but reached no extended model, so nothing was computed. "
            "Call extend(model) before the forward pass, and give the model's output to the loss. (Where the model is "
            "frozen, there is nothing to compute.)",
            stacklevel=6,
        )


class Partial:
    """A pass with respect to other tensors than parameters: where it ends, and which uses it misses.

    ``ends``: the outputs of modules at which it ends, with their places among the inputs asked for; ``direct``: the
    same for other nodes that use parameters; ``beside``: nodes that use parameters and that the pass does not come to.
    """

    def __init__(self, graph: Graph, plan: Plan, notes: Mapping[Edge, Note], asked: Sequence[Edge]) -> None:
        places = {edge: place for place, edge in enumerate(asked)}
        executed = executed_for(graph, asked)
        below = set(graph.behind(node for node, _ in asked if node in graph.edges))
        ended = {edge: place for edge, place in places.items() if edge[0] not in executed}
        self.ends = {edge: place for edge, place in ended.items() if edge in notes}
        self.direct = {edge: place for edge, place in ended.items() if edge not in notes and edge[0] in plan.uses}
        self.beside = [node for node in plan.uses if node not in executed and node not in below]


def _differentiate_by_others(running: FirstOrderPass, call: Call, partial: Partial) -> Any:
    """Run a pass with respect to what is no parameter, and continue it where it ended at outputs of modules."""
    running.is_partial = True
    lowest = running.lowest(partial.beside, partial.beside)
    beside = running.outputs_of(lowest) if call.function is torch.autograd.grad else []
    if beside:
        given = {**call.given, "inputs": [*call.inputs, *beside], "allow_unused": True}
        if running.may_defer or running.block.keeps_graph:
            given["retain_graph"] = True
        result = torch.autograd.grad(**given)
        result, more = result[: len(call.inputs)], result[len(call.inputs) :]
        if not call.given.get("allow_unused") and any(grad is None for grad in result):
            raise RuntimeError(
                "One of the differentiated Tensors appears to not have been used in the graph. Set allow_unused=True "
                "if this is the desired behavior."
            )
    else:
        result, more = call.run(running.may_defer or running.block.keeps_graph), ()
    with torch.set_grad_enabled(call.creates_graph):
        running.take(beside, more)
        if result is not None:
            direct = [(edge, result[place]) for edge, place in partial.direct.items()]
            running.take([GradientEdge(*edge) for edge, _ in direct], [grad for _, grad in direct])
            ends = {edge: result[place] for edge, place in partial.ends.items() if result[place] is not None}
            if ends and not SHARDED:  # whose parameters are gathered for passes of PyTorch's only
                running.pull_on(ends)
    return result


def _end(block: Block, running: _Running, asked: bool) -> None:
    """Finish what is left to do when PyTorch's pass has ended, and keep the results."""
    first = running.first
    if first is not None:
        first.finish()
        if missed := first.missed:
            _leave_out(missed, block, asked)
    block.hand_over()
    block.stored.clear()
    block.clear()
    if first is not None:
        _warn_of_outside(first.plan.outside)


def _leave_out(missed: Sequence[Tensor], block: Block, asked: bool) -> None:
    """Leave no result on parameters of which not all uses were reached, and no old one; say so.

    Raises:
        RuntimeError: An extension needs all parameters.
    """
    extensions = block.first_order
    for parameter in missed:
        for extension in extensions:
            vars(parameter).pop(extension.savefield, None)
    found = listed([name_of(parameter) for parameter in missed])
    for extension in extensions:
        if extension.needs_all_parameters:
            raise RuntimeError(
                f"{type(extension).__name__} depends on all parameters of the model, and the backward pass ended "
                f"before it reached all uses of {found}. Call backward(), or freeze with requires_grad_(False) "
                f"what is to be left out."
            )
    if not asked:
        warnings.warn(
            f"The backward pass ended before it reached all uses of {found}: there are no results of "
            f"{', '.join(type(extension).__name__ for extension in extensions)} for these parameters. Call "
            f"backward(), or autograd.grad with respect to the parameters whose results are wanted.",
            stacklevel=5,
        )


def _warn_of_outside(parameters: Sequence[Tensor]) -> None:
    """Say once, in each mode of training, that parameters are used where no samples are."""
    named = []
    for parameter in parameters:
        known = info_of(parameter)
        if known is not None and known.training not in known.explained:
            known.explained.add(known.training)
            named.append(known.name)
    if named:
        warnings.warn(
            f"The gradients of {', '.join(named)} have a part that belongs to no sample: these parameters are also "
            f"used outside of the forward calls of the extended module (a penalty like weight decay that is added to "
            f"the loss, a functional use elsewhere). Individual quantities leave that part out, and do not add up to "
            f"p.grad.",
            stacklevel=5,
        )
