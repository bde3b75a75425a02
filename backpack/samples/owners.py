"""Whose row is it: for each edge of a graph where the samples lie in its cotangent, or that it is mixed."""

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
    """What is known of the edges below the rows that are the samples.

    ``owned``: by sample, with a layout, for each edge whose cotangent comes from the samples by rows; ``mixed``: edges
    of which some row comes from several samples, or that are below such an edge; ``sends``: for each node that the
    samples reach by rows, where they lie in what it sends along each of its edges (``None``: several in a row);
    ``above``: edges that something reaches which does not come from the samples' rows; ``joined``: those of them at
    which samples begin, with their layout, that are also mixed below others; ``coded``: nodes for which the table did
    not tell; ``within``: of a node's inputs, the layouts of those entries alone whose second derivatives keep samples
    apart.
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
    """Two nodes send rows of different samples to the same place, unless they send zeros there."""


MASKING = frozenset(("MaskedFill", "Where", "Softmax", "SafeSoftmax"))
"""Kinds of nodes that send zeros where positions are masked, which the table counts to the samples beside them."""

ATTENTION = "ScaledDotProduct"
"""How kinds of nodes begin that take a mask, too: no sample's are the keys that only other samples' queries do not see.
"""


def find_owners(
    graph: Graph,
    begin: Mapping[Edge, AnyLayout],
    generator: torch.Generator,
    known: Mapping[Edge, AnyLayout] | None = None,
    thoroughly: bool = False,
) -> Owners:
    """Go down a graph from the edges where the samples begin.

    Below a mixed edge everything is mixed, whatever its own rows say: what comes through the mixed part would be
    counted twice otherwise. ``known``: of some edges, from where there are more samples; it is taken where these agree.
    ``thoroughly``: do not take for mixed what only values keep apart, such as positions behind a mask.
    """
    if known is None:
        try:
            return _Descent(graph, begin, generator, {}, False, thoroughly).run()
        except _Disputed:
            pass
    return _Descent(graph, begin, generator, known or {}, True, thoroughly).run()


@dataclass(eq=False)
class _Descent:
    """One way down. ``exactly``: entries that a function does not select are told from those that it does."""

    graph: Graph
    begin: Mapping[Edge, AnyLayout]
    generator: torch.Generator
    known: Mapping[Edge, AnyLayout]
    exactly: bool
    thoroughly: bool

    def run(self) -> Owners:
        owners = Owners(is_thorough=self.thoroughly)
        mixed, above, exactly = owners.mixed, owners.above, self.exactly
        graph, begin, known = self.graph, self.begin, self.known
        roots: dict[Node, list[int]] = {}
        for root in graph.roots:
            roots.setdefault(root.node, []).append(root.output_nr)
        starts: dict[Node, list[int]] = {}
        for node, number in begin:
            starts.setdefault(node, []).append(number)
        for node in graph.order:
            arriving: dict[int, AnyLayout | None] = {}
            outside = list(roots.get(node, ()))
            for consumer, k, number in graph.incoming[node]:
                sent = owners.sends.get(consumer)
                if sent is not None:
                    arriving[number] = (
                        _merged(arriving[number], sent[k], node, number, exactly) if number in arriving else sent[k]
                    )
                elif (consumer, -1) in mixed:
                    arriving[number] = None
                else:
                    outside.append(number)
            if outside:
                above.update(dict.fromkeys((node, number) for number in outside))
                for number in starts.get(node, ()):
                    if number not in outside:
                        continue
                    if number not in arriving:
                        arriving[number] = begin[node, number]
                        del above[node, number]
                    elif arriving[number] is None:
                        owners.joined[node, number] = begin[node, number]
            if not arriving:
                continue
            for number in arriving if known else ():
                arriving[number] = _completed(arriving[number], known.get((node, number)), shape_of(node, number))
            if node.name() != LEAF:
                if None in arriving.values():
                    arriving = dict.fromkeys(arriving)
                    mixed.add((node, -1))
                else:
                    owners.sends[node] = self._sent(node, arriving, owners)
            _note(owners, node, arriving)
        return owners

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


def is_single_parameter(node: Node, graph: Graph, among: Container[str] | None = None) -> bool:
    """Whether nodes, ``among`` some kinds, lead from here to one parameter, without a branch."""
    while node.name() != LEAF:
        if among is not None and kind(node) not in among:
            return False
        following = [other for other, _ in graph.edges[node] if other is not None]
        if len(following) != 1:
            return False
        node = following[0]
    return True


def _completed(layout: AnyLayout | None, known: AnyLayout | None, shape: Sequence[int]) -> AnyLayout | None:
    """What is known of an edge that some of the samples reach, if it says the same of these."""
    if layout is None or known is None or layout.n != known.n:
        return layout
    one, other = layout.scattered(shape).owner, known.scattered(shape).owner
    return known if bool(((one == other) | (one < 0)).all()) else layout


def _note(owners: Owners, node: Node, arriving: Mapping[int, AnyLayout | None]) -> None:
    for number, layout in arriving.items():
        if layout is None:
            owners.mixed.add((node, number))
        else:
            owners.owned[node, number] = layout


HANDED_ON = frozenset(("_DDPSink", "RegisterPostBackwardFunction"))
"""Kinds of nodes that return each cotangent as it is, and whose call by itself would disturb a distributed module."""

SELECTING = frozenset(("Slice", "Select", "Split", "UnsafeSplit", "SplitWithSizes", "Unbind", "IndexSelect", "Gather"))
"""Kinds of nodes for which the table counts entries that were not selected to the samples of those beside them."""


def _merged(one: AnyLayout | None, other: AnyLayout | None, node: Node, number: int, exactly: bool) -> AnyLayout | None:
    """The layout of a sum of two cotangents; ``None``: some row belongs to several samples.

    Raises:
        _Disputed: That may be no longer so if it is looked at exactly.
    """
    if one is None or other is None or one.n != other.n:
        return None
    if same(one, other):
        return one
    shape = shape_of(node, number)
    first, second = one.scattered(shape).owner, other.scattered(shape).owner
    if bool(((first == second) | (first < 0) | (second < 0)).all()):
        return found_layout(one.n, torch.maximum(first, second), exactly=True)
    if not exactly:
        raise _Disputed
    return None
