"""The check of positive-curvature Hessians: the second derivatives of each function of the graph, as a matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.extensions import PCHMP
from backpack.extensions.matrix_products import MODIFICATIONS
from backpack.graph import LEAF, call, count_outputs
from backpack.inspection.verification.checks import Pairs, Truth, check
from backpack.inspection.verification.linear_maps import layout_at
from backpack.inspection.verification.plain_autograd import NotCompared, PlainAutograd, gradients, units, zeros_at
from backpack.torch_internals import shape_at

LARGEST = 2**9
"""The most entries of a function's inputs, over the batch, whose second derivatives are formed."""


@dataclass(eq=False)
class SecondDerivatives:
    """Those of one function of the graph, weighed by the gradient that arrives at it, ``[d, d]``.

    Its inputs, at ``edges``, have ``d`` entries side by side; ``owners`` are the samples of these.
    """

    edges: list[GradientEdge]
    owners: Tensor
    matrix: Tensor

    def moved(self, parameter: Tensor, directions: list[Tensor]) -> Tensor:
        """The derivatives of the inputs as a parameter moves along ``k`` directions, ``[k, d]``."""
        parts = []
        for edge in self.edges:
            cotangent = zeros_at(edge).requires_grad_()
            (pulled,) = gradients([edge], [parameter], [cotangent], create_graph=True)
            parts.append(torch.stack([gradients(pulled, [cotangent], d)[0].flatten() for d in directions]))
        return torch.cat(parts, 1)


@check(PCHMP)
def _pchmp(result: Any, truth: Truth) -> Pairs:
    plain, modify, parameter = truth.plain, MODIFICATIONS[truth.extension.modify], truth.plain.parameters[truth.name]
    total = truth.curvature().sum(0)
    for second in plain.once("second derivatives", lambda: list(_all_second_derivatives(plain))):
        values, vectors = torch.linalg.eigh(second.matrix)
        moved = second.moved(parameter, units(parameter, truth.entries))
        modified = (vectors * modify(values)) @ vectors.T
        total = total + (moved * truth.weights[second.owners]) @ modified @ moved.T
    yield truth.multiplied(result), total


def _all_second_derivatives(plain: PlainAutograd) -> Iterator[SecondDerivatives]:
    owners: dict[GradientEdge, Tensor | None] = {}
    for node in dict.fromkeys(user for users in plain.users.values() for user, _, _ in users):
        places: dict[GradientEdge, list[int]] = {}
        for place, (before, number) in enumerate(node.next_functions):
            if before is not None and before.name() != LEAF:
                edge = GradientEdge(before, number)
                if edge not in owners:
                    owners[edge] = _owners(plain, edge)
                if owners[edge] is not None:
                    places.setdefault(edge, []).append(place)
        # One input may be computed from another one: it comes after it.
        edges = sorted(places, key=lambda edge: -edge.node._sequence_nr())
        matrix = _matrix(plain, node, edges, [places[edge] for edge in edges])
        if matrix is not None:
            own = [owner for edge in edges if (owner := owners[edge]) is not None]
            yield SecondDerivatives(edges, torch.cat(own), matrix)


def _owners(plain: PlainAutograd, edge: GradientEdge) -> Tensor | None:
    """The sample of each entry there; ``None`` if these are no data."""
    layout, shape = layout_at(plain, edge), shape_at(edge)
    return None if layout is None else layout.owners(shape, torch.device("cpu")).expand(shape).flatten()


def _matrix(plain: PlainAutograd, node: Node, edges: list[GradientEdge], places: list[list[int]]) -> Tensor | None:
    """The second derivatives of a function by its inputs at these edges, side by side; ``None``: there are none.

    ``places``: those at which the function takes each input.
    """
    outputs = [plain.pull_back(plain.loss_gradient, GradientEdge(node, k)) for k in range(count_outputs(node))]
    try:
        pulled = call(node, [None if grad is None else grad.detach() for grad in outputs])
    except RuntimeError as error:
        raise NotCompared(f"PyTorch has no second derivative of {node.name()} ({error})") from error
    first = [zeros_at(edge) for edge in edges]
    for k, own in enumerate(places):
        first[k] = sum((grad for place in own if (grad := pulled[place]) is not None), start=first[k])
    if not any(_reaches(grad, edges) for grad in first):
        return None
    if sum(shape_at(edge).numel() for edge in edges) > LARGEST:
        raise NotCompared(f"the inputs of {node.name()} have more than {LARGEST} entries")
    entries = [entry for grad in first for entry in grad.flatten()]
    return torch.stack([torch.cat([part.flatten() for part in _partial(entry, edges)]) for entry in entries])


def _reaches(value: Tensor, edges: list[GradientEdge]) -> bool:
    if not value.requires_grad:
        return False
    found = torch.autograd.grad(value.sum(), edges, retain_graph=True, allow_unused=True)
    return any(grad is not None for grad in found)


def _partial(entry: Tensor, edges: list[GradientEdge]) -> list[Tensor]:
    """The derivatives by the values at these edges, without what one value owes to another."""
    total = gradients(entry, edges)
    for k, edge in enumerate(edges[:-1]):
        for j, grad in enumerate(gradients([edge], edges[k + 1 :], [total[k]]), start=k + 1):
            total[j] = total[j] - grad
    return total
