"""Residuals of elementwise functions close to the parameters, without a column for each entry.

The columns of a diagonal residual are unit vectors. Where at most one matrix lies between them and a parameter that is
used once, without positions, only the sum of their squares is needed there, and it is pulled back as one vector: with
the squared entries of the Jacobians.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.compat import shape_at
from backpack.graph import Graph
from backpack.residuals.nodes import ELEMENTWISE, base_name
from backpack.residuals.residual import Blocks, Residual

_LINEAR_BY_ENTRIES = (
    "Abs Add Clamp ClampMax ClampMin Hardshrink Hardsigmoid Hardtanh LeakyRelu NativeDropout Neg Relu Softshrink Sub "
    "Threshold"
)
BY_ENTRIES = ELEMENTWISE | {f"{name}Backward" for name in _LINEAR_BY_ENTRIES.split()}


def squares(graph: Graph, residual: Residual) -> list[tuple[GradientEdge, Tensor]] | None:
    """For each edge from the residual to the first parameter the sum of the columns' squares, weighed, ``[n, d]``.

    ``None``: it is not enough, or the way is not that simple.
    """
    if not isinstance(residual, Blocks) or residual.width > 1 or not is_flat(graph, residual.edges[0]):
        return None
    edge, total, mixed = residual.edges[0], residual.values[..., 0], False
    found = [(edge, total)]
    while live := graph.live(edge.node):
        if len(live) > 1 or not is_flat(graph, live[0]):
            return None
        matrix = matrix_of(edge.node, live[0])
        if matrix is not None and not mixed:
            total, mixed = total @ matrix.square(), True
        elif base_name(edge.node) in BY_ENTRIES and shape_at(live[0]) == shape_at(edge):
            (slope,) = torch.autograd.grad(edge, live[0], torch.ones_like(total), retain_graph=True)
            total = total * slope.square()
        else:
            return None
        edge = graph.joined.now(live[0])
        found.append((edge, total))
    return found


def is_flat(graph: Graph, edge: GradientEdge) -> bool:
    """Whether a tensor is ``[n, d]``."""
    shape = shape_at(edge)
    return len(shape) == 2 and shape[0] == graph.layout.n and shape[1] != graph.layout.n


def matrix_of(node: Node, data: GradientEdge) -> Tensor | None:
    """The matrix ``[o, i]`` by which a node multiplies the rows of its data; ``None``: it does something else."""
    place = {"AddmmBackward": 1, "MmBackward": 0}.get(base_name(node))
    if place is None or node.next_functions[place][0] is not data.node:
        return None
    if place == 1 and node._saved_alpha != 1:  # type: ignore[attr-defined]
        return None
    return node._saved_mat2.T  # type: ignore[attr-defined]
