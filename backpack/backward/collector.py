"""Takes cotangents to the uses of parameters that they reach, in PyTorch's backward pass or in one of our own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.backward.arrivals import Arrival, Contributions
from backpack.backward.plan import Plan, PlannedUse
from backpack.graph import Edge, Graph, count_outputs, kind, variable_of
from backpack.modules.parameters import name_of
from backpack.nodes import GeneralUse, Place, PlacedUse, use_of
from backpack.samples import AnyLayout
from backpack.samples.owners import Owners
from backpack.uses import Cotangents, Use


def refusal(name: str, function: str) -> RuntimeError:
    """The error for a parameter in a custom function that sums over samples and does not tell how."""
    return RuntimeError(
        f"{function} combines samples with the parameter {name} and returns a sum: its backward() gives the gradient "
        f"of the parameter for all samples together, and not for each. For torch.nn.functional.linear_cross_entropy "
        f'with options, take an extended torch.nn.LinearCrossEntropyLoss, or reduction="none" and sum its output. For '
        f"a function of your own, register a form with @backpack.nodes.form(YourFunction, rows_of=k), or use "
        f"operations of PyTorch; or freeze the parameter with requires_grad_(False)."
    )


@dataclass(eq=False)
class Prepared:
    """What is known of a graph before a pass through it.

    ``begin``: where the samples begin, ``n`` of them; ``owners``: whose rows the cotangents are; ``plan``: the uses of
    parameters.
    """

    graph: Graph
    begin: Mapping[Edge, AnyLayout]
    owners: Owners
    plan: Plan

    @property
    def n(self) -> int:
        """How many samples there are."""
        return self.plan.n

    def only(self, wanted: Callable[[Tensor], bool] | None) -> Prepared:
        """The same for some parameters; ``None``: for all."""
        return self if wanted is None else replace(self, plan=self.plan.only(wanted))


class Collector(ABC):
    """Collects what arrives at the parameters in one pass.

    ``is_partial``: the pass ends before some leaves. A node that runs by itself inside of such a pass computes only
    what the pass needs. So such calls are ``deferred`` to its end, and the graph has to be kept until then.
    """

    is_partial = False

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.graph, self.owners, self.plan = prepared.graph, prepared.owners, prepared.plan
        self.found: dict[Node, Contributions] = {}
        self.entering: dict[Node, dict[int, Contributions]] = {}
        self.deferred: list[tuple[PlannedUse, Arrival]] = []

    @cached_property
    def places(self) -> dict[Node, int]:
        """The place of each node in the order of the graph."""
        return {node: place for place, node in enumerate(self.graph.order)}

    def contributions(self, leaf: Node) -> Contributions:
        """What has arrived at a parameter."""
        if leaf not in self.found:
            parameter = variable_of(leaf)
            self.found[leaf] = Contributions(parameter.shape, parameter.dtype, parameter.device, parameter)
        return self.found[leaf]

    def contributions_at(self, edge: Edge) -> Contributions:
        """What has arrived at an edge into a region that belongs to no sample."""
        node, number = edge
        entered = self.entering.setdefault(node, {})
        if number not in entered:
            metadata = node._input_metadata[number]
            entered[number] = Contributions(torch.Size(metadata.shape), metadata.dtype, metadata.device)
        return entered[number]

    def arrival(self, node: Node, planned: PlannedUse, cotangents: Cotangents) -> Arrival:
        """Cotangents of a node's outputs, and the use that they reach."""
        if planned.sent is not None:
            use: Use | None = PlacedUse(node, planned.k, planned.sent, count_outputs(node))
            return Arrival(use, cotangents, planned.sent, planned.turned)  # type: ignore[arg-type]
        use = None
        if planned.number == 0 and len(cotangents) == 1 and 0 in cotangents:
            use = use_of(Place(node, planned.k, 0, planned.layout))
        if use is None and planned.is_summed:
            raise refusal(self.name_of_use(planned), kind(node))
        if use is None:
            layouts = [self.owners.owned.get((node, number)) for number in range(count_outputs(node))]
            use = GeneralUse(node, planned.k, layouts, self.is_mixed(planned))
        return Arrival(use, cotangents, planned.layout, planned.turned)

    def name_of_use(self, planned: PlannedUse) -> str:
        """The name of the parameter, or of one of those, that a use leads to."""
        leaf = planned.leaf
        if leaf is None:
            assert planned.entry is not None
            leaf = self.plan.entries[planned.entry[0]][0]
        return name_of(variable_of(leaf))

    def is_mixed(self, planned: PlannedUse) -> bool:
        """Whether the edge of a use leads to where samples are mixed."""
        return planned.entry is not None and planned.entry[0] in self.plan.mixed

    def take_in(self, planned: PlannedUse, arrival: Arrival) -> None:
        """Take the cotangents at a use to its parameter, or to the edge at which they enter a region."""
        if self.is_partial and arrival.runs_node:
            self.deferred.append((planned, arrival))
        elif planned.leaf is not None:
            self.add(self.contributions(planned.leaf), arrival, planned.leaf)
            self.count(planned.leaf)
        else:
            assert planned.entry is not None
            self.add(self.contributions_at(planned.entry), arrival)

    def add(self, contributions: Contributions, arrival: Arrival, leaf: Node | None = None) -> None:
        """Add what has arrived at a parameter, whose node is given, or at an edge into a region."""
        contributions.arrivals.append(arrival)

    def take_deferred(self) -> None:
        """Take in what had to wait for the end of a partial pass."""
        self.is_partial = False
        deferred, self.deferred = self.deferred, []
        for planned, arrival in deferred:
            self.take_in(planned, arrival)

    def entered(self) -> list[Node]:
        """Nodes through which something has entered regions, each before those below it."""
        return sorted(self.entering, key=self.places.__getitem__) if self.entering else []

    def count(self, leaf: Node) -> None:
        """Something has arrived at a parameter; if that was all, compute the results."""
        contributions = self.contributions(leaf)
        contributions.count += 1
        if contributions.count == self.plan.expected[leaf]:
            self.completed(leaf, contributions)

    @abstractmethod
    def completed(self, leaf: Node, contributions: Contributions) -> None:
        """All uses of a parameter have contributed."""

    def outputs_of(self, nodes: Iterable[Node]) -> list[GradientEdge]:
        """The outputs of nodes' functions that belong to samples."""
        outputs = [(node, number) for node in nodes for number in range(count_outputs(node))]
        return [GradientEdge(*output) for output in outputs if output in self.owners.owned]

    def lowest(self, starts: Sequence[Node], among: Iterable[Node]) -> list[Node]:
        """Those of the nodes, behind the starts, that have no other of them behind themselves."""
        among, reached = set(among), set(self.graph.behind(starts))
        lowest: list[Node] = []
        at_or_above: set[Node] = set()
        for node in reversed(self.graph.order):
            is_above = any(other in at_or_above for other, _ in self.graph.edges[node])
            if node in reached and (is_above or node in among):
                at_or_above.add(node)
                if not is_above:
                    lowest.append(node)
        return lowest
