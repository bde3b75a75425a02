"""Before a pass: where the samples begin, which uses of parameters there are, and what cannot be computed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Module

from backpack.backward.collector import Prepared
from backpack.backward.first_order import name_of
from backpack.backward.plan import make_plan
from backpack.curvature.loss_call import LossCall, Origin
from backpack.engine import Block, muted
from backpack.graph import LEAF, Graph, edge_of, read, variable_of
from backpack.passages import Passage
from backpack.samples import AnyLayout, Layout, layouts, same
from backpack.samples.beginning import decide
from backpack.samples.mixing import mixed_data, unproved
from backpack.samples.notes import Note, noted
from backpack.samples.owners import Edge, Owners, find_owners
from backpack.watched import SHARDED, watched


def prepare(graph: Graph, notes: Mapping[Edge, Note], calls: Sequence[Note]) -> Prepared | None:
    """Find the samples and the uses of parameters; ``None``: there are none."""
    if not calls:
        return None
    generator = torch.Generator()

    def sweep(begin: dict[Edge, AnyLayout]) -> Owners:
        return find_owners(graph, begin, generator)

    wanted = wanted_leaves(graph)
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


def origin_of(
    call: LossCall, prepared: Prepared, notes: Mapping[Edge, Note], passages: dict[Node, list[Passage]]
) -> Origin:
    """Where the samples lie at the input of a loss, and what is known of the graph from there on.

    Raises:
        RuntimeError: The input comes from no extended module, or does not show its samples.
    """
    edge = call.place
    own = prepared
    starts = [at for at, layout in prepared.begin.items() if prepared.owners.owned.get(at) is layout]
    if starts != [edge] or _is_one_sample(call):
        graph = read([call.edge])
        if not any(leaf in graph.edges for leaf in prepared.plan.expected):
            raise RuntimeError(
                f"The input of {type(call.loss).__name__} depends on no trainable parameter of an extended module: "
                f"second-order extensions need extend(model) before the forward pass, and parameters that are not "
                f"all frozen."
            )
        own = _from_loss(call, graph, prepared)
    return Origin(call, own, _of_outputs(notes, own.graph), prepare_again, passages)


def _from_loss(call: LossCall, graph: Graph, prepared: Prepared) -> Prepared:
    """The layout of a loss's input under which the samples are those of the modules' outputs."""
    edge = call.place
    shape, n = tuple(call.input.shape), prepared.n
    axes = (0,) if isinstance(call.loss, torch.nn.CrossEntropyLoss) else range(len(shape))
    possible: list[AnyLayout] = list(layouts(shape, n, axes))
    if edge in prepared.begin:
        possible = [prepared.begin[edge]]
    wanted = {leaf for leaf in prepared.plan.expected if leaf in graph.edges}
    if _is_one_sample(call):
        possible, n = [Layout(1, inner=shape[0])], 1
    for layout in possible:
        with muted():
            owners = find_owners(graph, {edge: layout}, torch.Generator())
        if n == 1 or _agree(owners, prepared, graph, edge):
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


def _agree(owners: Owners, prepared: Prepared, graph: Graph, edge: Edge) -> bool:
    """Whether the samples are where they were seen from the outputs of modules."""
    known = {at: layout for at, layout in prepared.owners.owned.items() if at[0] in graph.edges and at != edge}
    begun = [at for at in prepared.begin if at in known]
    shared = [at for at in owners.owned if at in known]
    return bool(shared) and all(same(owners.owned.get(at), known[at]) for at in (*begun, *shared))


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
        plan = make_plan(graph, owners, layout.n, wanted_leaves(graph))
        if layout.n > 1 and plan.entries:
            plan.mixed, _ = mixed_data(graph, owners, plan.entries, calls, layout.n)
    return Prepared(graph, begin, owners, plan), _of_outputs(notes, graph)


def wanted_leaves(graph: Graph) -> set[Node]:
    """The nodes of parameters of extended modules."""
    return {node for node in graph.order if node.name() == LEAF and is_wanted(variable_of(node))}


def is_wanted(leaf: Tensor) -> bool:
    """Whether a leaf is a parameter of an extended module."""
    return watched(leaf) is not None or (bool(SHARDED) and leaf in SHARDED)


def refuse_complex(block: Block, prepared: Prepared) -> None:
    """Say which extensions are not defined for complex parameters.

    Raises:
        RuntimeError: There are both.
    """
    names = [name_of(p) for leaf in prepared.plan.expected if (p := variable_of(leaf)).is_complex()]
    for extension in block.second_order if names else ():
        if extension.needs_real_parameters:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise RuntimeError(
                f"{type(extension).__name__} is not defined for complex parameters, as {', '.join(names[:3])}{more}: "
                f"each of their entries has four second derivatives. Hold their real and imaginary parts in a real "
                f"parameter and take torch.view_as_complex of it in forward(); or freeze these parameters with "
                f"requires_grad_(False); or take an extension of the GGN."
            )


_told: WeakKeyDictionary[Module, set[str]] = WeakKeyDictionary()
"""What users have been told of what mixes the samples of a model."""


def look_for_mixed(block: Block, prepared: Prepared, notes: Mapping[Edge, Note], calls: Sequence[Note]) -> None:
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
