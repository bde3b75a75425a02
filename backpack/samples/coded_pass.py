"""The coded pass finds out exactly which samples the cotangents of a function's inputs come from, for one node.

Random cotangents of some of the samples are sent through the node, with zeros for all others. An entry of the result
that is not zero comes from one of these samples. Each sample takes part in some of a few such passes, its code, and all
samples in equally many. So an entry of one sample alone shows its code, and an entry of several shows more passes than
a code has: 7 passes tell 35 samples apart, 10 passes 252, 14 passes 3,432.

There is no tolerance, and no precision is too low: zero is exact. What is not finite counts as mixed. The cotangents
are random because the loss's own may be zero or cancel. (Codes that multiply the cotangents, all samples in one pass,
need fewer passes, but do not see a contribution below the rounding of another sample's.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from math import comb

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.graph import call, kind
from backpack.samples.layouts import AnyLayout, found_layout
from backpack.torch_internals import pull_back

MIXED = -2

NOT_LINEAR = frozenset(("Logcumsumexp",))
"""Kinds of nodes that take logarithms of cotangents, so that zeros prove nothing."""


def coded(
    node: Node, layouts: Sequence[AnyLayout | None], generator: torch.Generator, exactly: bool = False
) -> list[AnyLayout | None]:
    """Where the samples lie in each input of a node's function; ``None``: some entry comes from several.

    ``layouts``: of its outputs; ``None``: not reached; ``exactly``: tell entries of none from those of a sample.
    """
    if kind(node) in NOT_LINEAR:
        return [None] * len(node.next_functions)
    n = next(layout.n for layout in layouts if layout is not None)
    reached = (node._input_metadata[k].dtype for k, layout in enumerate(layouts) if layout is not None)
    is_coarse = any(dtype.itemsize < 4 for dtype in reached)
    found = _owners(node, layouts, n, generator)
    # Two random numbers may cancel by accident: one entry in some hundreds in 16 bits.
    for _ in range(2 if is_coarse else any(owner is not None and bool((owner == -1).any()) for owner in found)):
        found = [_agreed(*pair) for pair in zip(found, _owners(node, layouts, n, generator), strict=True)]
    return [
        None if owner is None or bool((owner == MIXED).any()) else found_layout(n, owner, exactly) for owner in found
    ]


def _agreed(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """What two looks at the same entries say together."""
    if one is None or other is None:
        return None
    agree = (one == other) | (one == -1) | (other == -1)
    return torch.where(agree & (one != MIXED) & (other != MIXED), torch.maximum(one, other), MIXED)


def _owners(node: Node, layouts: Sequence[AnyLayout | None], n: int, generator: torch.Generator) -> list[Tensor | None]:
    """The sample that each entry of the inputs' cotangents comes from; -1: none, ``MIXED``: several."""
    seeds = [None if layout is None else _seed(node, k, layout, generator) for k, layout in enumerate(layouts)]

    def run(takes_part: Tensor) -> Sequence[Tensor | None]:
        return call(node, [None if seed is None else _only(*seed, takes_part) for seed in seeds])

    with torch.no_grad():
        return _decoded(run, n, len(node.next_functions))


def samples_of_entries(
    tensor: Tensor, edge: GradientEdge, starts: Mapping[GradientEdge, AnyLayout], n: int, generator: torch.Generator
) -> Tensor:
    """The sample that each entry of a tensor comes from; ``-1``: none, ``MIXED``: several.

    Random tangents of some of the ``n`` samples, at the edges where they start, are pushed on to the tensor at
    ``edge``: the pull-back from there is linear in what is pulled back, and its derivative by that the transposed map.
    """
    with torch.enable_grad():
        point = torch.zeros_like(tensor, requires_grad=True)
        found = pull_back([edge], list(starts), [point], create_graph=True)
    reached = [
        (grad, layout.owners(grad.shape, grad.device))
        for grad, layout in zip(found, starts.values(), strict=True)
        if grad is not None and grad.requires_grad
    ]
    if not reached:
        return torch.full(tensor.shape, -1)

    def run(takes_part: Tensor) -> Sequence[Tensor | None]:
        given = []
        for grad, owner in reached:
            drawn = torch.randn(grad.shape, generator=generator, dtype=torch.float64).to(grad)
            given.append(_only(drawn, owner, takes_part))
        return torch.autograd.grad([grad for grad, _ in reached], point, given, retain_graph=True)

    (owner,) = _decoded(run, n, 1)
    assert owner is not None
    return owner


def _decoded(run: Callable[[Tensor], Sequence[Tensor | None]], n: int, count: int) -> list[Tensor | None]:
    """The sample that each entry of ``count`` results comes from; -1: none, ``MIXED``: several.

    ``run`` computes the results, given which of the ``n`` samples take part in a pass.
    """
    codes, sample = codes_of(n)
    shown: dict[int, Tensor] = {}
    for number, takes_part in enumerate(codes):
        for k, result in enumerate(run(takes_part)):
            if result is not None:
                passed = (result != 0).cpu().to(torch.int64) << number
                shown[k] = shown[k] + passed if k in shown else passed
    return [sample[shown[k]] if k in shown else None for k in range(count)]


@lru_cache(64)
def codes_of(n: int) -> tuple[Tensor, Tensor]:
    """Which samples take part in each pass, ``[passes, n]``; and the sample, or none, or ``MIXED``, for each result.

    A result has bit ``l`` if the entry was not zero in pass ``l``.
    """
    length = next(length for length in range(1, 64) if comb(length, max(1, length // 2)) >= n)
    words = list(combinations(range(length), max(1, length // 2)))[:n]
    codes = torch.zeros(length, n, dtype=torch.bool)
    sample = torch.full((2**length,), MIXED)
    sample[0] = -1
    for k, word in enumerate(words):
        codes[list(word), k] = True
        sample[sum(1 << bit for bit in word)] = k
    return codes, sample


def _seed(node: Node, number: int, layout: AnyLayout, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random cotangent of one of the outputs, and to which samples its entries belong."""
    metadata = node._input_metadata[number]
    wide = metadata.dtype if metadata.dtype.is_complex else torch.float64
    drawn = torch.randn(tuple(metadata.shape), generator=generator, dtype=wide)
    return drawn.to(metadata.dtype).to(metadata.device), layout.owners(metadata.shape, metadata.device)


def _only(seed: Tensor, owner: Tensor, takes_part: Tensor) -> Tensor:
    """The cotangent of the samples that take part."""
    return seed.masked_fill(~(takes_part.to(seed.device)[owner.clamp(min=0)] & (owner >= 0)), 0)
