"""The coded pass: which samples the cotangents of a function's inputs come from, found out exactly, for one node.

A random cotangent is sent through the node, and once more with the entries of each sample multiplied by a power of two.
That commutes with rounding: an entry of the result that comes from one sample alone is multiplied by this sample's code
bit for bit, in every precision, and one that comes from several is not. The digits of a sample's number, the samples in
a random order, are spread over a few such passes: 2 for 256 samples, 3 for 4,096. There is no tolerance. What is not
finite, or multiplied by none of the codes, counts as mixed.

The cotangent is random because the loss's own may be zero or cancel. Codes that are not powers of two, or one code for
each sample, can be hit by contributions of two samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack.graph import call
from backpack.samples.layouts import AnyLayout, found_layout

BASE = 16
"""Codes are ``2**-8`` to ``2**7``."""

MIXED = -2


def coded(
    node: Node, layouts: Sequence[AnyLayout | None], generator: torch.Generator, exactly: bool = False
) -> list[AnyLayout | None]:
    """Where the samples lie in each input of a node's function; ``None``: some entry comes from several.

    ``layouts``: of its outputs; ``None``: not reached; ``exactly``: tell entries of none from those of a sample.
    """
    n = next(layout.n for layout in layouts if layout is not None)
    # In 8 bits of precision, one entry in 256 of what is mixed fits a code by accident: looked at three times.
    repeats = 3 if any(dtype_of(node, k).itemsize < 4 for k in range(len(layouts)) if layouts[k] is not None) else 1
    found: list[Tensor | None] = [None] * len(node.next_functions)
    for _ in range(repeats):
        for k, owner in enumerate(_owners(node, layouts, n, generator)):
            before = found[k]
            if owner is None or before is None:
                found[k] = owner
            else:
                agree = (owner == before) | (owner == -1) | (before == -1)
                found[k] = torch.where(agree, torch.maximum(owner, before), MIXED)
    return [
        None if owner is None or bool((owner == MIXED).any()) else found_layout(n, owner, exactly) for owner in found
    ]


def dtype_of(node: Node, number: int) -> torch.dtype:
    """The data type of an output of a node's function."""
    return node._input_metadata[number].dtype


def _owners(node: Node, layouts: Sequence[AnyLayout | None], n: int, generator: torch.Generator) -> list[Tensor | None]:
    """The sample that each entry of the inputs' cotangents comes from; -1: none, ``MIXED``: several."""
    order = torch.randperm(n, generator=generator)
    count = 1
    while BASE**count < n:
        count += 1
    sample = torch.full((BASE**count,), MIXED)
    sample[order] = torch.arange(n)
    seeds: list[Tensor | None] = []
    owners: list[Tensor | None] = []
    for k, layout in enumerate(layouts):
        if layout is None:
            seeds.append(None)
            owners.append(None)
            continue
        metadata = node._input_metadata[k]
        wide = metadata.dtype if metadata.dtype.is_complex else torch.float64
        owner = layout.owners(metadata.shape, torch.device("cpu"))
        drawn = torch.randn(tuple(metadata.shape), generator=generator, dtype=wide).masked_fill(owner < 0, 0)
        seeds.append(drawn.to(metadata.dtype).to(metadata.device))
        owners.append(owner)

    def coded_by(digit: Tensor) -> list[Tensor | None]:
        return [
            None if seed is None or owner is None else seed * _power(digit, owner).to(seed.device, seed.dtype)
            for seed, owner in zip(seeds, owners, strict=True)
        ]

    with torch.no_grad():
        base = call(node, seeds)
        numbers = [torch.zeros(0 if x is None else x.shape, dtype=torch.int64) for x in base]
        for power in range(count):
            results = call(node, coded_by(order_digit(order, power)))
            for k, (x, y) in enumerate(zip(base, results, strict=True)):
                if x is not None and y is not None:
                    digit = _digits(x, y)
                    numbers[k] = torch.where((numbers[k] < 0) | (digit < 0), MIXED, numbers[k] + digit * BASE**power)
    return [
        None if x is None else torch.where(_is_zero(x), -1, sample[number.clamp(min=0)].where(number >= 0, MIXED))
        for x, number in zip(base, numbers, strict=True)
    ]


def order_digit(order: Tensor, power: int) -> Tensor:
    """A digit of each sample's number."""
    return order // BASE**power % BASE


def _power(digit: Tensor, owner: Tensor) -> Tensor:
    code = torch.exp2((digit - BASE // 2).double())
    return torch.where(owner >= 0, code[owner.clamp(min=0)], 1.0)


def _is_zero(x: Tensor) -> Tensor:
    return (x == 0).cpu()


def _digits(x: Tensor, y: Tensor) -> Tensor:
    """The digit whose code ``y`` is the multiple of ``x`` by, entry by entry; ``MIXED``: none."""
    if x.is_complex():
        x, y = torch.view_as_real(x), torch.view_as_real(y)
        digits = _digits(x, y)
        one, other = digits.unbind(-1)
        zero = x == 0
        return torch.where(
            zero[..., 0].cpu(), other, torch.where(zero[..., 1].cpu(), one, torch.where(one == other, one, MIXED))
        )
    exponent = torch.log2((y / x).abs().double()).round().nan_to_num(99, 99, -99)
    exponent = exponent.clamp(-BASE // 2 - 1, BASE // 2)
    exact = (x * torch.exp2(exponent).to(x.dtype) == y) & (exponent >= -(BASE // 2)) & (exponent < BASE // 2)
    return (
        torch.where(exact & x.isfinite(), exponent.long() + BASE // 2, MIXED)
        .where(x != 0, torch.where(y == 0, 0, MIXED))
        .cpu()
    )
