"""What is true of positive-curvature Hessians: second derivatives of each function of the graph, as a matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.extensions import PCHMP
from backpack.extensions.matrix_products import MODIFICATIONS
from backpack.inspection.verification.linear_maps import kind, layout_at
from backpack.inspection.verification.plain import NoTruth, Plain, units
from backpack.inspection.verification.truths import Pairs, Truth, check, multiplied
from backpack.torch_internals import dtype_at, shape_at

LARGEST = 2**9
"""Entries of all inputs of a function, over the batch, up to which their second derivatives are formed."""


@dataclass(eq=False)
class Bend:
    """A function of data with second derivatives: weighed by the gradient that arrives, ``[d, d]``.

    ``edges``: its inputs; ``owners``: of their ``d`` entries, side by side, the samples.
    """

    edges: list[GradientEdge]
    owners: Tensor
    second: Tensor

    def moved(self, parameter: Tensor, directions: list[Tensor]) -> Tensor:
        """The inputs' derivatives as a parameter moves along these, ``[k, d]``."""
        parts = []
        for edge in self.edges:
            dummy = torch.zeros(shape_at(edge), dtype=dtype_at(edge), requires_grad=True)
            (pulled,) = torch.autograd.grad(
                [edge], [parameter], [dummy], retain_graph=True, allow_unused=True, create_graph=True
            )
            part = torch.zeros(len(directions), dummy.numel(), dtype=dummy.dtype)
            for row, direction in zip(part, directions, strict=True):
                if pulled is not None and pulled.requires_grad:
                    (found,) = torch.autograd.grad(pulled, dummy, direction, retain_graph=True, allow_unused=True)
                    row += 0 if found is None else found.flatten()
            parts.append(part)
        return torch.cat(parts, 1)


@check(PCHMP)
def _pchmp(result: Any, truth: Truth) -> Pairs:
    plain, modify = truth.plain, MODIFICATIONS[truth.extension.modify]
    if plain.bends is None:
        plain.bends = list(_bends(plain))
    total = truth.blocks().sum(0)
    for bend in plain.bends:
        values, vectors = torch.linalg.eigh(bend.second)
        parameter = plain.parameters[truth.name]
        moved = bend.moved(parameter, units(parameter, truth.entries))
        changed = (vectors * modify(values)) @ vectors.T
        total = total + (moved * truth.weights[bend.owners]) @ changed @ moved.T
    yield multiplied(result, truth), total


def _bends(plain: Plain) -> Iterator[Bend]:
    owners: dict[GradientEdge, Tensor | None] = {}
    for node in dict.fromkeys(user for users in plain.users.values() for user, _, _ in users):
        places: dict[GradientEdge, list[int]] = {}
        for place, (before, number) in enumerate(node.next_functions):
            if before is not None and kind(before) != "torch::autograd::AccumulateGrad":
                edge = GradientEdge(before, number)
                if edge not in owners:
                    owners[edge] = _owners(plain, edge)
                if owners[edge] is not None:
                    places.setdefault(edge, []).append(place)
        # What one input is computed from may be another one: it comes after it.
        edges = sorted(places, key=lambda edge: -edge.node._sequence_nr())
        second = _second(plain, node, edges, [places[edge] for edge in edges])
        if second is not None:
            yield Bend(edges, torch.cat([own for edge in edges if (own := owners[edge]) is not None]), second)


def _owners(plain: Plain, edge: GradientEdge) -> Tensor | None:
    """Of each entry there the sample; ``None``: these are no data."""
    layout, shape = layout_at(plain, edge), shape_at(edge)
    return None if layout is None else layout.owners(shape, torch.device("cpu")).expand(shape).flatten()


def _second(plain: Plain, node: Node, edges: list[GradientEdge], places: list[list[int]]) -> Tensor | None:
    """Of a function's inputs at these edges, side by side; ``None``: there are none."""
    outputs = [GradientEdge(node, number) for number in range(len(node._input_metadata))]
    arriving = [plain.pulled(plain.slope, output) for output in outputs]
    try:
        found = node(*(None if grad is None else grad.detach() for grad in arriving))  # type: ignore[operator]
    except RuntimeError as error:
        raise NoTruth(f"PyTorch has no second derivative of {node.name()} ({error})") from error
    pulled = found if isinstance(found, (tuple, list)) else (found,)
    first = [torch.zeros(shape_at(edge), dtype=dtype_at(edge)) for edge in edges]
    for k, own in enumerate(places):
        first[k] = sum((grad for place in own if (grad := pulled[place]) is not None), start=first[k])
    if not any(_reaches(grad, edges) for grad in first):
        return None
    if sum(shape_at(edge).numel() for edge in edges) > LARGEST:
        raise NoTruth(f"the inputs of {node.name()} have more than {LARGEST} entries")
    rows = []
    for grad in first:
        rows += [torch.cat([part.flatten() for part in _local(entry, edges)]) for entry in grad.flatten()]
    return torch.stack(rows)


def _reaches(value: Tensor, edges: list[GradientEdge]) -> bool:
    if not value.requires_grad:
        return False
    found = torch.autograd.grad(value.sum(), edges, retain_graph=True, allow_unused=True)
    return any(grad is not None for grad in found)


def _local(entry: Tensor, edges: list[GradientEdge]) -> list[Tensor]:
    """The derivatives of a function of the values at these edges, without what one owes to another."""
    like = [torch.zeros(shape_at(edge), dtype=dtype_at(edge)) for edge in edges]
    if not entry.requires_grad:
        return like
    found = torch.autograd.grad(entry, edges, retain_graph=True, allow_unused=True)
    total = [zero if grad is None else grad for zero, grad in zip(like, found, strict=True)]
    for k, edge in enumerate(edges[:-1]):
        later = torch.autograd.grad([edge], edges[k + 1 :], [total[k]], retain_graph=True, allow_unused=True)
        for j, grad in enumerate(later, start=k + 1):
            total[j] = total[j] if grad is None else total[j] - grad
    return total
