"""Finds the samples in what is computed from outputs of modules with parameters: heads in losses, chunks of rows.

A row there belongs to the sample that all of what it sends on to the outputs of modules belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack.graph import Edge, Graph, shape_of
from backpack.samples.layout_rules import summed_edge
from backpack.samples.layouts import AnyLayout, found_layout
from backpack.samples.owners import Owners

Sweep = Callable[[dict[Edge, AnyLayout]], Owners]


def samples_of_rows(
    rows: int, below: Owners, begin: Mapping[Edge, AnyLayout], owned: Mapping[Edge, AnyLayout]
) -> Tensor | None:
    """The sample that each of some rows belongs to, ``-1``: to none; ``None``: not each belongs to one alone.

    ``below``: what is known if each row is a sample of its own; ``begin`` and ``owned``: where the samples begin, and
    where they lie.
    """
    sample = torch.full((rows + 1,), -1)
    for edge, layout in begin.items():
        if edge in below.mixed:
            return None
        if edge not in below.owned or owned.get(edge) is not layout:
            continue
        shape = shape_of(*edge)
        row = below.owned[edge].owners(shape, sample.device).expand(shape).flatten()
        own = layout.owners(shape, sample.device).expand(shape).flatten()
        own, row = own[row >= 0], row[row >= 0]
        if bool(((sample[row] >= 0) & (sample[row] != own)).any()):
            return None
        sample[row] = own
        if bool((sample[row] != own).any()):
            return None
    return sample[:rows]


def layouts_above(
    graph: Graph, owners: Owners, begin: Mapping[Edge, AnyLayout], sweep: Sweep, wanted: set[Node]
) -> dict[Edge, AnyLayout]:
    """Where the samples lie in what is computed with parameters above those edges at which samples ``begin``.

    ``wanted``: the nodes of parameters. Of nodes above each other, the first one is given.
    """
    counts = {layout.n for edge, layout in begin.items() if owners.owned.get(edge) is layout}
    edges = _heads(graph, owners, wanted)
    if len(counts) != 1 or not edges:
        return {}
    (n,) = counts
    together = _found(edges, n, owners, begin, sweep)
    if together is not None:
        return together
    found: dict[Edge, AnyLayout] = {}
    for edge in edges if len(edges) > 1 else ():
        found.update(_found([edge], n, owners, begin, sweep) or {})
    return found


def _heads(graph: Graph, owners: Owners, wanted: set[Node]) -> list[Edge]:
    """The outputs of nodes that combine parameters with data above all samples, none of them behind another.

    Of nodes that sum over rows, it is the edge that leads to these rows.
    """
    if not any(node in wanted for node, _ in owners.above):
        return []
    above = {node for node, _ in owners.above if node not in owners.sends and (node, -1) not in owners.mixed}
    data: set[Node] = set()
    learned: set[Node] = set(wanted)
    users: set[Node] = set()
    for node in reversed(graph.order):
        following = graph.inputs_of(node)
        if any(edge in owners.owned or edge[0] in data for edge in following):
            data.add(node)
            if node in above and any(other in learned and other not in data for other, _ in following):
                users.add(node)
        elif any(other in learned for other, _ in following):
            learned.add(node)
    behind = set(graph.behind([other for node in users for other, _ in graph.inputs_of(node)]))
    edges = [edge for edge in owners.above if edge[0] in users and edge[0] not in behind and shape_of(*edge)]
    summed = [graph.edges[node][k] for node in users - behind if (k := summed_edge(node)) is not None]
    return edges + [edge for edge in summed if edge[0] is not None and edge not in owners.owned and edge not in edges]


def _found(
    edges: Sequence[Edge], n: int, owners: Owners, begin: Mapping[Edge, AnyLayout], sweep: Sweep
) -> dict[Edge, AnyLayout] | None:
    """The layouts at some edges; ``None``: not all that is there belongs to samples."""
    for number in range(2):
        numbered: dict[Edge, Tensor] = {}
        count = 0
        for edge in edges:
            rows = _numbered(shape_of(*edge), number)
            numbered[edge] = rows + count
            count += rows.numel()
        each: dict[Edge, AnyLayout] = {edge: found_layout(count + 1, rows) for edge, rows in numbered.items()}
        sample = samples_of_rows(count, sweep(each), begin, owners.owned)
        if sample is not None and all(bool((sample[rows] >= 0).any()) for rows in numbered.values()):
            return {edge: found_layout(n, sample[rows], exactly=True) for edge, rows in numbered.items()}
    return None


def _numbered(shape: Sequence[int], number: int) -> Tensor:
    """Numbers of the rows of a tensor: along its first axis, or along all axes but the last."""
    axes = list(axes_of_rows(len(shape)))[number:][:1] or [[0]]
    sizes = [size if axis in axes[0] else 1 for axis, size in enumerate(shape)]
    return torch.arange(prod(sizes)).reshape(sizes)


def axes_of_rows(dims: int) -> Iterator[list[int]]:
    """The axes that may count rows: the first one, all but the last, all."""
    yield from (list(range(count)) for count in dict.fromkeys((1, dims - 1, dims)) if count)
