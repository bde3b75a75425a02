"""The general form of a use, for every node: what it sends along an edge, of one sample's cotangent at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from backpack.graph import call
from backpack.graph.looped import must_loop
from backpack.samples import AnyLayout, Rows
from backpack.uses import Cotangents, Explicit, Individual, Use

ENTRIES = 2**22
"""Entries of the outputs' cotangents, over all samples that are sent through a node at a time."""


def call_for_each(node: Node, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``call(node, ...)`` for each entry along the cotangents' first axis, at once where PyTorch can."""
    given = [grad for grad in cotangents if grad is not None]
    places = [k for k, grad in enumerate(cotangents) if grad is not None]
    reached: list[int] = []

    def one(*grads: Tensor) -> tuple[Tensor, ...]:
        filled: list[Tensor | None] = [None] * len(cotangents)
        for place, grad in zip(places, grads, strict=True):
            filled[place] = grad
        found = call(node, filled)
        reached[:] = [k for k, grad in enumerate(found) if grad is not None]
        return tuple(grad for grad in found if grad is not None)

    results = _mapped(one, given, must_loop([node]) or isinstance(node, BackwardCFunction))
    filled: list[Tensor | None] = [None] * len(node.next_functions)
    for k, grad in zip(reached, results, strict=True):
        filled[k] = grad
    return filled


def _mapped(one: Callable[..., tuple[Tensor, ...]], given: list[Tensor], loop: bool) -> tuple[Tensor, ...]:
    if not loop and len(given[0]) > 1:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # PyTorch warns of what it loops over, more slowly than we do
                return torch.vmap(one)(*given)
        except (RuntimeError, UserWarning):  # it cannot be batched
            pass
    rows = [one(*grads) for grads in zip(*given, strict=True)]
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


@dataclass(eq=False)
class GeneralUse(Use):
    """Edge ``k`` of a node, whose outputs belong to samples as ``layouts`` says (``None``: not reached).

    It is computed as soon as the cotangents arrive: the node's saved tensors are freed after that. ``one_by_one``: each
    sample by itself, as autograd does it.
    """

    node: Node
    k: int
    layouts: Sequence[AnyLayout | None]
    one_by_one: bool = False

    def arrive(self, cotangents: Cotangents, rows: Rows, shape: torch.Size, dtype: torch.dtype) -> Individual:
        device = next(iter(cotangents.values())).device
        index = torch.arange(rows.layout.n, device=device) if rows.index is None else rows.index
        seeds = len(next(iter(cotangents.values())))
        value = torch.zeros(seeds, len(index), *shape, dtype=dtype, device=device)
        size = sum(grad[0].numel() for grad in cotangents.values())
        step = 1 if self.one_by_one else max(1, ENTRIES // max(1, size))
        pieces: list[list[Tensor]] = []
        for v in range(seeds):
            parts: list[Tensor] = []
            for start in range(0, len(index), step):
                own = index[start : start + step]
                given = [
                    None if number not in cotangents or layout is None else only(cotangents[number][v], layout, own)
                    for number, layout in enumerate(self.layouts)
                ]
                grad = call_for_each(self.node, given)[self.k]
                parts.append(value[v, start : start + step] if grad is None else grad.to(dtype))
            pieces.append(parts)
        if seeds:
            value = torch.stack([torch.cat(parts) if len(parts) > 1 else parts[0] for parts in pieces])
        return Explicit(value)

    def bind(self, grad: Tensor, rows: Rows, shape: torch.Size) -> Individual:
        raise NotImplementedError("The general form takes the cotangents of all outputs.")


def only(grad: Tensor, layout: AnyLayout, samples: Tensor) -> Tensor:
    """A cotangent for each of some samples, in which the entries of all others are zero."""
    owner = layout.owners(grad.shape, grad.device)
    chosen = owner == samples.reshape(-1, *[1] * grad.dim())
    return torch.where(chosen, grad, torch.zeros((), dtype=grad.dtype, device=grad.device))


@dataclass(eq=False)
class PlacedUse(Use):
    """Edge ``k`` of a node that sends rows which belong to samples, as ``layout`` says, to what does not.

    That is a parameter of which each entry is used by one sample, or a region in which samples are mixed.
    """

    node: Node
    k: int
    layout: AnyLayout
    count: int

    def arrive(self, cotangents: Cotangents, rows: Rows, shape: torch.Size, dtype: torch.dtype) -> Individual:
        seeds = len(next(iter(cotangents.values())))
        found: list[Tensor] = []
        for v in range(seeds):
            given: list[Any] = [cotangents[k][v] if k in cotangents else None for k in range(self.count)]
            sent = call(self.node, given)[self.k]
            device = next(iter(cotangents.values())).device
            sent = torch.zeros(shape, dtype=dtype, device=device) if sent is None else sent.to(dtype)
            index = torch.arange(self.layout.n, device=sent.device) if rows.index is None else rows.index
            found.append(only(sent, self.layout, index))
        return Explicit(torch.stack(found))

    def bind(self, grad: Tensor, rows: Rows, shape: torch.Size) -> Individual:
        raise NotImplementedError("What a node sends is computed from the cotangents of all its outputs.")
