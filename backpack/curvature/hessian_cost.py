"""Estimates what the Hessian's diagonal costs, from the graph alone, before anything is computed.

The unit is one multiplication in a large matrix product. Entries that go through memory and calls of nodes are counted
in this unit too, as measured on CPUs. The estimate should be right up to a factor of two.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from weakref import WeakKeyDictionary

import torch
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Module

from backpack.graph import LEAF, VIEWS, Graph, kind, shape_of

ENTRY = 40
"""Cost of each entry that a function computes; twice as much for many columns, which no cache holds."""

CALL = 2**18
"""Cost of a call of a node."""

PULL = 2**25
"""Cost of a pull-back, beside the calls of its nodes."""

BEFORE = 2**26
"""Cost of what is done once for a graph, for the second derivatives of a node, or for a parameter."""

LONG = 100
"""How many steps of training the diagonal may take without a warning."""

MOMENT = 2**35
"""How many multiplications it may take without a warning, whatever a step takes: about a second."""

OPERANDS = {"Mm": 0, "Bmm": 0, "Addmm": 1, "Baddbmm": 1}
"""The place of the left one of two matrices."""


@dataclass(frozen=True)
class Share:
    """What a node or parameter costs: ``count`` columns or entries, which take as long as ``steps`` of training."""

    what: str
    count: int
    steps: float
    by_entries: bool = False


_told: WeakKeyDictionary[Module, set[str]] = WeakKeyDictionary()
"""The warnings that users have got for a model."""


def warn_if_long(module: Module, names: str, shares: Iterable[Share], step: float) -> None:
    """Warn once of what takes long in a model, and say what to do instead."""
    shares = list(shares)
    steps = sum(share.steps for share in shares)
    keeps_graphs = torch.is_grad_enabled()
    if not keeps_graphs and (steps <= LONG or steps * step <= MOMENT):
        return
    if names in _told.setdefault(module, set()):
        return
    _told[module].add(names)
    shares = sorted(shares, key=lambda share: -share.steps)
    causes = ", ".join(f"{share.what} ({share.steps:.0f} steps)" for share in shares[:3])
    columns = sum(share.count for share in shares if not share.by_entries)
    entries = sum(share.count for share in shares if share.by_entries)
    parts = [f"{columns} columns are pulled back"] if columns else []
    if entries:
        what = "what enters the graph in several places, not linearly or below what mixes samples"
        what = "under backward(create_graph=True) the diagonal" if keeps_graphs else what
        keeps = ", and keeps the graphs of all" if keeps_graphs else ""
        parts.append(f"{what} is taken entry by entry, which costs {entries} derivatives of second order{keeps}")
    warnings.warn(
        f"{names} will take about as long as {steps:.0f} steps of training: "
        f"{', and '.join(parts)}. Most of it is for {causes}. DiagHessianMC() estimates the diagonal "
        f"from a few columns.",
        stacklevel=2,
    )


def multiplications(node: Node) -> int:
    """How many a matrix product or convolution takes; zero for any other function."""
    name, edges = kind(node), node.next_functions
    shape = shape_of(node, 0) if node.name() != LEAF else ()
    if name == "Convolution" and edges[1][0] is not None:
        return prod(shape) * prod(shape_of(edges[1][0], edges[1][1])[1:])
    for place in (OPERANDS[name], OPERANDS[name] + 1) if name in OPERANDS else ():
        other, number = edges[place]
        if other is not None:
            rest = shape[-1] if place == OPERANDS[name] else shape[-2]
            return prod(shape_of(other, number)) * rest
    return 0


def work(node: Node, entry: int = ENTRY) -> int:
    """The cost of the forward pass through a node's function."""
    entries = 0 if kind(node) in VIEWS or node.name() == LEAF else prod(shape_of(node, 0))
    return multiplications(node) + entry * entries


class Costs:
    """The costs of passes through a graph.

    ``uses``: nodes that use parameters, for each of which the gradients of ``n`` samples are computed; ``ends``: the
    nodes at which pull-backs of columns end.
    """

    def __init__(self, graph: Graph, n: int, uses: Iterable[Node], ends: Iterable[Node]) -> None:
        self._graph, self._n = graph, n
        self._uses, self._ends = set(uses), set(ends)
        self._work = {node: work(node) for node in graph.order}
        self._wide = {node: work(node, 2 * ENTRY) for node in graph.order}
        self.step = sum(3 * own + 3 * CALL for own in self._work.values())
        """The cost of a step of training: a forward and a backward pass."""

    def columns(self, edges: Sequence[GradientEdge], count: int, chunk: int, leading: set[Node]) -> float:
        """Cost of pulling columns back from these edges, some at a time, through nodes that are ``leading`` to uses."""
        below = self._below(edges, leading)
        each = float(sum(self._wide[node] for node in below - self._ends))
        each += sum(self._contraction(node) for node in below & self._uses)
        return BEFORE + count * each + -(-count // chunk) * (PULL + 3 * CALL * len(below))

    def entries(self, count: int, calls: int, one_by_one: bool) -> float:
        """Cost of second derivatives, in so many calls or one by one; they go through the graph of the gradient."""
        calls = (count if one_by_one else calls) * 12 * CALL * len(self._work)
        return BEFORE + 2 * count * sum(self._wide.values()) + calls

    def _below(self, edges: Sequence[GradientEdge], leading: set[Node]) -> set[Node]:
        """The leading nodes that are reached from these edges through such nodes."""
        seen, pending = set[Node](), [edge.node for edge in edges]
        while pending:
            node = pending.pop()
            if node in seen or node not in self._work or node not in leading:
                continue
            seen.add(node)
            pending += [other for other, _ in self._graph.edges[node] if other is not None]
        return seen

    def _contraction(self, node: Node) -> float:
        """Cost of squared individual gradients: products over positions, and a square for each entry."""
        shape, products = shape_of(node, 0), multiplications(node)
        outputs = shape[1 if kind(node) == "Convolution" else -1] if shape else 1
        positions = max(1, prod(shape) // max(1, self._n * outputs))
        if not products or positions == 1:
            return 2 * ENTRY * prod(shape)
        return products * (1 + ENTRY / positions)
