"""A call that starts a backward pass: where it begins, and which gradients it asks for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack.backward.preparation import is_wanted
from backpack.graph import Edge, Graph, edge_of
from backpack.graph.nodes import full_of
from backpack.torch_internals import pull_back

STARTS: dict[Any, tuple[str, str]] = {
    Tensor.backward: ("self", "gradient"),
    torch.autograd.backward: ("tensors", "grad_tensors"),
    torch.autograd.grad: ("outputs", "grad_outputs"),
}
"""The functions that start a backward pass, each with the names of its arguments for the roots and their cotangents."""

_NAMES = {function: tuple(inspect.signature(function).parameters) for function in STARTS}


class Call:
    """A call of one of these functions."""

    def __init__(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.function = function
        self.given = dict(zip(_NAMES[function], args, strict=False), **kwargs)

    @cached_property
    def roots(self) -> list[GradientEdge]:
        """The edges at which the pass begins; an empty list: the pass will fail."""
        found = _listed(self.given.get(STARTS[self.function][0]))
        are_valid = (isinstance(t, GradientEdge) or (isinstance(t, Tensor) and t.requires_grad) for t in found)
        return [edge(root) for root in found] if all(are_valid) else []

    @cached_property
    def inputs(self) -> list[Any]:
        """The tensors or edges whose gradients are asked for; an empty list: all leaves."""
        return _listed(self.given.get("inputs"))

    @property
    def creates_graph(self) -> bool:
        """Whether the gradients are to be differentiable."""
        return bool(self.given.get("create_graph", False))

    def cotangents(self, at: Sequence[Edge]) -> Sequence[Tensor | None]:
        """The cotangents that the pass will send to some edges."""
        given = _listed(self.given.get(STARTS[self.function][1])) or [None] * len(self.roots)
        seeds = [full_of(*edge_of(root), 1) if s is None else s for root, s in zip(self.roots, given, strict=True)]
        if [edge_of(root) for root in self.roots] == at:
            return seeds
        return pull_back(self.roots, [GradientEdge(*edge) for edge in at], seeds, self.creates_graph)

    @property
    def asked(self) -> list[Edge]:
        """The edges of these inputs."""
        return [edge_of(edge(value)) for value in self.inputs]

    def run(self, keep_graph: bool = False) -> Any:
        """Run the pass; ``keep_graph``: its nodes have to run again afterwards."""
        return self.function(**({**self.given, "retain_graph": True} if keep_graph else self.given))

    @property
    def is_for_parameters(self) -> bool:
        """Whether a gradient of a parameter is asked for."""
        return not self.inputs or any(isinstance(t, Tensor) and is_wanted(t) for t in self.inputs)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, (Tensor, GradientEdge)) else list(value)


def edge(root: Any) -> GradientEdge:
    """The edge of a tensor; an edge is returned as it is."""
    return root if isinstance(root, GradientEdge) else get_gradient_edge(root)


def executed_for(graph: Graph, asked: Sequence[Edge]) -> set[Node]:
    """The nodes that run in a pass with respect to these edges."""
    wanted, executed = set(asked), set[Node]()
    for node in reversed(graph.order):
        if any(edge in wanted or edge[0] in executed for edge in graph.inputs_of(node)):
            executed.add(node)
    return executed
