"""Finds where the samples lie at the inputs of losses, and prepares the graph from there on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.backward.collector import Prepared
from backpack.backward.plan import make_plan
from backpack.backward.preparation import planned, wanted_leaves
from backpack.curvature.loss_term import Origin, Term
from backpack.graph import Edge, Graph, edge_of, read
from backpack.modules.calls import Note, noted
from backpack.modules.loss_calls import LossCall
from backpack.modules.module_io import ModuleIO
from backpack.modules.thread_state import muted
from backpack.samples import AnyLayout, Scattered, found_layout, layouts, same
from backpack.samples.coded_pass import MIXED, samples_of_entries
from backpack.samples.owners import Owners, find_owners
from backpack.samples.rows_above import axes_of_rows, samples_of_rows


def origin_of(
    found: Sequence[tuple[LossCall, Tensor]],
    prepared: Prepared,
    notes: Mapping[Edge, Note],
    module_io: dict[Node, list[ModuleIO]],
) -> Origin:
    """Where the samples lie at the inputs of losses, and what is known of the graph from there on.

    ``found``: the calls of losses, in their order, with the cotangents of their outputs. Those whose inputs depend on
    no parameter have no curvature.

    Raises:
        RuntimeError: No input comes from an extended module, or one does not show its samples.
    """
    own = prepared
    starts = {at for at, layout in prepared.begin.items() if prepared.owners.owned.get(at) is layout}
    if starts != {call.place for call, _ in found}:
        graphs = [(call, outer, read([call.edge])) for call, outer in found]
        reaching = [each for each in graphs if any(leaf in each[2].edges for leaf in prepared.plan.expected)]
        if not reaching:
            raise RuntimeError(
                f"The input of {type(found[0][0].loss).__name__} depends on no trainable parameter of an extended "
                f"module: second-order extensions need extend(model) before the forward pass, and parameters that are "
                f"not all frozen."
            )
        found = [(call, outer) for call, outer, _ in reaching]
        parts = [_from_loss(call, graph, prepared) for call, _, graph in reaching]
        own = parts[0] if len(parts) == 1 else _from_losses([call for call, _ in found], parts, prepared)
    again = partial(prepare_again, thoroughly=prepared.owners.is_thorough)
    terms = [Term(call, outer, own.begin[call.place]) for call, outer in found]
    return Origin(terms, own, _of_outputs(notes, own.graph), again, module_io)


def _from_losses(calls: Sequence[LossCall], parts: Sequence[Prepared], prepared: Prepared) -> Prepared:
    """The graph from the inputs of several losses on, prepared from what was prepared for each loss."""
    counts = dict.fromkeys(part.n for part in parts)
    if len(counts) > 1:
        raise RuntimeError(
            f"The inputs of {' and '.join(type(call.loss).__name__ for call in calls)} have "
            f"{' and '.join(map(str, counts))} samples: which of them belong together cannot be told. Call backward() "
            f"for each loss by itself, or let all inputs have the samples along the first axis."
        )
    graph = read([call.edge for call in calls])
    begin = {edge: layout for part in parts for edge, layout in part.begin.items()}
    are_parts = any(isinstance(layout, Scattered) for layout in begin.values())
    owners = _owners(graph, begin, prepared, prepared.owners.owned if are_parts else None)
    return _planned(graph, begin, owners, prepared, parts[0].n)


def _owners(
    graph: Graph, begin: Mapping[Edge, AnyLayout], prepared: Prepared, known: dict[Edge, AnyLayout] | None = None
) -> Owners:
    """Whose rows the cotangents are in a part of a graph, looked for as thoroughly as in all of it."""
    with muted():
        return find_owners(graph, begin, torch.Generator(), known, prepared.owners.is_thorough)


def _planned(graph: Graph, begin: Mapping[Edge, AnyLayout], owners: Owners, prepared: Prepared, n: int) -> Prepared:
    """A part of the prepared graph, with the uses of those parameters that are in it."""
    plan = make_plan(graph, owners, n, {leaf for leaf in prepared.plan.expected if leaf in graph.edges})
    plan.mixed = {entry: name for entry, name in prepared.plan.mixed.items() if entry in plan.entries}
    return Prepared(graph, begin, owners, plan)


def _from_loss(call: LossCall, graph: Graph, prepared: Prepared) -> Prepared:
    """The graph from a loss's input on, with the layout there that gives the samples of the modules' outputs."""
    edge = call.place
    shape, n = tuple(call.input.shape), prepared.n
    axes = (0,) if isinstance(call.loss, torch.nn.CrossEntropyLoss) else range(len(shape))
    possible: list[AnyLayout] = list(layouts(shape, n, axes))
    if edge in prepared.begin:
        possible = [prepared.begin[edge]]
    for layout in possible:
        owners = _owners(graph, {edge: layout}, prepared)
        if n == 1 or _agree(owners, prepared, graph):
            return _planned(graph, {edge: layout}, owners, prepared, n)
    rows = _rows_of_outputs(call, graph, prepared)
    if rows is not None:
        owners = _owners(graph, {edge: rows}, prepared, prepared.owners.owned)
        return _planned(graph, {edge: rows}, owners, prepared, n)
    raise RuntimeError(
        f"The input of {type(call.loss).__name__}, of shape {list(shape)}, does not show where the {n} samples lie: "
        f"let each row come from one of them, or let them be counted by another axis, and let nothing between the "
        f"model and the loss mix samples."
    )


def _rows_of_outputs(call: LossCall, graph: Graph, prepared: Prepared) -> AnyLayout | None:
    """Where the samples lie at the input of a loss, judging by the outputs that its rows are computed from.

    ``None``: some row comes from several samples, whatever counts as a row: an entry along the first axis, along all
    axes but the last, or any single entry. The classes of a row stay together.
    """
    shape = call.input.shape
    for axes in _axes_of_rows(call):
        sizes = [size if axis in axes else 1 for axis, size in enumerate(shape)]
        rows = torch.arange(prod(sizes)).reshape(sizes)
        begin = {call.place: found_layout(rows.numel() + 1, rows)}  # one of none: so no entry counts to any
        owners = _owners(graph, begin, prepared, {})
        sample = samples_of_rows(rows.numel(), owners, prepared.begin, prepared.owners.owned)
        if sample is not None and bool((sample >= 0).any()):  # a row that comes from no output counts nowhere
            return found_layout(prepared.n, sample.clamp(min=0)[rows], exactly=True)
    return _rows_that_repeat(call, prepared)


def _axes_of_rows(call: LossCall) -> Iterator[list[int]]:
    """The axes that may count rows: the first one, all but the last, all; classes are no rows."""
    dims = call.input.dim()
    if isinstance(call.loss, torch.nn.CrossEntropyLoss):
        yield [0]
        yield [axis for axis in range(dims) if axis != 1]
    else:
        yield from axes_of_rows(dims)


def _rows_that_repeat(call: LossCall, prepared: Prepared) -> AnyLayout | None:
    """The same as ``_rows_of_outputs``, also where several rows are computed from one row of an output."""
    owned = prepared.owners.owned
    starts = {GradientEdge(*edge): layout for edge, layout in prepared.begin.items() if owned.get(edge) is layout}
    with muted():
        entries = samples_of_entries(call.input, call.edge, starts, prepared.n, torch.Generator())
    if bool((entries == MIXED).any()) or not bool((entries >= 0).any()):
        return None
    for axes in _axes_of_rows(call):
        others = [axis for axis in range(entries.dim()) if axis not in axes]
        largest = entries.amax(others, keepdim=True) if others else entries
        if bool(((entries == largest) | (entries < 0)).all()):
            return found_layout(prepared.n, largest.clamp(min=0), exactly=True)  # a row of no output counts nowhere
    return None


def _of_outputs(notes: Mapping[Edge, Note], graph: Graph) -> dict[Edge, Note]:
    return {place: note for place, note in notes.items() if place[0] in graph.edges and not note.is_of_base}


def _agree(owners: Owners, prepared: Prepared, graph: Graph) -> bool:
    """Whether the samples lie where they lie as seen from the outputs of modules."""
    known = {at: layout for at, layout in prepared.owners.owned.items() if at[0] in graph.edges}
    begun = [at for at in prepared.begin if at in known]
    shared = [at for at in owners.owned if at in known]
    return bool(shared) and all(same(owners.owned.get(at), known[at]) for at in (*begun, *shared))


def prepare_again(
    edges: Sequence[GradientEdge],
    layouts: Sequence[AnyLayout],
    instead: Mapping[Edge, Edge] | None = None,
    thoroughly: bool = False,
) -> tuple[Prepared, Mapping[Edge, Note]]:
    """Prepare a graph that was recorded anew, from edges on at which the samples lie as the ``layouts`` say."""
    graph = read(edges, instead)
    notes, calls = noted(graph)
    begin = {edge_of(root): layout for root, layout in zip(graph.roots, layouts, strict=True)}
    n = layouts[0].n
    with muted():
        owners = find_owners(graph, begin, torch.Generator(), thoroughly=thoroughly)
    prepared = planned(graph, begin, owners, wanted_leaves(graph), calls, n, n)
    return prepared, _of_outputs(notes, graph)
