"""The recorded graph, read once before a backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch.autograd.graph import GradientEdge, Node

Edge = tuple[Node, int]
"""A node, and which output of its function an edge leads to."""

Incoming = tuple[Node, int, int]
"""A node, which of its edges, and to which output of the function behind it leads."""


@dataclass(eq=False)
class Graph:
    """All nodes below some edges.

    ``order``: each node before those that its edges lead to; ``edges``: of each node; ``incoming``: those that lead
    to it.
    """

    roots: Sequence[GradientEdge]
    order: list[Node]
    edges: dict[Node, Any]
    incoming: dict[Node, list[Incoming]]

    @cached_property
    def notes(self) -> dict[Node, dict[Any, Any]]:
        """What the forward pass has left at nodes."""
        found: dict[Node, Any] = {node: node.metadata for node in self.order}
        return {node: left for node, left in found.items() if left}

    def inputs_of(self, node: Node) -> list[Edge]:
        """The edges of a node that lead somewhere."""
        return [(other, number) for other, number in self.edges[node] if other is not None]

    def behind(self, starts: Iterable[Node]) -> Iterator[Node]:
        """Some nodes, and all nodes that edges lead to from them."""
        pending = list(dict.fromkeys(starts))
        seen = set(pending)
        while pending:
            node = pending.pop()
            yield node
            for other, _ in self.edges[node]:
                if other is not None and other not in seen:
                    seen.add(other)
                    pending.append(other)


def read(roots: Iterable[GradientEdge], instead: Mapping[Edge, Edge] | None = None) -> Graph:
    """Go through a graph, without recursion.

    ``instead``: edges, as node and number, that others take the place of.
    """
    roots = [root if not instead else GradientEdge(*instead.get(root[:2], root[:2])) for root in roots]
    edges: dict[Node, Any] = {}
    incoming: dict[Node, list[Incoming]] = {root.node: [] for root in roots}
    pending = list(incoming)
    while pending:
        node = pending.pop()
        following = node.next_functions
        if instead:
            following = tuple(edge if edge[0] is None else instead.get((edge[0], edge[1]), edge) for edge in following)
        edges[node] = following
        for k, (other, number) in enumerate(following):
            if other is None:
                continue
            if other in incoming:
                incoming[other].append((node, k, number))
            else:
                incoming[other] = [(node, k, number)]
                pending.append(other)
    waits = {node: len(leading) for node, leading in incoming.items()}
    order: list[Node] = []
    ready = [node for node, count in waits.items() if count == 0]
    while ready:
        node = ready.pop()
        order.append(node)
        for other, _ in edges[node]:
            if other is not None:
                waits[other] -= 1
                if waits[other] == 0:
                    ready.append(other)
    return Graph(roots, order, edges, incoming)


def edge_of(edge: GradientEdge) -> Edge:
    """An edge as a key."""
    return edge.node, edge.output_nr
