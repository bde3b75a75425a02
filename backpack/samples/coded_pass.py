"""The coded pass: which samples the cotangents of a function's inputs come from, found out exactly, for one node.

Random cotangents of some of the samples are sent through the node, with zeros for all others. An entry of the result
that is not zero comes from one of these samples. Each sample takes part in some of a few such passes, its code, and all
samples in equally many. So an entry of one sample alone shows its code, and an entry of several shows more passes than
a code has: 7 passes tell 35 samples apart, 10 passes 252, 14 passes 3,432.

There is no tolerance, and no precision is too low: zero is exact. What is not finite counts as mixed. The cotangents
are random because the loss's own may be zero or cancel. (Codes that multiply the cotangents, all samples in one pass,
need fewer passes, but do not see a contribution below the rounding of another sample's.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from math import comb

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.graph import call, count_outputs, kind
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
    seeds, owners = _seeds(node, layouts, generator)
    codes, sample = codes_of(n)
    found: list[Tensor | None] = [None] * len(node.next_functions)
    with torch.no_grad():
        for number, takes_part in enumerate(codes):
            given = [_only(*pair, takes_part) for pair in zip(seeds, owners, strict=True)]
            for k, grad in enumerate(call(node, given)):
                if grad is not None:
                    passed = (grad != 0).cpu().to(torch.int64) << number
                    known = found[k]
                    found[k] = passed if known is None else known + passed
    return [None if passes is None else sample[passes] for passes in found]


def samples_of_entries(
    tensor: Tensor, edge: GradientEdge, starts: Mapping[GradientEdge, AnyLayout], n: int, generator: torch.Generator
) -> Tensor:
    """The sample that each entry of a tensor comes from; ``-1``: none, ``MIXED``: several.

    Random tangents of some of the ``n`` samples, at the edges where they start, are pushed on to the tensor at
    ``edge``: the pull-back from there is linear in what is pulled back, and its derivative by that the transposed map.
    """
    codes, sample = codes_of(n)
    with torch.enable_grad():
        point = torch.zeros_like(tensor, requires_grad=True)
        found = pull_back([edge], list(starts), [point], create_graph=True)
    reached = [
        (grad, layout.owners(grad.shape, grad.device))
        for grad, layout in zip(found, starts.values(), strict=True)
        if grad is not None and grad.requires_grad
    ]
    passed = torch.zeros(tensor.shape, dtype=torch.int64)
    for number, takes_part in enumerate(codes if reached else ()):
        given = []
        for grad, owner in reached:
            drawn = torch.randn(grad.shape, generator=generator, dtype=torch.float64).to(grad)
            given.append(_only(drawn, owner, takes_part))
        (pushed,) = torch.autograd.grad([grad for grad, _ in reached], point, given, retain_graph=True)
        passed += (pushed != 0).cpu().to(torch.int64) << number
    return sample[passed]


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


def _seeds(
    node: Node, layouts: Sequence[AnyLayout | None], generator: torch.Generator
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Random cotangents of the outputs, and to which samples their entries belong."""
    seeds: list[Tensor | None] = [None] * count_outputs(node)
    owners: list[Tensor | None] = [None] * count_outputs(node)
    for k, layout in enumerate(layouts):
        if layout is not None:
            metadata = node._input_metadata[k]
            wide = metadata.dtype if metadata.dtype.is_complex else torch.float64
            drawn = torch.randn(tuple(metadata.shape), generator=generator, dtype=wide)
            seeds[k] = drawn.to(metadata.dtype).to(metadata.device)
            owners[k] = layout.owners(metadata.shape, metadata.device)
    return seeds, owners


def _only(seed: Tensor | None, owner: Tensor | None, takes_part: Tensor) -> Tensor | None:
    """The cotangent of the samples that take part."""
    if seed is None or owner is None:
        return None
    return seed.masked_fill(~(takes_part.to(seed.device)[owner.clamp(min=0)] & (owner >= 0)), 0)
