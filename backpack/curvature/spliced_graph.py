"""A graph with parts that were recorded anew, by running modules again with twice differentiable functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack.curvature.nodes_without_vmap import Pooling, Turns, poolings, turns
from backpack.curvature.residuals.local import Severed
from backpack.graph import Graph
from backpack.graph.vmap_limits import must_loop, nodes
from backpack.torch_internals import dtype_at, pull_back

LOW = (torch.bfloat16, torch.float16)


def _is_lowered(node: Node) -> bool:
    """Whether a node brings a tensor to 16 bits, as ``torch.autocast`` does."""
    if node.name() != "ToCopyBackward0" or dtype_at(GradientEdge(node, 0)) not in LOW:
        return False
    return any(
        dtype_at(GradientEdge(other, number)) not in LOW for other, number in node.next_functions if other is not None
    )


def place_of(edge: GradientEdge) -> GradientEdge:
    """The edge with its node and number alone, so that edges to the same place are equal."""
    return GradientEdge(edge.node, edge.output_nr)


def arrivals_at(node: Node, graph: Graph) -> list[GradientEdge]:
    """The outputs of a node's function that something arrives at."""
    numbers = {number for _, _, number in graph.incoming[node]}
    numbers |= {root.output_nr for root in graph.roots if root.node is node}
    return [GradientEdge(node, number) for number in sorted(numbers)]


@dataclass
class SplicedGraph:
    """A graph from some edges on in which the outputs of modules lead to other graphs than those that they came from.

    ``parts``: for each module that ran again, the last one first, the edges of its outputs as they were to what they
    are now. Its parameters are used in its part alone.
    """

    starts: Sequence[GradientEdge]
    parts: Sequence[Mapping[GradientEdge, GradientEdge]] = ()
    known: Sequence[Node] | None = None
    """The nodes of the graph, if they are known already."""
    _nodes: dict[int, set[Node]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.starts = [self.now(start) for start in self.starts]

    @cached_property
    def instead(self) -> dict[GradientEdge, GradientEdge]:
        """All replaced edges."""
        return {old: new for part in self.parts for old, new in part.items()}

    @property
    def replaced(self) -> dict[tuple[Node, int], tuple[Node, int]]:
        """The same, as nodes and numbers."""
        return {(old.node, old.output_nr): (new.node, new.output_nr) for old, new in self.instead.items()}

    @cached_property
    def nodes(self) -> list[Node]:
        """All nodes of the graph."""
        return list(self.known) if self.known is not None else nodes(self.starts, self.instead)

    @cached_property
    def poolings(self) -> list[Pooling]:
        """Nodes of max pooling, that several seeds go through by turns."""
        return poolings(self.nodes, self.instead)

    @cached_property
    def turns(self) -> list[Turns]:
        """Nodes that several seeds cannot go through together."""
        return turns(self.nodes)

    @property
    def has_autocast(self) -> bool:
        """Whether a part was recorded under autocast: derivatives of second order would mix its data types."""
        return any(map(_is_lowered, self.nodes))

    def now(self, edge: GradientEdge) -> GradientEdge:
        """The edge that has taken the place of this one; the same if none has."""
        return self.instead.get(place_of(edge), edge)

    def grad(
        self,
        edges: Sequence[GradientEdge],
        inputs: Sequence[Any],
        seeds: Sequence[Tensor],
        create_graph: bool = False,
    ) -> Sequence[Tensor | None]:
        """``torch.autograd.grad`` through all parts, which keeps the graph; each node of a part runs once at most.

        ``inputs``: edges, or tensors; ``seeds``: in any precision.
        """
        seeds = [seed.to(dtype_at(self.now(edge))) for edge, seed in zip(edges, seeds, strict=True)]
        if not self.parts:
            return pull_back(edges, inputs, seeds, create_graph)
        ends = [self.now(get_gradient_edge(i) if isinstance(i, Tensor) else i) for i in inputs]
        starts: list[list[tuple[GradientEdge, Tensor]]] = [[] for _ in range(len(self.parts) + 1)]
        for edge, seed in zip(map(self.now, edges), seeds, strict=True):
            starts[self._stage(edge.node)].append((edge, seed))
        found: list[Tensor | None] = [None] * len(ends)
        for stage, given in enumerate(starts):
            own = [k for k, end in enumerate(ends) if end.node in self._reached(stage)]
            left = self._next(stage)
            if not given or not (own or left):
                continue
            with Severed([old for _, old in left]):
                grads = pull_back(
                    [edge for edge, _ in given],
                    [ends[k] for k in own] + [old for _, old in left],
                    [seed for _, seed in given],
                    create_graph,
                )
            for k, grad in zip(own, grads, strict=False):
                before = found[k]
                found[k] = grad if before is None or grad is None else before + grad
            for (later, old), grad in zip(left, grads[len(own) :], strict=True):
                if grad is not None:
                    starts[later + 1].append((self.instead[old], grad))
        return found

    @property
    def must_loop(self) -> bool:
        """Whether seeds are pulled back one by one."""
        return must_loop(self.nodes)

    def _next(self, stage: int) -> list[tuple[int, GradientEdge]]:
        """Replaced outputs to which a part leads, each with the number of its own part."""
        reached = {edge for node in self._reached(stage) for edge in node.next_functions}
        return [(part, old) for part in range(stage, len(self.parts)) for old in self.parts[part] if old[:2] in reached]

    def _stage(self, node: Node) -> int:
        """The last part that leads to a node; of a view that was taken later, to what it is of."""
        found = [k for k in range(len(self.parts) + 1) if node in self._reached(k)]
        return max(found or [self._stage(before) for before, _ in node.next_functions if before is not None], default=0)

    def _reached(self, stage: int) -> set[Node]:
        """The nodes between the starts, or the outputs of a part, and the next parts."""
        if stage not in self._nodes:
            now = self.instead.values()
            begins = self.parts[stage - 1].values() if stage else [start for start in self.starts if start not in now]
            self._nodes[stage] = set(nodes(begins, dict.fromkeys(self.instead)))
        return self._nodes[stage]
