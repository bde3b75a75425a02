"""Finds the owners of cotangents: for each edge of a graph where the samples lie, or that they are mixed there."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, Node

from backpack.graph import LEAF, VIEWS, Edge, Graph, count_outputs, kind, shape_of
from backpack.samples.coded_pass import coded
from backpack.samples.layout_rules import Unknown, input_layouts
from backpack.samples.layouts import AnyLayout, Scattered, found_layout, same


@dataclass(eq=False)
class Owners:
    """What is known of the edges below those where the samples begin.

    ``owned``: the edges whose cotangent has no entry that comes from several samples, each with its layout; ``mixed``:
    all other edges that samples reach, and all edges below these (number -1: the node as a whole); ``sends``: for each
    node whose outputs are owned, where the samples lie in what it sends along each edge (``None``: an entry comes from
    several); ``above``: edges that are reached from the roots without coming to samples first; ``joined``: those of
    them at which samples begin, with their layout, that are also mixed below others; ``coded``: nodes that took a coded
    pass; ``within``: of a node's inputs, the layouts of those entries whose second derivatives keep samples apart.
    """

    owned: dict[Edge, AnyLayout] = field(default_factory=dict)
    mixed: set[Edge] = field(default_factory=set)
    sends: dict[Node, list[AnyLayout | None]] = field(default_factory=dict)
    above: dict[Edge, None] = field(default_factory=dict)
    joined: dict[Edge, AnyLayout] = field(default_factory=dict)
    coded: list[Node] = field(default_factory=list)
    within: dict[tuple[Node, GradientEdge], AnyLayout] = field(default_factory=dict)
    is_thorough: bool = False

    def first_owned(self, node: Node) -> tuple[int, AnyLayout]:
        """The first output of a node's function that belongs to samples, and where they lie in it."""
        found = ((number, self.owned.get((node, number))) for number in range(count_outputs(node)))
        return next((number, layout) for number, layout in found if layout is not None)


class _Disputed(Exception):
    """Two nodes send entries of different samples to the same place, where one of them may send zeros."""


MASKING = frozenset(("MaskedFill", "Where", "Softmax", "SafeSoftmax"))
"""Kinds of nodes that send zeros where positions are masked, which the table counts to the samples beside them."""

ATTENTION = "ScaledDotProduct"
"""Prefix of the kinds of attention, which may have a mask: keys that no query sees belong to no sample."""

HANDED_ON = frozenset(("_DDPSink", "RegisterPostBackwardFunction"))
"""Kinds of nodes that return each cotangent as it is, and whose call by itself would disturb a distributed module."""

SELECTING = frozenset(("Slice", "Select", "Split", "UnsafeSplit", "SplitWithSizes", "Unbind", "IndexSelect", "Gather"))
"""Kinds of nodes for which the table counts entries that were not selected to the samples of those beside them."""


def find_owners(
    graph: Graph,
    begin: Mapping[Edge, AnyLayout],
    generator: torch.Generator,
    known: Mapping[Edge, AnyLayout] | None = None,
    thoroughly: bool = False,
) -> Owners:
    """Go down a graph from the edges where the samples begin.

    Everything below a mixed edge counts as mixed: what comes through the mixed part would be counted twice otherwise.
    ``known``: layouts of some edges that were found with more samples; they are taken where they agree with what is
    found here. ``thoroughly``: samples that only values keep apart, such as positions behind a mask, are not mixed.
    """
    if known is None:
        try:
            return _Descent(graph, begin, generator, {}, False, thoroughly).run()
        except _Disputed:
            pass
    return _Descent(graph, begin, generator, known or {}, True, thoroughly).run()


@dataclass(eq=False)
class _Descent:
    """One way down. ``exactly``: entries that a function does not select belong to no sample."""

    graph: Graph
    begin: Mapping[Edge, AnyLayout]
    generator: torch.Generator
    known: Mapping[Edge, AnyLayout]
    exactly: bool
    thoroughly: bool

    def run(self) -> Owners:
        owners = Owners(is_thorough=self.thoroughly)
        roots: dict[Node, list[int]] = {}
        for root in self.graph.roots:
            roots.setdefault(root.node, []).append(root.output_nr)
        for node in self.graph.order:
            arriving = self._arriving(node, roots.get(node, ()), owners)
            if arriving and node.name() != LEAF:
                if None in arriving.values():
                    arriving = dict.fromkeys(arriving)
                    owners.mixed.add((node, -1))
                else:
                    owners.sends[node] = self._sent(node, arriving, owners)
            for number, layout in arriving.items():
                if layout is None:
                    owners.mixed.add((node, number))
                else:
                    owners.owned[node, number] = layout
        return owners

    def _arriving(self, node: Node, roots: Sequence[int], owners: Owners) -> dict[int, AnyLayout | None]:
        """Where the samples lie in those outputs of a node's function that they reach; ``None``: they are mixed there.

        ``roots``: the outputs at which the graph begins.
        """
        arriving: dict[int, AnyLayout | None] = {}
        outside = list(roots)
        for consumer, k, number in self.graph.incoming[node]:
            sent = owners.sends.get(consumer)
            if sent is not None:
                is_first = number not in arriving
                arriving[number] = sent[k] if is_first else self._merged(arriving[number], sent[k], (node, number))
            elif (consumer, -1) in owners.mixed:
                arriving[number] = None
            else:
                outside.append(number)
        for number, layout in list(arriving.items()) if self.begin else ():
            begun = self.begin.get((node, number))
            if begun is not None and isinstance(layout, Scattered) and layout.has_none:
                arriving[number] = _completed(layout, begun, shape_of(node, number))
        for number in dict.fromkeys(outside) if outside else ():
            edge = (node, number)
            begins = edge in self.begin
            if begins and number not in arriving:
                arriving[number] = self.begin[edge]
                continue
            owners.above[edge] = None
            if begins and arriving[number] is None:
                owners.joined[edge] = self.begin[edge]
        for number in arriving if self.known else ():
            arriving[number] = _completed(arriving[number], self.known.get((node, number)), shape_of(node, number))
        return arriving

    def _sent(self, node: Node, arriving: Mapping[int, Any], owners: Owners) -> list[AnyLayout | None]:
        """Where the samples lie in what a node sends along its edges."""
        number, layout = next(iter(arriving.items()))
        edges = self.graph.edges[node]
        if kind(node) in HANDED_ON:
            return [arriving.get(k) for k in range(len(edges))]
        if kind(node) == "CheckpointFunction":
            raise RuntimeError(
                "A part of the model is checkpointed with use_reentrant=True, which hides its graph until the backward "
                "pass has come to it. Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        try:
            if len(arriving) > 1 and not all(same(layout, other) for other in arriving.values()):
                raise Unknown
            if (self.exactly and kind(node) in SELECTING) or (self.thoroughly and kind(node) in MASKING):
                raise Unknown
            sent = input_layouts(node, edges, layout, number)
            if self.thoroughly and any(
                own is None and other is not None and not is_single_parameter(other, self.graph, {"ToCopy", *VIEWS})
                for own, (other, _) in zip(sent, edges, strict=True)
            ):
                raise Unknown
            return sent
        except Unknown:
            owners.coded.append(node)
            count = count_outputs(node)
            exactly = self.exactly or kind(node) in MASKING or kind(node).startswith(ATTENTION)
            exactly = exactly or any(isinstance(own, Scattered) and own.has_none for own in arriving.values())
            return coded(node, [arriving.get(k) for k in range(count)], self.generator, exactly)

    def _merged(self, one: AnyLayout | None, other: AnyLayout | None, edge: Edge) -> AnyLayout | None:
        """The layout of a sum of two cotangents at an edge; ``None``: some entry belongs to several samples.

        Raises:
            _Disputed: An exact look may find that no entry does.
        """
        if one is None or other is None or one.n != other.n:
            return None
        if same(one, other):
            return one
        shape = shape_of(*edge)
        first, second = one.scattered(shape).owner, other.scattered(shape).owner
        if bool(((first == second) | (first < 0) | (second < 0)).all()):
            return found_layout(one.n, torch.maximum(first, second), exactly=True)
        if not self.exactly:
            raise _Disputed
        return None


def is_single_parameter(node: Node, graph: Graph, among: Container[str] | None = None) -> bool:
    """Whether nodes, ``among`` some kinds, lead from here to one parameter, without a branch."""
    while node.name() != LEAF:
        if among is not None and kind(node) not in among:
            return False
        following = graph.inputs_of(node)
        if len(following) != 1:
            return False
        node = following[0][0]
    return True


def _completed(layout: AnyLayout | None, known: AnyLayout | None, shape: Sequence[int]) -> AnyLayout | None:
    """What is known of an edge that some of the samples reach, if it says the same of these."""
    if layout is None or known is None or layout.n != known.n:
        return layout
    one, other = layout.scattered(shape).owner, known.scattered(shape).owner
    return known if bool(((one == other) | (one < 0)).all()) else layout
