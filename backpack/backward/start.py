"""Where a backward pass begins: its graph is read, prehooks are put on nodes, and taken off when it has ended."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Module

from backpack.backward.collector import Prepared
from backpack.backward.first_order import FirstOrderPass, name_of
from backpack.backward.plan import Plan, make_plan
from backpack.bystanders import observed, undisturbed
from backpack.compat import pull_back
from backpack.curvature import averaged_hessian as averaged_hessian  # it registers passes
from backpack.curvature import hessian as hessian  # as well
from backpack.curvature import products as products
from backpack.curvature.loss_call import LossCall, Origin, losses_in
from backpack.engine import Block, muted
from backpack.graph import LEAF, Graph, count_outputs, forget_recomputed, read, variable_of
from backpack.hooks import watch
from backpack.passages import Passage, passed
from backpack.samples import AnyLayout, Layout, layouts, same
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

COTANGENTS: dict[Any, str] = {
    Tensor.backward: "gradient",
    torch.autograd.backward: "grad_tensors",
    torch.autograd.grad: "grad_outputs",
}
"""The name of what they are given for these."""

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

    @property
    def keeps_graph(self) -> bool:
        """Whether the graph is still there afterwards."""
        kept = self.given.get("retain_graph")
        return self.creates_graph if kept is None else bool(kept)

    def cotangent(self, edge: Edge) -> Tensor | None:
        """What the pass will bring to an edge."""
        given = _listed(self.given.get(COTANGENTS[self.function])) or [None] * len(self.roots)
        seeds = [_ones(root) if seed is None else seed for root, seed in zip(self.roots, given, strict=True)]
        if [edge_of(root) for root in self.roots] == [edge]:
            return seeds[0]
        (found,) = pull_back(self.roots, [GradientEdge(*edge)], seeds, self.creates_graph)
        return found

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


def _ones(root: GradientEdge) -> Tensor:
    if root.node.name() == LEAF:
        return torch.ones_like(variable_of(root.node))
    metadata = root.node._input_metadata[root.output_nr]
    return torch.ones(metadata.shape, dtype=metadata.dtype, device=metadata.device)


def _edge(root: Any) -> GradientEdge:
    return root if isinstance(root, GradientEdge) else get_gradient_edge(root)


def differentiate(block: Block, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run a backward pass, with the extensions of a block."""
    call = Call(function, args, kwargs)
    if not call.roots or call.given.get("is_grads_batched"):
        return function(*args, **kwargs)
    graph = read(call.roots)
    notes, calls = noted(graph)
    asked = [edge_of(_edge(value)) for value in call.inputs]
    if call.creates_graph and not call.is_for_parameters and not any(edge in notes for edge in asked):
        return function(*args, **kwargs)  # a derivative inside of what is to be differentiated
    losses = list(losses_in(graph))
    passages = passed(graph.order) if block.reads_passages else {}
    if not calls and not losses and not passages:
        if block.extensions:
            _refuse_unseen([variable_of(leaf) for leaf in _received(_wanted(graph), asked)])
        return function(*args, **kwargs)
    block.clear()
    running = _Running(block, graph, notes, calls, losses, passages)
    block.ran = True
    if running.prepared is not None:
        seen = running.prepared.plan.expected.keys()
        outside = {get_gradient_edge(parameter).node for parameter in running.prepared.plan.outside}
        _refuse_unseen([variable_of(leaf) for leaf in _received(outside - seen, asked)])
    try:
        running.run_second_order(call, asked)
        running.attach()
        first = running.first
        if not asked or first is None:
            result = function(*args, **kwargs)
        elif call.is_for_parameters:
            first.is_partial = not first.plan.expected.keys() <= {node for node, _ in asked}
            result = function(**call.kept(first))
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


def _received(leaves: set[Node], asked: Sequence[Edge]) -> list[Node]:
    """Those that receive gradients."""
    return [leaf for leaf in leaves if not asked or (leaf, 0) in asked]


def _refuse_unseen(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters[:1]:
        raise RuntimeError(
            f"Parameter {name_of(parameter)} of shape {list(parameter.shape)} receives a gradient, but none of its "
            f"uses was seen: it was used outside of a forward call of the extended module, or inside of something "
            f"that hides its functions (a scripted module, a data-parallel replica, a disabled region). Call the "
            f"extended module itself, or freeze the parameter with requires_grad_(False)."
        )


class _Running:
    """A backward pass under way: what is hooked for it. ``first``: that of first order; ``None``: there is none.

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
        passages: dict[Node, list[Passage]],
    ) -> None:
        self.block, self.passages, self.first = block, passages, None
        self.graph = graph
        self.origins: list[tuple[Edge, Origin]] = []
        self._handles: list[Any] = []
        for note in calls:
            if (module := note.module()) is not None:
                watch(module)
        self.prepared = prepare(graph, notes, calls)
        if self.prepared is None:
            if block.second_order and calls and not losses:
                self._refuse_other_losses()
            if block.extensions and (losses or calls):
                _nothing_reached()
            return
        block.check_subsets(self.prepared.n, self.device)
        if block.second_order and not losses:
            self._refuse_other_losses()
        _look_for_mixed(block, self.prepared, notes, calls)
        if block.first_order:
            self.first = FirstOrderPass(block, self.prepared)
        for node, number, call in losses if block.second_order else ():
            self.origins.append(((node, number), origin_of(call, self.prepared, notes, passages)))

    @property
    def device(self) -> torch.device:
        """That of the parameters."""
        assert self.prepared is not None
        return variable_of(next(iter(self.prepared.plan.expected))).device

    def _refuse_other_losses(self) -> None:
        names = ", ".join(type(extension).__name__ for extension in self.block.second_order)
        raise RuntimeError(
            f"{names}: the backward pass did not start from an extended loss. Write lossfunc = extend(lossfunc) "
            f"before the forward pass, and call backward() on its output."
        )

    def run_second_order(self, call: Call, asked: Sequence[Edge]) -> None:
        """Compute the extensions of second order, of the losses that the pass runs through, before it begins."""
        executed = executed_for(self.graph, asked) if asked else None
        for edge, origin in self.origins:
            if executed is not None and edge[0] not in executed:
                continue
            with torch.set_grad_enabled(call.creates_graph), undisturbed(observed(self.graph.order)):
                outer = call.cotangent(edge)
                try:
                    if outer is not None:
                        origin.run(self.block, outer, call.keeps_graph)
                finally:
                    forget_recomputed()

    def attach(self) -> None:
        """Put the prehooks on."""
        for node, passages in self.passages.items():
            for passage in passages:
                self._handles.append(node.register_prehook(partial(self.block.module_passed, passage, node)))
        if self.first is not None:
            self.first.attach()

    def detach(self) -> None:
        """Take the prehooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.first is not None:
            self.first.detach()


def origin_of(
    call: LossCall, prepared: Prepared, notes: Mapping[Edge, Note], passages: dict[Node, list[Passage]]
) -> Origin:
    """Where the samples lie at the input of a loss, and what is known of the graph from there on.

    Raises:
        RuntimeError: The input comes from no extended module, or does not show its samples.
    """
    edge = (call.edge.node, call.edge.output_nr)
    own = prepared
    starts = [at for at, layout in prepared.begin.items() if prepared.owners.owned.get(at) is layout]
    if starts != [edge] or _is_one_sample(call):
        graph = read([call.edge])
        found = [begin for begin in prepared.begin if begin[0] in graph.edges and prepared.owners.owned.get(begin)]
        if not found:
            raise RuntimeError(
                f"The input of {type(call.loss).__name__} depends on no trainable parameter of an extended module: "
                f"second-order extensions need extend(model) before the forward pass, and parameters that are not "
                f"all frozen."
            )
        own = _from_loss(call, graph, prepared, found)
    return Origin(call, own, _of_outputs(notes, own.graph), prepare_again, passages)


def _from_loss(call: LossCall, graph: Graph, prepared: Prepared, found: Sequence[Edge]) -> Prepared:
    """The layout of a loss's input under which the samples are those of the modules' outputs."""
    edge = (call.edge.node, call.edge.output_nr)
    shape, n = tuple(call.input.shape), prepared.n
    axes = (0,) if isinstance(call.loss, torch.nn.CrossEntropyLoss) else range(len(shape))
    possible: list[AnyLayout] = list(layouts(shape, n, axes))
    if edge in prepared.begin:
        possible = [prepared.begin[edge]]
    wanted = {leaf for leaf in prepared.plan.expected if leaf in graph.edges}
    if _is_one_sample(call):
        possible, found, n = [Layout(1, inner=shape[0])], [], 1
    for layout in possible:
        with muted():
            owners = find_owners(graph, {edge: layout}, torch.Generator())
        kept = (same(owners.owned.get(begin), prepared.owners.owned[begin]) for begin in found if begin != edge)
        if n == 1 or all(kept):
            plan = make_plan(graph, owners, n, wanted)
            plan.mixed = {entry: name for entry, name in prepared.plan.mixed.items() if entry in plan.entries}
            return Prepared(graph, {edge: layout}, owners, plan)
    raise RuntimeError(
        f"The input of {type(call.loss).__name__}, of shape {list(shape)}, does not show where the {n} samples lie: "
        f"let them be counted by its first axis, alone or together with the positions, and let nothing between the "
        f"model and the loss mix samples."
    )


def _of_outputs(notes: Mapping[Edge, Note], graph: Graph) -> dict[Edge, Note]:
    return {place: note for place, note in notes.items() if place[0] in graph.edges and not note.is_of_base}


def _is_one_sample(call: LossCall) -> bool:
    """Whether the input of a loss has no axis of samples, but of classes alone."""
    return isinstance(call.loss, (torch.nn.CrossEntropyLoss, torch.nn.NLLLoss)) and call.input.dim() == 1


def prepare_again(
    edge: GradientEdge, layout: AnyLayout, instead: Mapping[Edge, Edge] | None = None
) -> tuple[Prepared, Mapping[Edge, Note]]:
    """What is known of a graph that was recorded anew, from an edge on whose samples lie as ``layout`` says."""
    graph = read([edge], instead)
    notes, calls = noted(graph)
    (root,) = graph.roots
    begin = {edge_of(root): layout}
    with muted():
        owners = find_owners(graph, begin, torch.Generator())
        plan = make_plan(graph, owners, layout.n, _wanted(graph))
        if layout.n > 1 and plan.entries:
            plan.mixed, _ = mixed_data(graph, owners, plan.entries, calls, layout.n)
    return Prepared(graph, begin, owners, plan), _of_outputs(notes, graph)


def _wanted(graph: Graph) -> set[Node]:
    """The nodes of parameters of extended modules."""
    return {node for node in graph.order if node.name() == LEAF and _is_wanted(variable_of(node))}


def _nothing_reached() -> None:
    raise RuntimeError(
        "The backward pass reached no trainable parameter of an extended module, so nothing was computed. "
        "Call extend(model) before the forward pass; of frozen parameters, requires_grad_() those whose "
        "results are wanted."
    )


class Partial:
    """A pass with respect to other tensors than parameters: which nodes it runs, and where it is continued.

    ``ends``: outputs of modules at which it ends, by their place among what is asked for; ``direct``: the same of other
    nodes that use parameters; ``beside``: nodes that use parameters beside its way.
    """

    def __init__(self, graph: Graph, plan: Plan, notes: Mapping[Edge, Note], asked: Sequence[Edge]) -> None:
        places = {edge: place for place, edge in enumerate(asked)}
        executed = executed_for(graph, asked)
        below: set[Node] = set()
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
    lowest = running.lowest(partial.beside, partial.beside)
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
    with torch.set_grad_enabled(call.creates_graph):
        running.take(beside, more)
        if result is not None:
            direct = [(edge, result[place]) for edge, place in partial.direct.items()]
            running.take([GradientEdge(*edge) for edge, _ in direct], [grad for _, grad in direct])
            ends = {edge: result[place] for edge, place in partial.ends.items() if result[place] is not None}
            if ends and not SHARDED:  # whose parameters are gathered for passes of PyTorch's only
                running.pull_on(ends)
    return result


def executed_for(graph: Graph, asked: Sequence[Edge]) -> set[Node]:
    """The nodes that run in a pass with respect to these edges."""
    wanted, executed = set(asked), set[Node]()
    for node in reversed(graph.order):
        if any((other, number) in wanted or other in executed for other, number in graph.edges[node] if other):
            executed.add(node)
    return executed


def edge_of(edge: GradientEdge) -> Edge:
    """An edge as a key."""
    return edge.node, edge.output_nr


def prepare(graph: Graph, notes: Mapping[Edge, Note], calls: Sequence[Note]) -> Prepared | None:
    """Find the samples and the uses of parameters; ``None``: there are none."""
    if not calls:
        return None
    generator = torch.Generator()

    def sweep(begin: dict[Edge, AnyLayout]) -> Owners:
        return find_owners(graph, begin, generator)

    wanted = _wanted(graph)
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
    return Prepared(graph, begin, owners, plan) if plan.expected else None


_told: WeakKeyDictionary[Module, set[str]] = WeakKeyDictionary()
"""What users have been told of what mixes the samples of a model."""


def _look_for_mixed(block: Block, prepared: Prepared, notes: Mapping[Edge, Note], calls: Sequence[Note]) -> None:
    """Say once what it costs that samples are mixed.

    Raises:
        RuntimeError: An extension is not defined then.
    """
    graph, owners, plan = prepared.graph, prepared.owners, prepared.plan
    if plan.n == 1:
        return
    ways = (
        "Call .eval() on layers that normalize by statistics of the batch, or replace them by GroupNorm, InstanceNorm "
        "or LayerNorm"
    )
    for_all: set[int] = set()
    if plan.entries:
        with muted():
            plan.mixed, for_all = mixed_data(graph, owners, plan.entries, calls, plan.n)
    where = ", ".join(dict.fromkeys(plan.mixed.values()))
    for extension in block.first_order:
        if not extension.bounds_influence:
            continue
        with muted():
            mixer = where or unproved(graph, owners, plan.entries, notes, plan.n, for_all)
        if mixer:
            raise RuntimeError(
                f"{type(extension).__name__}: samples are mixed by {mixer}. A sample changes what is computed of "
                f"others, so that clipping its gradient does not bound its influence. {ways}."
            )
    inside = dict.fromkeys(name_of(variable_of(leaf)) for entry in plan.mixed for leaf in plan.entries[entry])
    for extension in block.second_order:
        if extension.needs_samples_apart and inside:
            names = list(inside)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise RuntimeError(
                f"{type(extension).__name__}: samples are mixed by {where}, and for parameters below, as "
                f"{', '.join(names[:3])}{more}, Kronecker factors are not defined. {ways}; or freeze these parameters "
                f"with requires_grad_(False), or take an extension that is diagonal in them."
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


def _end(block: Block, running: _Running, asked: bool) -> None:
    """What is left to do when PyTorch's pass has ended."""
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
