"""The plan of a pass: which edges of its graph are uses of parameters, and how many arrive at each parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from backpack.graph import LEAF, Edge, Graph, Incoming, kind, saved, shape_of, signed, variable_of
from backpack.samples import AnyLayout, Scattered, completed
from backpack.samples.layout_rules import summed_edge
from backpack.samples.owners import Owners


@dataclass(eq=False, slots=True)
class PlannedUse:
    """Edge ``k`` of a node whose output ``number`` belongs to samples, as ``layout`` says, to what does not.

    ``sent``: where the samples lie in what is sent along the edge, ``None``: several in a row; ``leaf``: the node of
    the parameter, where only transpositions and casts are between, and ``turned``: whether they transpose it; otherwise
    what is sent goes through ``entry``, an edge into a region that belongs to no sample. ``is_alone``: nothing else
    arrives at the parameter. ``is_summed``: the layout is that of the rows of an input that the node sums over.
    """

    k: int
    number: int
    layout: AnyLayout
    sent: AnyLayout | None
    leaf: Node | None = None
    turned: bool = False
    entry: Edge | None = None
    is_alone: bool = False
    is_summed: bool = False


@dataclass(eq=False)
class Plan:
    """What one pass will take in.

    ``uses``: for each node; ``expected``: how many contributions arrive at each parameter, by its node; ``entries``:
    nodes through which cotangents enter regions that belong to no sample, and the parameters behind each; ``outside``:
    parameters of whose gradients a part comes from no sample; ``hidden``: of these, the ones that custom functions
    combine with samples, and the kinds of these functions' nodes; ``mixed``: of the entries, those behind which data
    are, and what mixes samples; ``for_all``: the memory of inputs in these regions that are for all samples.
    """

    n: int
    uses: dict[Node, list[PlannedUse]] = field(default_factory=dict)
    expected: dict[Node, int] = field(default_factory=dict)
    entries: dict[Node, list[Node]] = field(default_factory=dict)
    outside: list[Tensor] = field(default_factory=list)
    hidden: list[tuple[Tensor, str]] = field(default_factory=list)
    mixed: dict[Node, str] = field(default_factory=dict)
    for_all: set[int] = field(default_factory=set)

    def only(self, wanted: Callable[[Tensor], bool]) -> Plan:
        """The plan for some parameters: of the uses, those that lead to one of them."""
        leaves = {leaf for leaf in self.expected if wanted(variable_of(leaf))}
        entries = {node: [leaf for leaf in found if leaf in leaves] for node, found in self.entries.items()}
        entries = {node: found for node, found in entries.items() if found}
        uses = {
            node: [use for use in own if use.leaf in leaves or (use.entry is not None and use.entry[0] in entries)]
            for node, own in self.uses.items()
        }
        return replace(
            self,
            uses={node: own for node, own in uses.items() if own},
            expected={leaf: count for leaf, count in self.expected.items() if leaf in leaves},
            entries=entries,
            mixed={node: name for node, name in self.mixed.items() if node in entries},
        )


def make_plan(graph: Graph, owners: Owners, n: int, wanted: set[Node]) -> Plan:
    """The uses of those parameters whose nodes are wanted."""
    planner = _Planner(graph, owners, wanted, Plan(n))
    only_samples = not any(edge in owners.owned or edge in owners.mixed for edge in owners.above)
    for node, sent in owners.sends.items():
        planner.add_uses_by(node, sent, only_samples)
    for edge, layout in owners.joined.items():
        for node, k, number in graph.incoming[edge[0]]:
            if number == edge[1] and node not in owners.sends and (node, -1) not in owners.mixed:
                planner.add(node, PlannedUse(k, 0, layout, layout), edge)
    planner.add_summed_uses()
    plan = planner.plan
    for uses in plan.uses.values():
        for use in uses:
            use.is_alone = use.leaf is not None and plan.expected[use.leaf] == 1
    outside = planner.outside()
    plan.hidden = planner.hidden(outside)
    plan.outside = [variable_of(node) for node in dict.fromkeys([*plan.expected, *graph.order]) if node in outside]
    return plan


@dataclass(eq=False)
class _Planner:
    """Collects the uses. ``behind``: the wanted parameters behind each node that was asked for so far."""

    graph: Graph
    owners: Owners
    wanted: set[Node]
    plan: Plan
    behind: dict[Node, list[Node]] = field(default_factory=dict)
    summed: set[Incoming] = field(default_factory=set)

    def add_summed_uses(self) -> None:
        """Add the parameters of nodes above all samples that sum over the rows of an input."""
        for node in {node: None for node, _ in self.owners.above if node not in self.owners.sends}:
            rows = summed_edge(node)
            layout = None if rows is None else self.owners.owned.get(self.graph.edges[node][rows])
            for k, edge in enumerate(self.graph.edges[node] if layout is not None else ()):
                if k != rows and edge[0] is not None and edge not in self.owners.owned:
                    assert layout is not None
                    self.add(node, PlannedUse(k, 0, layout, None, is_summed=True), edge)
                    self.summed.add((node, k, edge[1]))

    def add_uses_by(self, node: Node, sent: Sequence[AnyLayout | None], only_samples: bool) -> None:
        """Add those edges of a node that lead from samples to a parameter, or into a region that belongs to no sample.

        ``only_samples``: nothing but the samples reaches an edge that is owned or mixed.
        """
        found: tuple[int, AnyLayout] | None = None
        for k, (other, behind_it) in enumerate(self.graph.edges[node]):
            if other is not None and (other.name() == LEAF or (other, behind_it) in self.owners.mixed):
                number, layout = found = found or self._output_of(node, only_samples)
                self.add(node, PlannedUse(k, number, layout, sent[k]), (other, behind_it))

    def _output_of(self, node: Node, only_samples: bool) -> tuple[int, AnyLayout]:
        """The first output of a node's function that belongs to samples, and its layout.

        Entries that belong to no sample are counted to those beside them where nothing else can reach them.
        """
        number, layout = self.owners.first_owned(node)
        if only_samples and isinstance(layout, Scattered):
            layout = completed(layout, shape_of(node, number))
        return number, layout.with_whole_rows() if isinstance(layout, Scattered) else layout

    def add(self, node: Node, use: PlannedUse, edge: Edge) -> None:
        """Add a use by a node, whose edge ``use.k`` is given, if a wanted parameter is behind that."""
        edge, use.turned = _behind_transpositions(*edge, self.graph.edges, kind(node) == "GroupedMm")
        leaves = self.reached(edge[0])
        if not leaves:
            return
        plan = self.plan
        plan.uses.setdefault(node, []).append(use)
        if edge[0].name() == LEAF:
            use.leaf = edge[0]
        else:
            use.entry = edge
            if edge[0] in plan.entries:
                return
            plan.entries[edge[0]] = leaves
        for leaf in leaves:
            plan.expected[leaf] = plan.expected.get(leaf, 0) + 1

    def reached(self, start: Node) -> list[Node]:
        """The wanted parameters behind a node, or the parameter itself."""
        if start.name() == LEAF:
            return [start] if start in self.wanted else []
        if start not in self.behind:
            self.behind[start] = [node for node in self.graph.behind([start]) if node in self.wanted]
        return self.behind[start]

    def outside(self) -> set[Node]:
        """The nodes of parameters of whose gradients a part comes from no sample."""
        owners = self.owners
        beside = self._beside_summed()
        outside = beside & self.wanted
        for edge in (edge for edge in owners.above if edge[0] in beside):
            layout = owners.owned.get(edge)
            has_others = isinstance(layout, Scattered) and layout.has_none
            if has_others or (edge in owners.mixed and edge not in owners.joined):
                outside.update(self.reached(edge[0]))
        return outside

    def _beside_summed(self) -> set[Node]:
        """The nodes above all samples that something comes to which is not in ``summed``."""
        if not self.summed:
            return {node for node, _ in self.owners.above}
        known, ends = self.owners, {root.node for root in self.graph.roots}
        above = {node for node, _ in known.above}
        found: set[Node] = set()
        for node in self.graph.order:
            ways = (way for way in self.graph.incoming[node] if way not in self.summed)
            if node in above and (node in ends or any(way[0] in found for way in ways)):
                found.add(node)
        return found

    def hidden(self, outside: set[Node]) -> list[tuple[Tensor, str]]:
        """The parameters that custom functions above all samples combine with samples, and these functions' kinds."""
        owners, found = self.owners, dict[Node, str]()
        data: set[Node] = set()
        for node in reversed(self.graph.order) if outside else ():
            following = self.graph.inputs_of(node)
            if not any(edge in owners.owned or edge[0] in data for edge in following) or node in owners.sends:
                continue
            data.add(node)
            if isinstance(node, BackwardCFunction) and (node, -1) not in owners.mixed:
                own = {
                    leaf
                    for k, (other, number) in enumerate(self.graph.edges[node])
                    if other is not None
                    and other not in data
                    and (node, k, number) not in self.summed
                    and (other, number) not in owners.owned
                    for leaf in self.reached(other)
                }
                found.update(dict.fromkeys(own & outside, kind(node)))
        return [(variable_of(leaf), name) for leaf, name in found.items()]


def _behind_transpositions(
    node: Node, number: int, edges: dict[Node, Any], of_stacks: bool = False
) -> tuple[Edge, bool]:
    """The edge behind transpositions and casts, and whether they transpose what passes them.

    Views of the same shape are passed as well, none where no gradient flows behind. ``of_stacks``: matrices of a stack
    may be transposed as well.
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
        elif name == "ToCopy" or _keeps_shape(node, number, edges):
            following_turned = turned
        else:
            break
        (following,) = edges[node]
        if following[0] is None:
            break
        (node, number), turned = following, following_turned
    return (node, number), turned


def _keeps_shape(node: Node, number: int, edges: dict[Node, Any]) -> bool:
    """Whether a view is of the same shape as what it is of, and not of other entries."""
    if kind(node) not in ("Alias", "View", "ReshapeAlias", "UnsafeView"):
        return False
    ((other, behind),) = edges[node]
    return other is not None and shape_of(node, number) == shape_of(other, behind)
