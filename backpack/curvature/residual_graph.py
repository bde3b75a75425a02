"""Finds the nodes with second derivatives in the graph between the inputs of losses and the uses of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.backward.collector import Prepared
from backpack.curvature.residuals.inputs import NodeInputs
from backpack.curvature.residuals.local import LocalHessian
from backpack.curvature.residuals.nodes import is_bilinear, is_flat, positions_of
from backpack.curvature.residuals.residual import Residual, residual_of
from backpack.curvature.spliced_graph import SplicedGraph, arrivals_at
from backpack.graph import is_complex


@dataclass(eq=False)
class ResidualGraph:
    """Nodes that lead from the inputs of losses, where a graph starts, to the uses of parameters in a plan."""

    spliced: SplicedGraph
    prepared: Prepared

    def __post_init__(self) -> None:
        self.n = self.prepared.n
        graph, owned = self.prepared.graph, self.prepared.owners.owned
        self.leading: set[Node] = set(self.prepared.plan.uses)
        """Nodes from which ways lead to uses."""
        for node in reversed(graph.order):
            if any(other in self.leading and (other, number) in owned for other, number in graph.edges[node]):
                self.leading.add(node)

    def live(self, node: Node) -> list[GradientEdge]:
        """The inputs of a node that hold samples and lead to a use; one that is given twice, twice."""
        owned = self.prepared.owners.owned
        following = zip(node.next_functions, self.prepared.graph.edges[node], strict=True)
        return [
            GradientEdge(node, number)
            for (node, number), now in following
            if node is not None and now[0] in self.leading and now in owned
        ]

    @cached_property
    def curved(self) -> list[Node]:
        """The nodes whose second derivatives may contribute."""
        owners = self.prepared.owners
        return [
            node
            for node in self.prepared.graph.order
            if node in owners.sends and (live := self.live(node)) and not is_flat(node, len(live))
        ]

    def inputs(self, node: Node) -> NodeInputs:
        """The live inputs of a node, and where the samples lie in each."""
        edges = list(dict.fromkeys(self.live(node)))
        owners = self.prepared.owners
        owned = [owners.owned[edge.node, edge.output_nr] for edge in map(self.spliced.now, edges)]
        layouts = [owners.within.get((node, edge), layout) for edge, layout in zip(edges, owned, strict=True)]
        return NodeInputs(node, edges, layouts)

    def columns(self, node: Node) -> int:
        """How many columns the residual of a curved node has, told before anything is computed of it."""
        inputs = self.inputs(node)
        is_known = is_bilinear(node) or positions_of(node, len(inputs.shapes[0])) is not None
        if not is_known and LocalHessian(node, inputs.edges, zero_outputs(node)).is_zero():
            return 0
        return inputs.count_columns()

    def residuals(self, grads: Sequence[Tensor]) -> Iterator[Residual]:
        """The residuals of all nodes, given the gradients of the losses with respect to their inputs.

        Raises:
            RuntimeError: PyTorch has no second derivative of a node.
        """
        for node in filter(is_complex, self.curved):
            raise RuntimeError(
                f"{node.name()} is a function of complex numbers that is not linear: its second derivatives are no "
                f"symmetric matrix of the samples' entries. Compute it of real and imaginary parts, or take the "
                f"Hessian or the GGN."
            )
        arrivals = [edge for node in self.curved for edge in arrivals_at(node, self.prepared.graph)]
        if not arrivals:
            return
        arrived: dict[Node, dict[int, Tensor]] = {}
        for edge, found in zip(arrivals, self.spliced.grad(self.spliced.starts, arrivals, grads), strict=True):
            if found is not None:
                arrived.setdefault(edge.node, {})[edge.output_nr] = found
        for node, own in arrived.items():
            inputs = self.inputs(node)
            local = LocalHessian(node, inputs.edges, own)
            if local.is_zero():
                continue
            residual = residual_of(inputs, local, like=next(iter(own.values())))
            if residual is not None:
                yield residual


def zero_outputs(node: Node) -> dict[int, Tensor]:
    """Zero cotangents of all outputs of a node's function."""
    return {
        number: torch.zeros(data.shape, dtype=data.dtype, device=data.device)
        for number, data in enumerate(node._input_metadata)
    }
