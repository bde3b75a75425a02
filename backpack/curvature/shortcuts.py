"""Residuals of elementwise functions close to the parameters, without a column for each entry.

The columns of a diagonal residual are unit vectors. A parameter that is used once needs only the sum of their squares
as long as they are multiples of such, or if it is used without positions. It is pulled back as one vector: with the
squared entries of the Jacobians.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.compat import dtype_at, pull_back, shape_at
from backpack.curvature.residual_graph import ResidualGraph
from backpack.curvature.residuals.nodes import ELEMENTWISE, base_name
from backpack.curvature.residuals.residual import Blocks, Residual
from backpack.samples import Layout

_LINEAR_BY_ENTRIES = (
    "Abs Add Clamp ClampMax ClampMin Hardshrink Hardsigmoid Hardtanh LeakyRelu NativeDropout Neg Relu Softshrink Sub "
    "Threshold"
)
BY_ENTRIES = ELEMENTWISE | {f"{name}Backward" for name in _LINEAR_BY_ENTRIES.split()}
_SELECTING = "Clone MaxPool2DWithIndices MaxPool3DWithIndices ReshapeAlias Squeeze Unsqueeze UnsafeView View"
SELECTING = {f"{name}Backward" for name in _SELECTING.split()}
"""Each output is one of the inputs."""


def squares(graph: ResidualGraph, residual: Residual) -> list[tuple[GradientEdge, Tensor, bool]] | None:
    """For each edge from the residual to the first parameter the sum of the columns' squares, weighed, ``[n, ...]``.

    Last: whether the columns are more than multiples of unit vectors there; they are ``[n, d]`` then. ``None``: the
    way is not that simple.
    """
    if not isinstance(residual, Blocks) or residual.width > 1 or residual.layouts[0] != Layout(graph.n):
        return None
    edge, mixed = graph.joined.now(residual.edges[0]), False
    total = residual.values[..., 0].reshape(residual.shapes[0])
    found = [(edge, total, mixed)]
    while live := graph.live(edge.node):
        shape = shape_at(live[0])
        if len(live) > 1 or shape[:1] != total.shape[:1] or dtype_at(live[0]).is_complex:
            return None
        matrix = matrix_of(edge.node, live[0])
        if matrix is not None and not mixed:
            total, mixed = total @ matrix.square(), True
        elif base_name(edge.node) in BY_ENTRIES and shape == total.shape:
            (slope,) = pull_back([edge], live, [torch.ones_like(total)])
            total = total * slope.square()
        elif base_name(edge.node) in SELECTING and not mixed:
            (total,) = pull_back([edge], live, [total])
        else:
            return None
        edge = graph.joined.now(live[0])
        found.append((edge, total, mixed))
    return found


def matrix_of(node: Node, data: GradientEdge) -> Tensor | None:
    """The matrix ``[o, i]`` by which a node multiplies the rows of its data; ``None``: it does something else."""
    place = {"AddmmBackward": 1, "MmBackward": 0}.get(base_name(node))
    if place is None or node.next_functions[place][0] is not data.node:
        return None
    if place == 1 and node._saved_alpha != 1:  # type: ignore[attr-defined]
        return None
    return node._saved_mat2.T  # type: ignore[attr-defined]
