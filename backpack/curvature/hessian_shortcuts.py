"""Pulls back residuals of elementwise functions close to the parameters without a column for each entry.

The columns of a diagonal residual are unit vectors. As long as they stay multiples of unit vectors, or if a parameter
is used without positions, the parameter needs only the sum of their squares. That sum is pulled back as one vector,
with the squared entries of the Jacobians.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.curvature.residual_graph import ResidualGraph
from backpack.curvature.residuals.nodes import ELEMENTWISE
from backpack.curvature.residuals.residual import Blocks, Residual
from backpack.graph import kind
from backpack.samples import Layout
from backpack.torch_internals import dtype_at, pull_back, shape_at

_LINEAR = """
Abs Add Clamp ClampMax ClampMin Hardshrink Hardsigmoid Hardtanh LeakyRelu NativeDropout Neg Relu Softshrink Sub
Threshold
"""
BY_ENTRIES = ELEMENTWISE.union(_LINEAR.split())
"""Kinds of nodes that compute each entry of the output from the entry of the input at its place."""

_SELECTING = "Clone MaxPool2DWithIndices MaxPool3DWithIndices ReshapeAlias Squeeze Unsqueeze UnsafeView View"
SELECTING = frozenset(_SELECTING.split())
"""Kinds of nodes of which each output is one of the inputs."""


@dataclass(frozen=True)
class Step:
    """A step from a node's output to its only live input: a product with a ``matrix``, a choice, or entry by entry."""

    above: GradientEdge
    below: GradientEdge
    matrix: bool
    selecting: bool


@dataclass(frozen=True)
class SimpleWay:
    """The edges from a curved node to the first parameter, and the steps between.

    With each edge: whether columns that begin as unit vectors are more than multiples of such there.
    """

    edges: list[tuple[GradientEdge, bool]]
    steps: list[Step]


def simple_way(graph: ResidualGraph, node: Node) -> SimpleWay | None:
    """The way from the input of a curved node to the first parameter; ``None``: the way is not that simple."""
    inputs = graph.inputs(node)
    if inputs.layouts != [Layout(graph.n)] or inputs.block_axes != ():
        return None
    edge = graph.spliced.now(inputs.edges[0])
    shape, mixed, steps, passed = inputs.shapes[0], False, list[Step](), [(edge, False)]
    while live := graph.live(edge.node):
        below = shape_at(live[0])
        if len(live) > 1 or below[:1] != shape[:1] or dtype_at(live[0]).is_complex:
            return None
        matrix = _is_matrix(edge.node, live[0])
        selecting = kind(edge.node) in SELECTING
        if not (kind(edge.node) in BY_ENTRIES and below == shape) and (mixed or not (matrix or selecting)):
            return None
        shape, mixed = below, mixed or matrix
        steps.append(Step(edge, live[0], matrix, selecting))
        edge = graph.spliced.now(live[0])
        passed.append((edge, mixed))
    return SimpleWay(passed, steps)


def summed_squares(residual: Residual, simple: SimpleWay) -> list[Tensor]:
    """The weighted sum of the columns' squares at each edge of the way from a residual, ``[n, ...]``."""
    assert isinstance(residual, Blocks)
    total = residual.values[..., 0].reshape(residual.inputs.shapes[0])
    found = [total]
    for step in simple.steps:
        if step.matrix:
            total = total @ step.above.node._saved_mat2.T.square()  # type: ignore[attr-defined]
        elif step.selecting:
            (total,) = pull_back([step.above], [step.below], [total])
        else:
            (slope,) = pull_back([step.above], [step.below], [torch.ones_like(total)])
            total = total * slope.square()
        found.append(total)
    return found


def _is_matrix(node: Node, data: GradientEdge) -> bool:
    """Whether a node multiplies the rows of its data by a matrix."""
    place = {"Addmm": 1, "Mm": 0}.get(kind(node))
    if place is None or node.next_functions[place][0] is not data.node:
        return False
    return place == 0 or node._saved_alpha == 1  # type: ignore[attr-defined]
