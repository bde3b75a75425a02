"""Before a pass runs: which edges of its graph are uses of parameters, and what arrives at each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from backpack.graph import LEAF, Graph, kind, shape_of, variable_of
from backpack.samples import AnyLayout
from backpack.samples.owners import Edge, Owners


@dataclass(eq=False)
class PlannedUse:
    """Edge ``k`` of a node whose output belongs to samples, to what does not.

    ``sent``: where the samples lie in what is sent along the edge, ``None``: several in a row; ``leaf``: the node of
    the parameter, where only transpositions and casts are between, and ``turned``: whether they transpose it; otherwise
    what is sent goes through ``entry``, an edge into a region that belongs to no sample.
    """

    k: int
    sent: AnyLayout | None
    leaf: Node | None = None
    turned: bool = False
    entry: Edge | None = None


@dataclass(eq=False)
class Plan:
    """Of one pass.

    ``uses``: by node; ``expected``: how much arrives at each parameter, by its node; ``entries``: nodes through which
    cotangents enter regions that belong to no sample, and the parameters behind each; ``outside``: parameters of whose
    gradients a part comes from no sample; ``mixed``: of the entries, those behind which data are, and what mixes
    samples.
    """

    n: int
    uses: dict[Node, list[PlannedUse]] = field(default_factory=dict)
    expected: dict[Node, int] = field(default_factory=dict)
    entries: dict[Node, list[Node]] = field(default_factory=dict)
    outside: list[Tensor] = field(default_factory=list)
    mixed: dict[Node, str] = field(default_factory=dict)


def make_plan(graph: Graph, owners: Owners, n: int, wanted: set[Node]) -> Plan:
    """The uses of those parameters whose nodes are wanted."""
    plan = Plan(n)
    behind: dict[Node, list[Node]] = {}
    mixed, owned = owners.mixed, owners.owned
    for node, sent in owners.sends.items():
        for k, (other, number) in enumerate(graph.edges[node]):
            if other is None:
                continue
            found: PlannedUse | None = None
            layout = sent[k]
            if other.name() == LEAF:
                found = PlannedUse(k, layout, other) if other in wanted else None
            elif (other, number) in mixed:
                leaf, turned = _parameter_behind(other, number, graph.edges)
                if leaf is None:
                    found = (
                        PlannedUse(k, layout, entry=(other, number)) if _reached(other, graph, wanted, behind) else None
                    )
                elif leaf in wanted:
                    found = PlannedUse(k, layout, leaf, turned)
            elif layout is None and (other, number) not in owned:
                raise AssertionError("An edge is neither owned nor mixed.")
            if found is None:
                continue
            plan.uses.setdefault(node, []).append(found)
            if found.leaf is not None:
                plan.expected[found.leaf] = plan.expected.get(found.leaf, 0) + 1
            elif other not in plan.entries:
                plan.entries[other] = behind[other]
                for leaf in behind[other]:
                    plan.expected[leaf] = plan.expected.get(leaf, 0) + 1
    outside = {node for node, _ in owners.above if node in wanted}
    for edge in owners.above:
        if edge in mixed:
            outside.update(_reached(edge[0], graph, wanted, behind))
    ordered = [*plan.expected, *graph.order]
    plan.outside = [variable_of(node) for node in dict.fromkeys(ordered) if node in outside]
    return plan


def _parameter_behind(node: Node, number: int, edges: dict[Node, Any]) -> tuple[Node | None, bool]:
    """The parameter that an edge leads to by transpositions and casts alone, and whether it is transposed."""
    turned = False
    while node.name() != LEAF:
        name = kind(node)
        if name == "T" or (name == "Transpose" and len(shape_of(node, number)) == 2):
            turned = not turned
        elif name != "ToCopy":
            return None, False
        (following,) = edges[node]
        node, number = following
        if node is None:
            return None, False
    return node, turned


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
