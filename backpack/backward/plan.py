"""Before a pass runs: which edges of its graph are uses of parameters, and what arrives at each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from backpack.graph import LEAF, Edge, Graph, kind, saved, shape_of, signed, variable_of
from backpack.samples import AnyLayout, Scattered, completed
from backpack.samples.owners import Owners


@dataclass(eq=False, slots=True)
class PlannedUse:
    """Edge ``k`` of a node whose output ``number`` belongs to samples, as ``layout`` says, to what does not.

    ``sent``: where the samples lie in what is sent along the edge, ``None``: several in a row; ``leaf``: the node of
    the parameter, where only transpositions and casts are between, and ``turned``: whether they transpose it; otherwise
    what is sent goes through ``entry``, an edge into a region that belongs to no sample. ``is_alone``: nothing else
    arrives at the parameter.
    """

    k: int
    number: int
    layout: AnyLayout
    sent: AnyLayout | None
    leaf: Node | None = None
    turned: bool = False
    entry: Edge | None = None
    is_alone: bool = False


@dataclass(eq=False)
class Plan:
    """Of one pass.

    ``uses``: by node; ``expected``: how much arrives at each parameter, by its node; ``entries``: nodes through which
    cotangents enter regions that belong to no sample, and the parameters behind each; ``outside``: parameters of whose
    gradients a part comes from no sample; ``mixed``: of the entries, those behind which data are, and what mixes
    samples; ``for_all``: the memory of inputs in these regions that are for all samples.
    """

    n: int
    uses: dict[Node, list[PlannedUse]] = field(default_factory=dict)
    expected: dict[Node, int] = field(default_factory=dict)
    entries: dict[Node, list[Node]] = field(default_factory=dict)
    outside: list[Tensor] = field(default_factory=list)
    mixed: dict[Node, str] = field(default_factory=dict)
    for_all: set[int] = field(default_factory=set)


def make_plan(graph: Graph, owners: Owners, n: int, wanted: set[Node]) -> Plan:
    """The uses of those parameters whose nodes are wanted."""
    plan = Plan(n)
    behind: dict[Node, list[Node]] = {}
    mixed, owned = owners.mixed, owners.owned
    is_alone = not any(edge in owned or edge in mixed for edge in owners.above)
    for node, sent in owners.sends.items():
        number, layout = 0, owned.get((node, 0))
        found: PlannedUse | None
        for k, (other, behind_it) in enumerate(graph.edges[node]):
            if other is None:
                continue
            edge = (other, behind_it)
            leaf, turned = (other, False) if other.name() == LEAF else (None, False)
            if leaf is None:
                if edge not in mixed:
                    continue
                edge, turned = _behind_transpositions(other, behind_it, graph.edges, kind(node) == "GroupedMm")
                other = edge[0]
                leaf = other if other.name() == LEAF else None
            if layout is None:
                number, layout = next((nr, own) for nr in range(99) if (own := owned.get((node, nr))) is not None)
            if isinstance(layout, Scattered) and is_alone:  # nothing at all reaches entries of no sample
                layout = completed(layout, shape_of(node, number))
            if isinstance(layout, Scattered):
                layout = layout.with_whole_rows()
            if leaf is not None:
                if leaf not in wanted:
                    continue
                found = PlannedUse(k, number, layout, sent[k], leaf, turned)
                plan.expected[leaf] = plan.expected.get(leaf, 0) + 1
            else:
                leaves = _reached(other, graph, wanted, behind)
                if not leaves:
                    continue
                found = PlannedUse(k, number, layout, sent[k], None, turned, edge)
                if other not in plan.entries:
                    plan.entries[other] = list(leaves)
                    for leaf in leaves:
                        plan.expected[leaf] = plan.expected.get(leaf, 0) + 1
            plan.uses.setdefault(node, []).append(found)
    for edge, layout in owners.joined.items():
        behind_it, turned = _behind_transpositions(*edge, graph.edges)
        leaf = behind_it[0] if behind_it[0].name() == LEAF else None
        turned = turned and leaf is not None
        leaves = [leaf] if leaf is not None else _reached(edge[0], graph, wanted, behind)
        for node, k, number in graph.incoming[edge[0]]:
            if not leaves or number != edge[1] or node in owners.sends or (node, -1) in mixed:
                continue
            entry = edge if leaf is None else None
            plan.uses.setdefault(node, []).append(PlannedUse(k, 0, layout, layout, leaf, turned, entry))
            if leaf is not None:
                plan.expected[leaf] = plan.expected.get(leaf, 0) + 1
            elif edge[0] not in plan.entries:
                plan.entries[edge[0]] = list(leaves)
                for each in leaves:
                    plan.expected[each] = plan.expected.get(each, 0) + 1
    for uses in plan.uses.values():
        for found in uses:
            found.is_alone = found.leaf is not None and plan.expected[found.leaf] == 1
    outside = {node for node, _ in owners.above if node in wanted}
    for edge in owners.above:
        own = owned.get(edge)
        has_others = isinstance(own, Scattered) and bool((own.owner < 0).any())
        if has_others or (edge in mixed and edge not in owners.joined):
            outside.update(_reached(edge[0], graph, wanted, behind))
    ordered = [*plan.expected, *graph.order]
    plan.outside = [variable_of(node) for node in dict.fromkeys(ordered) if node in outside]
    return plan


def _behind_transpositions(
    node: Node, number: int, edges: dict[Node, Any], of_stacks: bool = False
) -> tuple[Edge, bool]:
    """What an edge leads to by transpositions and casts alone, and whether it is transposed.

    It stays as it is where only data are behind. ``of_stacks``: matrices of a stack may be transposed as well.
    """
    turned = False
    while node.name() != LEAF:
        name = kind(node)
        if name == "T" or (name == "Transpose" and len(shape_of(node, number)) == 2):
            is_turn = name == "T" or (saved(node, "dim0") - saved(node, "dim1")) % 2 == 1
            following_turned = turned != (is_turn and len(shape_of(node, number)) == 2)
        elif of_stacks and name == "Transpose" and len(shape_of(node, number)) == 3:
            if {signed(saved(node, "dim0")) % 3, signed(saved(node, "dim1")) % 3} != {1, 2}:
                break
            following_turned = not turned
        elif name == "ToCopy":
            following_turned = turned
        else:
            break
        (following,) = edges[node]
        if following[0] is None:
            break
        (node, number), turned = following, following_turned
    return (node, number), turned


def _reached(start: Node, graph: Graph, wanted: set[Node], behind: dict[Node, list[Node]]) -> Sequence[Node]:
    """The wanted parameters behind a node."""
    if start not in behind:
        seen, pending, found = {start}, [start], []
        while pending:
            node = pending.pop()
            if node in wanted:
                found.append(node)
            for other, _ in graph.edges[node]:
                if other is not None and other not in seen:
                    seen.add(other)
                    pending.append(other)
        behind[start] = found
    return behind[start]
