"""The recorded graph between a loss's input and the first uses of parameters: its nodes with second derivatives."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Size, Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.compat import dtype_at, shape_at
from backpack.joined import Joined
from backpack.looped import Instead, nodes
from backpack.recorder import is_of_first_half
from backpack.residuals import LocalHessian, Pairs, Residual, is_bilinear, is_flat, is_fused_node, residual_of
from backpack.samples import Layout, layouts


@dataclass(eq=False)
class Graph:
    """Nodes that lead from a loss's input, where a graph starts, to ``targets``, outputs of parameters' first uses.

    ``layout``: where the samples lie at that input.
    """

    joined: Joined
    targets: list[GradientEdge]
    layout: Layout
    nodes: dict[Node, bool] = field(default_factory=dict)
    outputs: dict[Node, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ends = {(target.node, target.output_nr) for target in self.targets}
        self.edge = self.joined.start
        self.outputs[self.edge.node] = {self.edge.output_nr}
        pending: list[tuple[Node, bool]] = [(self.edge.node, False)]
        while pending:
            node, followed = pending.pop()
            if followed:
                self.nodes[node] = any(map(self.leads, following(node)))
            elif node not in self.nodes:
                self.nodes[node] = False
                pending.append((node, True))
                for edge in map(self.joined.now, following(node)):
                    self.outputs.setdefault(edge.node, set()).add(edge.output_nr)
                    pending.append((edge.node, False))

    def leads(self, edge: GradientEdge) -> bool:
        """Whether what is seeded at an edge reaches a target."""
        edge = self.joined.now(edge)
        if (edge.node, edge.output_nr) in self._ends:
            return True
        if edge.node not in self.nodes:  # not between the loss and the parameters
            return any(map(self.leads, following(edge.node)))
        return self.nodes[edge.node]

    def live(self, node: Node) -> list[GradientEdge]:
        """The inputs of a node that lead to a target; one that is given twice, twice."""
        return [edge for edge in following(node) if self.leads(edge)]

    def residuals(self, grad: Tensor) -> Iterator[Residual]:
        """Of all nodes, given the gradient of the loss with respect to its input.

        Raises:
            RuntimeError: PyTorch has no second derivative of a node, or the samples cannot be found at its inputs.
        """
        curved = [node for node in self.nodes if (live := self.live(node)) and not is_flat(node, live)]
        arrivals = [GradientEdge(node, number) for node in curved for number in sorted(self.outputs[node])]
        if not arrivals:
            return
        grads = self.joined.grad([self.edge], arrivals, [grad])
        arrived: dict[Node, dict[int, Tensor]] = {}
        for edge, found in zip(arrivals, grads, strict=True):
            if found is not None:
                arrived.setdefault(edge.node, {})[edge.output_nr] = found
        inputs = {node: list(dict.fromkeys(self.live(node))) for node in arrived}
        found_at = self._layouts({edge for edges in inputs.values() for edge in edges}, grad)
        for node, own in arrived.items():
            local = LocalHessian(node, inputs[node], own)
            if local.is_zero(shapes := [shape_at(edge) for edge in inputs[node]]):
                continue
            places = [found_at[edge] for edge in inputs[node]]
            like = next(iter(own.values()))
            known = [place for place in places if place is not None]
            if len(known) == len(places):
                residual = residual_of(local, shapes, known, like, is_bilinear(node))
            elif any(bool(part.any()) for part in own.values()):
                residual = self._by_entries(local, shapes, like)
            else:
                residual = None  # it is linear in what arrives
            if residual is not None:
                yield residual

    def _by_entries(self, local: LocalHessian, shapes: list[Size], like: Tensor) -> Residual:
        """Where it is not known which entries belong to which sample, but each to one: a column for every entry."""
        warnings.warn(
            f"{local.node.name()} has inputs of shape {' and '.join(str(list(shape)) for shape in shapes)}, in which "
            f"the {self.layout.n} samples do not lie along one axis: its part of the Hessian's diagonal is taken entry "
            f"by entry, which costs {2 * sum(shape.numel() for shape in shapes)} backward passes. Let the model have "
            f"the samples along the first axis.",
            stacklevel=2,
        )
        return Pairs(
            local, shapes, [Layout(1, inner=shape[0]) if shape else Layout(1) for shape in shapes], like, False
        )

    def _layouts(self, edges: Iterable[GradientEdge], like: Tensor) -> dict[GradientEdge, Layout | None]:
        """Where the samples lie; where shapes leave a choice, by what the first half of the samples depends on.

        Raises:
            RuntimeError: Samples are mixed.
        """
        n = self.layout.n
        found: dict[GradientEdge, Layout | None] = {}
        unclear: dict[GradientEdge, Sequence[Layout]] = {}
        for edge in edges:
            shape = shape_at(edge)
            possible = layouts(shape, n, range(len(shape)))
            if len(possible) == 1 and (n == 1 or (possible[0].axis == 0 and possible[0].factor == 1)):
                found[edge] = possible[0]
            else:
                unclear[edge] = possible
        if not unclear:
            return found
        shape = shape_at(self.edge)
        seed = torch.arange(shape.numel(), device=like.device).cos().add(1.5).to(like.dtype).reshape(shape)
        first = self.layout.owners(shape, seed.device) < n // 2
        edges = list(unclear)
        halves = [self.joined.grad([self.edge], edges, [seed * half]) for half in (first, ~first)]
        for edge, own, others in zip(edges, *halves, strict=True):
            if own is not None and others is not None and bool((own.ne(0) & others.ne(0)).any()):
                raise RuntimeError(
                    f"The {n} samples are mixed at the output of {edge.node.name()}, of shape {list(own.shape)}, so "
                    f"that the Hessian does not fall into those of the samples. Use functions that treat samples one "
                    f"by one, for example GroupNorm or BatchNorm in evaluation mode instead of BatchNorm."
                )
            fitting = [layout for layout in unclear[edge] if own is not None and is_of_first_half(own, layout)]
            found[edge] = fitting[0] if len(fitting) == 1 and own is not None and bool(own.any()) else None
        return found


def following(node: Node) -> Iterator[GradientEdge]:
    """The edges to the inputs of a node that require a gradient."""
    for following, number in node.next_functions:
        if following is not None:
            yield GradientEdge(following, number)


LOW = (torch.bfloat16, torch.float16)


def is_lowered(node: Node) -> bool:
    """Whether a node brings a tensor to 16 bits, as ``torch.autocast`` does."""
    if node.name() != "ToCopyBackward0" or dtype_at(GradientEdge(node, 0)) not in LOW:
        return False
    return any(dtype_at(edge) not in LOW for edge in following(node))


def is_fused(edge: GradientEdge) -> bool:
    """Whether a graph has a node without second derivatives for which there is a replacement."""
    return any(map(is_fused_node, nodes(edge)))


def has_autocast(edge: GradientEdge, instead: Instead | None = None) -> bool:
    """Whether a part of a graph was recorded under autocast: derivatives of second order would mix its data types."""
    return any(map(is_lowered, nodes(edge, instead)))
