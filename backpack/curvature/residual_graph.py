"""The recorded graph between a loss's input and the uses of parameters: its nodes with second derivatives."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Size, Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.backward.collector import Prepared
from backpack.backward.plan import Plan
from backpack.compat import dtype_at, shape_at
from backpack.curvature.joined import Joined
from backpack.curvature.residuals import LocalHessian, Pairs, Residual, is_bilinear, is_flat, residual_of
from backpack.graph import is_complex
from backpack.samples import Layout


@dataclass(eq=False)
class ResidualGraph:
    """Nodes that lead from a loss's input, where a graph starts, to the uses of a plan."""

    joined: Joined
    prepared: Prepared
    plan: Plan

    def __post_init__(self) -> None:
        self.edge, self.n = self.joined.start, self.plan.n
        graph, owned = self.prepared.graph, self.prepared.owners.owned
        self._leading: set[Node] = set(self.plan.uses)
        for node in reversed(graph.order):
            if any(other in self._leading and (other, number) in owned for other, number in graph.edges[node]):
                self._leading.add(node)

    def live(self, node: Node) -> list[GradientEdge]:
        """The inputs of a node that hold samples and lead to a use; one that is given twice, twice."""
        owned = self.prepared.owners.owned
        following = zip(node.next_functions, self.prepared.graph.edges[node], strict=True)
        return [
            GradientEdge(node, number)
            for (node, number), now in following
            if node is not None and now[0] in self._leading and now in owned
        ]

    def residuals(self, grad: Tensor) -> Iterator[Residual]:
        """Of all nodes, given the gradient of the loss with respect to its input.

        Raises:
            RuntimeError: PyTorch has no second derivative of a node.
        """
        owners, graph = self.prepared.owners, self.prepared.graph
        curved = [
            node
            for node in graph.order
            if node in owners.sends and (live := self.live(node)) and not is_flat(node, live)
        ]
        for node in filter(is_complex, curved):
            raise RuntimeError(
                f"{node.name()} is a function of complex numbers that is not linear: its second derivatives are no "
                f"symmetric matrix of the samples' entries. Compute it of real and imaginary parts, or take the "
                f"Hessian or the GGN."
            )
        numbers = {node: sorted({number for _, _, number in graph.incoming[node]}) for node in curved}
        if self.edge.node in numbers:
            numbers[self.edge.node] = sorted({self.edge.output_nr, *numbers[self.edge.node]})
        arrivals = [GradientEdge(node, number) for node in curved for number in numbers[node]]
        if not arrivals:
            return
        grads = self.joined.grad([self.edge], arrivals, [grad])
        arrived: dict[Node, dict[int, Tensor]] = {}
        for edge, found in zip(arrivals, grads, strict=True):
            if found is not None:
                arrived.setdefault(edge.node, {})[edge.output_nr] = found
        for node, own in arrived.items():
            inputs = list(dict.fromkeys(self.live(node)))
            local = LocalHessian(node, inputs, own)
            if local.is_zero(shapes := [shape_at(edge) for edge in inputs]):
                continue
            places = [owners.owned[edge.node, edge.output_nr] for edge in map(self.joined.now, inputs)]
            like = next(iter(own.values()))
            known = [place for place in places if isinstance(place, Layout)]
            if len(known) == len(places):
                residual = residual_of(local, shapes, known, like, is_bilinear(node))
            elif any(bool(part.any()) for part in own.values()):
                residual = self._by_entries(local, shapes, like)
            else:
                residual = None  # it is linear in what arrives
            if residual is not None:
                yield residual

    def _by_entries(self, local: LocalHessian, shapes: Sequence[Size], like: Tensor) -> Residual:
        """Where the entries of a sample do not lie along one axis: a column for every entry."""
        warnings.warn(
            f"{local.node.name()} has inputs of shape {' and '.join(str(list(shape)) for shape in shapes)}, in which "
            f"the {self.n} samples do not lie along one axis: its part of the Hessian's diagonal is taken entry "
            f"by entry, which costs {2 * sum(shape.numel() for shape in shapes)} backward passes. Let the model have "
            f"the samples along the first axis.",
            stacklevel=2,
        )
        return Pairs(
            local, shapes, [Layout(1, inner=shape[0]) if shape else Layout(1) for shape in shapes], like, False
        )


def below_complex(prepared: Prepared) -> set[Node]:
    """Nodes below one that is not linear, of complex numbers: their second derivatives are of two real parts each."""
    owners, graph = prepared.owners, prepared.graph
    found: set[Node] = set()
    for node in graph.order:
        for consumer, _, _ in graph.incoming[node]:
            if consumer in found or (consumer in owners.sends and _is_curved_and_complex(consumer)):
                found.add(node)
                break
    return found


def _is_curved_and_complex(node: Node) -> bool:
    following = [GradientEdge(other, number) for other, number in node.next_functions if other is not None]
    return is_complex(node) and not is_flat(node, following)


def is_linear(node: Node, k: int) -> bool:
    """Whether a node's output is linear in its input ``k`` alone."""
    following, number = node.next_functions[k]
    assert following is not None
    edge = GradientEdge(following, number)
    if is_flat(node, [edge]) or node.name().startswith(LINEAR_IN_PARAMETERS):
        return True
    zeros = {
        number: torch.zeros(data.shape, dtype=data.dtype, device=data.device)
        for number, data in enumerate(node._input_metadata)
    }
    try:
        return LocalHessian(node, [edge], zeros).is_zero([shape_at(edge)])
    except RuntimeError:
        return False


LINEAR_IN_PARAMETERS = (
    *("NativeLayerNorm", "NativeGroupNorm", "NativeBatchNorm", "CudnnBatchNorm", "Trilinear", "Embedding"),
    *("FusedRmsNorm", "AccumulateGrad"),
)
"""How the names of nodes begin that are linear in their parameters, although not in their data."""

LOW = (torch.bfloat16, torch.float16)


def is_lowered(node: Node) -> bool:
    """Whether a node brings a tensor to 16 bits, as ``torch.autocast`` does."""
    if node.name() != "ToCopyBackward0" or dtype_at(GradientEdge(node, 0)) not in LOW:
        return False
    following = [GradientEdge(other, number) for other, number in node.next_functions if other is not None]
    return any(dtype_at(edge) not in LOW for edge in following)


def has_autocast(nodes: Iterable[Node]) -> bool:
    """Whether a part of a graph was recorded under autocast: derivatives of second order would mix its data types."""
    return any(map(is_lowered, nodes))
