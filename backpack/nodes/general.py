"""The general form of a use, for every node: it runs on the cotangent of one sample at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack.graph import call, kind, saved, signed
from backpack.graph.vmap_limits import is_looped
from backpack.memory import at_a_time
from backpack.samples import AnyLayout, Rows
from backpack.uses import Cotangents, Explicit, Individual, Use
from backpack.uses.complex_numbers import converted


def _weight_norm(node: Any, grads: Tensor) -> list[Tensor]:
    """The cotangents of ``v`` and ``g`` of ``g * v / |v|``."""
    v, g = saved(node, "v"), saved(node, "g")
    axes = [axis for axis in range(v.dim()) if axis != signed(saved(node, "dim"))]
    norm = torch.linalg.vector_norm(v, dim=axes, keepdim=True)
    along = (grads * v).sum([axis + 1 for axis in axes], keepdim=True) / norm
    return [(grads - along * (v / norm)) * (g / norm), along]


TOGETHER: dict[str, Callable[[Any, Tensor], list[Tensor]]] = {"WeightNormInterface": _weight_norm}
"""Kinds of nodes that PyTorch would loop over, with the pull-back of several cotangents of their first output.

It is not taken where it is differentiated: results then have the derivatives that PyTorch's have.
"""


def call_for_each(node: Node, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``call(node, ...)`` for each entry along the cotangents' first axis, at once where PyTorch can."""
    together, first = TOGETHER.get(kind(node)), cotangents[0]
    if together is not None and first is not None and len(first) > 1 and not torch.is_grad_enabled():
        found = together(node, first)
        return [None if edge[0] is None else grad for grad, edge in zip(found, node.next_functions, strict=True)]
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

    results = _mapped(one, given, is_looped(node))
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
        first = next(iter(cotangents.values()))
        index = torch.arange(rows.layout.n, device=first.device) if rows.index is None else rows.index
        seeds, size = len(first), sum(grad[0].numel() for grad in cotangents.values())
        together = 1 if self.one_by_one else max(1, seeds)
        step = 1 if self.one_by_one else max(1, at_a_time("cotangents", first.device) // max(1, together * size))
        value = torch.zeros(seeds, len(index), *shape, dtype=dtype, device=first.device)
        for v in range(0, seeds, together):
            for start in range(0, len(index), step):
                own = index[start : start + step]
                given = [
                    only(cotangents[number][v : v + together], layout, own).flatten(0, 1)
                    if number in cotangents and layout is not None
                    else None
                    for number, layout in enumerate(self.layouts)
                ]
                grad = call_for_each(self.node, given)[self.k]
                if grad is not None:
                    part = converted(grad.unflatten(0, (-1, len(own))), dtype)
                    value = _put(value, part, v, start)
        return Explicit(value)


def _put(whole: Tensor, part: Tensor, v: int, n: int) -> Tensor:
    """Put ``[w, m, ...]`` into ``[v, n, ...]``, from this seed and sample on."""
    seeds, samples = part.shape[:2]
    if not torch.is_grad_enabled():
        whole[v : v + seeds, n : n + samples] = part
        return whole
    if part.shape == whole.shape:
        return part
    rows = whole[v : v + seeds].slice_scatter(part, 1, n, n + samples)
    return whole.slice_scatter(rows, 0, v, v + seeds)


def only(grads: Tensor, layout: AnyLayout, samples: Tensor) -> Tensor:
    """For each of some samples, cotangents ``[v, ...]`` with zeros in all entries of other samples: ``[v, m, ...]``."""
    owner = layout.owners(grads.shape[1:], grads.device)
    chosen = owner == samples.reshape(-1, *[1] * (grads.dim() - 1))
    return torch.where(chosen, grads.unsqueeze(1), torch.zeros((), dtype=grads.dtype, device=grads.device))


@dataclass(eq=False)
class PlacedUse(Use):
    """Edge ``k`` of a node that sends rows which belong to samples, as ``layout`` says, to what does not.

    The edge leads to a parameter of which each entry is used by one sample, or to a region where samples are mixed.
    """

    node: Node
    k: int
    layout: AnyLayout
    count: int

    def arrive(self, cotangents: Cotangents, rows: Rows, shape: torch.Size, dtype: torch.dtype) -> Individual:
        first = next(iter(cotangents.values()))
        sent = call_for_each(self.node, [cotangents.get(k) for k in range(self.count)])[self.k]
        if sent is None:
            sent = torch.zeros(len(first), *shape, device=first.device)
        index = torch.arange(self.layout.n, device=first.device) if rows.index is None else rows.index
        return Explicit(only(converted(sent, dtype), self.layout, index))
