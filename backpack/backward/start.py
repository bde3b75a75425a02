"""Where a backward pass begins: its graph is read, prehooks are put on nodes, and taken off when it has ended."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Module

from backpack.backward.first_order import FirstOrderPass, name_of
from backpack.backward.plan import Plan, make_plan
from backpack.engine import Block, muted
from backpack.graph import LEAF, Graph, count_outputs, read, variable_of
from backpack.samples import AnyLayout
from backpack.samples.beginning import decide
from backpack.samples.mixing import mixed_data, unproved
from backpack.samples.notes import Note, noted
from backpack.samples.owners import Edge, Owners, find_owners
from backpack.watched import SHARDED, watched

STARTS: dict[Any, tuple[str, ...]] = {
    Tensor.backward: ("self",),
    torch.autograd.backward: ("tensors",),
    torch.autograd.grad: ("outputs",),
}
"""What starts a backward pass, and the name of its roots."""

NAMES = {function: tuple(inspect.signature(function).parameters) for function in STARTS}


class Call:
    """A call of one of these functions."""

    def __init__(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.function = function
        self.given = dict(zip(NAMES[function], args, strict=False), **kwargs)

    @cached_property
    def roots(self) -> list[GradientEdge]:
        """The edges that the pass begins at; none: it will fail."""
        found = _listed(self.given.get(STARTS[self.function][0]))
        if not all(
            isinstance(root, GradientEdge) or (isinstance(root, Tensor) and root.requires_grad) for root in found
        ):
            return []
        return [_edge(root) for root in found]

    @cached_property
    def inputs(self) -> list[Any]:
        """What gradients are asked for; none: all leaves."""
        return _listed(self.given.get("inputs"))

    @property
    def creates_graph(self) -> bool:
        """Whether the gradients are to be differentiable."""
        return bool(self.given.get("create_graph", False))

    def kept(self, running: FirstOrderPass) -> dict[str, Any]:
        """The arguments, so that the graph is kept where nodes of it have to run by themselves afterwards."""
        keep = running.is_partial and running.may_defer
        return {**self.given, "retain_graph": True} if keep else dict(self.given)

    @property
    def is_for_parameters(self) -> bool:
        """Whether a gradient of a parameter is asked for."""
        return not self.inputs or any(isinstance(t, Tensor) and _is_wanted(t) for t in self.inputs)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, (Tensor, GradientEdge)) else list(value)


def _edge(root: Any) -> GradientEdge:
    return root if isinstance(root, GradientEdge) else get_gradient_edge(root)


def differentiate(block: Block, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run a backward pass, with the first-order extensions of a block."""
    call = Call(function, args, kwargs)
    if not block.first_order or not call.roots or call.given.get("is_grads_batched"):
        return function(*args, **kwargs)
    graph = read(call.roots)
    notes, calls = noted(graph)
    asked = [edge_of(_edge(value)) for value in call.inputs]
    if call.creates_graph and not call.is_for_parameters and not any(edge in notes for edge in asked):
        return function(*args, **kwargs)  # a derivative inside of what is to be differentiated
    block.clear()
    block.loss_seen = False
    running = prepare(block, graph, notes, calls)
    if running is None:
        result = function(*args, **kwargs)
        if block.loss_seen and not block.second_order:
            block.nothing_reached()
        return result
    block.is_planned = True
    try:
        running.attach()
        if not asked:
            result = function(*args, **kwargs)
        elif call.is_for_parameters:
            running.is_partial = not running.plan.expected.keys() <= {node for node, _ in asked}
            result = function(**call.kept(running))
        else:
            result = _differentiate_by_others(running, call, Partial(graph, running.plan, notes, asked))
        with torch.set_grad_enabled(call.creates_graph):
            _end(block, running, call.is_for_parameters)
    except BaseException:
        block.clear()
        raise
    finally:
        block.is_planned = False
        running.detach()
    return result


class Partial:
    """A pass with respect to other tensors than parameters: which nodes it runs, and where it is continued.

    ``ends``: outputs of modules at which it ends, by their place among what is asked for; ``direct``: the same of other
    nodes that use parameters; ``beside``: nodes that use parameters beside its way.
    """

    def __init__(self, graph: Graph, plan: Plan, notes: Mapping[Edge, Note], asked: Sequence[Edge]) -> None:
        places = {edge: place for place, edge in enumerate(asked)}
        executed: set[Node] = set()
        below: set[Node] = set()
        for node in reversed(graph.order):
            following = [(other, number) for other, number in graph.edges[node] if other is not None]
            if any(edge in places or edge[0] in executed for edge in following):
                executed.add(node)
        for node in graph.order:
            if any((node, number) in places for number in range(count_outputs(node))):
                below.add(node)
            if node in below:
                below.update(other for other, _ in graph.edges[node] if other is not None)
        ended = {edge: place for edge, place in places.items() if edge[0] not in executed}
        self.ends = {edge: place for edge, place in ended.items() if edge in notes}
        self.direct = {edge: place for edge, place in ended.items() if edge not in notes and edge[0] in plan.uses}
        self.beside = [node for node in plan.uses if node not in executed and node not in below]


def _differentiate_by_others(running: FirstOrderPass, call: Call, partial: Partial) -> Any:
    """Run a pass with respect to what is no parameter, and continue it where it ended at outputs of modules."""
    running.is_partial = True
    lowest = running.lowest_uses(partial.beside, among=set(partial.beside))
    beside = running.outputs_of(lowest) if call.function is torch.autograd.grad else []
    if beside:
        given = {**call.kept(running), "inputs": [*call.inputs, *beside], "allow_unused": True}
        result = torch.autograd.grad(**given)
        result, more = result[: len(call.inputs)], result[len(call.inputs) :]
        if not call.given.get("allow_unused") and any(grad is None for grad in result):
            raise RuntimeError(
                "One of the differentiated Tensors appears to not have been used in the graph. Set allow_unused=True "
                "if this is the desired behavior."
            )
    else:
        result, more = call.function(**call.kept(running)), ()
    with torch.set_grad_enabled(call.creates_graph), running.continued():
        running.take(beside, more)
        if result is not None:
            direct = [(edge, result[place]) for edge, place in partial.direct.items()]
            running.take([GradientEdge(*edge) for edge, _ in direct], [grad for _, grad in direct])
            ends = {edge: result[place] for edge, place in partial.ends.items() if result[place] is not None}
            if ends and not SHARDED:  # whose parameters are gathered for passes of PyTorch's only
                running.pull_on(ends)
    return result


def edge_of(edge: GradientEdge) -> Edge:
    """An edge as a key."""
    return edge.node, edge.output_nr


def prepare(block: Block, graph: Graph, notes: Mapping[Edge, Note], calls: Sequence[Note]) -> FirstOrderPass | None:
    """Find the samples and the uses of parameters; ``None``: there are none."""
    if not calls:
        return None
    generator = torch.Generator()

    def sweep(begin: dict[Edge, AnyLayout]) -> Owners:
        return find_owners(graph, begin, generator)

    wanted = {node for node in graph.order if node.name() == LEAF and _is_wanted(variable_of(node))}
    with muted():
        begin, owners = decide(graph, dict(notes), calls, sweep, wanted)
    counts = {layout.n for edge, layout in begin.items() if owners.owned.get(edge) is layout}
    if len(counts) > 1:
        raise RuntimeError(
            f"Outputs of extended modules have {' and '.join(map(str, sorted(counts)))} samples: which of them belong "
            f"together cannot be told. Let one call of the extended module see the whole batch."
        )
    if not counts:
        return None
    (n,) = counts
    if n == 0:
        raise RuntimeError("An extended module was called with a batch of size 0, which has no individual gradients.")
    plan = make_plan(graph, owners, n, wanted)
    if not plan.expected:
        return None
    block.check_subsets(n, variable_of(next(iter(plan.expected))).device)
    if n > 1:
        with muted():
            _look_for_mixed(block, graph, owners, plan, notes, calls)
    return FirstOrderPass(block, graph, owners, plan)


_told: WeakKeyDictionary[Module, set[str]] = WeakKeyDictionary()
"""What users have been told of what mixes the samples of a model."""


def _look_for_mixed(
    block: Block, graph: Graph, owners: Owners, plan: Plan, notes: Mapping[Edge, Note], calls: Sequence[Note]
) -> None:
    """Say once what it costs that samples are mixed.

    Raises:
        RuntimeError: An extension is not defined then.
    """
    ways = (
        "Call .eval() on layers that normalize by statistics of the batch, or replace them by GroupNorm, InstanceNorm "
        "or LayerNorm"
    )
    for_all: set[int] = set()
    if plan.entries:
        plan.mixed, for_all = mixed_data(graph, owners, plan.entries, calls, plan.n)
    where = ", ".join(dict.fromkeys(plan.mixed.values()))
    for extension in block.first_order:
        if extension.bounds_influence and (
            mixer := where or unproved(graph, owners, plan.entries, notes, plan.n, for_all)
        ):
            raise RuntimeError(
                f"{type(extension).__name__}: samples are mixed by {mixer}. A sample changes what is computed of "
                f"others, so that clipping its gradient does not bound its influence. {ways}."
            )
    module = next((module for note in calls if (module := note.module()) is not None), None)
    if where and module is not None and where not in _told.setdefault(module, set()):
        _told[module].add(where)
        warnings.warn(
            f"Samples are mixed by {where}: what is computed of one depends on others. The gradient of each of the "
            f"{plan.n} samples is pulled through the layers below by itself, which takes as many backward passes "
            f"through them as there are samples. {ways}, or let subsampling= select fewer samples.",
            stacklevel=6,
        )


def _is_wanted(leaf: Tensor) -> bool:
    """Whether a leaf is a parameter of an extended module."""
    return watched(leaf) is not None or (bool(SHARDED) and leaf in SHARDED)


def _end(block: Block, running: FirstOrderPass, asked: bool) -> None:
    """What is left to do when PyTorch's pass has ended."""
    running.finish()
    missed = running.missed
    if missed:
        _leave_out(missed, block, asked)
    block.hand_over()
    block.task = max(block.task, 0)
    block.stored.clear()
    block.clear()
    _warn_of_outside(running.plan.outside)


def _leave_out(missed: Sequence[Tensor], block: Block, asked: bool) -> None:
    """Leave no result on parameters of which not all uses were reached, and no old one; say so.

    Raises:
        RuntimeError: An extension needs all parameters.
    """
    extensions = block.first_order
    for parameter in missed:
        for extension in extensions:
            vars(parameter).pop(extension.savefield, None)
    names = [name_of(parameter) for parameter in missed]
    found = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
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
        known = watched(parameter)
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
