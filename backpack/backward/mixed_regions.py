"""Pulls each sample's cotangent by itself through regions that belong to no sample.

Such a region has nodes that handle parameters alone, or lies below a node that mixes samples.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack.graph import LEAF, Graph, count_outputs, kind, saved, signed, variable_of
from backpack.memory import at_a_time
from backpack.nodes.general import call_for_each


def place_in(node: Node, leaf: Node) -> int | None:
    """Which entry along the first axis of a stacked parameter a node selects; ``None``: it does something else."""
    if kind(node) != "Select" or saved(node, "dim") != 0 or node.next_functions[0][0] is not leaf:
        return None
    size, index = variable_of(leaf).shape, saved(node, "index")
    return signed(index) % size[0] if len(size) > 2 else None


def pull_through(
    graph: Graph, places: Mapping[Node, int], entry: Node, grads: dict[int, Tensor], one_by_one: bool
) -> dict[Node, Tensor]:
    """The gradients ``[n, *p]`` of all parameters behind a node, from cotangents ``[n, ...]`` of its outputs.

    ``places``: the place of each node in the order of the graph; ``one_by_one``: one sample at a time, so that results
    are those of autograd.
    """
    first, size = next(iter(grads.values())), sum(grad[0].numel() for grad in grads.values())
    n, step = len(first), 1 if one_by_one else max(1, at_a_time("cotangents", first.device) // max(1, size))
    pieces: dict[Node, list[Tensor]] = {}
    for start in range(0, n, step):
        part = {number: grad[start : start + step] for number, grad in grads.items()}
        for node, found in _pull_part(graph, places, entry, part).items():
            pieces.setdefault(node, []).append(found)
    return {node: torch.cat(parts) if len(parts) > 1 else parts[0] for node, parts in pieces.items()}


def _pull_part(graph: Graph, places: Mapping[Node, int], entry: Node, grads: dict[int, Tensor]) -> dict[Node, Tensor]:
    arrived: dict[Node, dict[int, Tensor]] = {entry: grads}
    waiting, nodes = [places[entry]], {places[entry]: entry}
    found: dict[Node, Tensor] = {}
    while waiting:
        node = nodes[heapq.heappop(waiting)]
        own = arrived.pop(node)
        if node.name() == LEAF:
            found[node] = own[0]
            continue
        count = count_outputs(node)
        sent = call_for_each(node, [own.get(number) for number in range(count)])
        for grad, (other, number) in zip(sent, graph.edges[node], strict=True):
            if other is None or grad is None:
                continue
            if other not in arrived:
                arrived[other] = {}
                nodes[places[other]] = other
                heapq.heappush(waiting, places[other])
            known = arrived[other].get(number)
            arrived[other][number] = grad if known is None else known + grad
    return found
