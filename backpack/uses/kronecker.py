"""Kronecker factors: second moments of the inputs and of the cotangents of linear maps.

A parameter that is the matrix ``W[r c]`` of a linear map has the factors ``[F_r, F_c]`` of its rows and columns, so
that ``F_r kron F_c`` approximates its curvature in row-major order. One of them is the *output factor*, a sum over
seeds of outer products of cotangents; the other, the *input factor*, a mean over samples, does not depend on the seeds.
Those of a large parameter that is no such matrix are second moments of its individual gradients' rows and columns.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate as accumulated
from operator import mul

import torch
from torch import Tensor

from backpack.uses.base import Individual, accumulate
from backpack.uses.elementwise import Explicit
from backpack.uses.joint import join
from backpack.uses.linear_map import diagonal_blocks, moment_of_outputs, second_moment

APPROXIMATIONS = (None, "expand", "reduce")
"""How positions within a sample are treated: input factor; output factor.

``None``: sum of outer products over positions; outer product of the sum. ``"expand"``: mean of outer products; sum of
outer products. ``"reduce"``: outer product of the mean; outer product of the sum.
"""

LARGEST = 2**12
"""Entries of a parameter of several axes up to which one factor of all of them is formed."""

LARGEST_FACTOR = 2**15
"""Rows that a factor may have: of more, it would take more than 4 GiB in ``float32``."""


def output_factors(grads: Individual, approx: str | None) -> list[Tensor]:
    """What of the factors depends on the seeds, and is additive over them: one tensor a map.

    Raises:
        ValueError: A factor would have too many rows.
    """
    maps = grads.maps()
    for a in maps:
        rows, columns = a.matrix
        _check_size(grads.shape, *((columns,) if a.diagonal_inputs else (rows, columns)))
    return [a.output_factor(approx) for a in maps] if maps else _second_moments(grads)


def complete(grads: Individual, outputs: list[Tensor], approx: str | None) -> list[Tensor]:
    """The factors, given the output factors of all seeds; summed over maps."""
    return assemble(separate(grads, outputs, approx))


def separate(grads: Individual, outputs: list[Tensor], approx: str | None) -> list[Tensor]:
    """The output factor and the input factor that make up the first factor, then those of the second; some are empty.

    Without a map, the only factor, or the second moments of rows and of columns in place of the output factors. Input
    factors of maps that use some of the rows each count in proportion to their rows.
    """
    maps = grads.maps()
    if not maps:
        none = outputs[0].new_zeros(0)
        return outputs if len(outputs) == 1 else [outputs[0], none, outputs[1], none]
    used = len(set().union(*(a.rows for a in maps))) if len(maps) > 1 else len(maps[0].rows)
    terms: list[list[Tensor]] = [[], [], [], []]
    for a, output in zip(maps, outputs, strict=True):
        terms[2 if a.inputs_first else 0].append(output)
        terms[1 if a.inputs_first else 3].append(a.input_factor(approx, len(a.rows) / used))
    return [_sum(found) if found else outputs[0].new_zeros(0) for found in terms]


def assemble(separated: list[Tensor]) -> list[Tensor]:
    """The factors, from what ``separate`` returned."""
    if len(separated) == 1:
        return separated
    rows, rows_input, columns, columns_input = separated
    if not rows_input.numel() and not columns_input.numel():
        trace = columns.trace()
        return [rows, columns / torch.where(trace == 0, 1, trace)]
    pairs = (rows, rows_input), (columns, columns_input)
    return [_sum([factor for factor in pair if factor.numel()]) for pair in pairs]


def eigenbases(factors: list[Tensor]) -> list[Tensor]:
    """Of each factor, of each of its diagonal blocks by itself; of a diagonal one: of one axis."""
    return [_basis(factor) for factor in factors]


def _basis(factor: Tensor) -> Tensor:
    if factor.dim() == 1:
        return torch.ones_like(factor)
    blocks = _blocks(factor)
    bases = torch.linalg.eigh(diagonal_blocks(factor, blocks).double()).eigenvectors.to(factor.dtype)
    return bases if blocks == 1 else torch.block_diag(*bases)


def _blocks(factor: Tensor) -> int:
    """Into how many diagonal blocks of one size a matrix can be divided, all else being zero."""
    size, filled = len(factor), factor.count_nonzero()
    numbers = (number for number in range(size, 0, -1) if size % number == 0)
    return next(number for number in numbers if diagonal_blocks(factor, number).count_nonzero() == filled)


def second_moments(grads: Individual, bases: list[Tensor]) -> Tensor:
    """Sums of squares of the individual gradients in a basis, with one axis for each of its factors."""
    maps = grads.maps()
    if maps:
        return join([a.rotated(*bases) for a in maps]).sum_squares()
    if len(bases) == 1 and bases[0].dim() == 1:
        return grads.sum_squares()
    terms: list[Tensor] = []
    for piece in grads.chunks():
        turned = piece.dense().flatten(2) @ bases[0] if len(bases) == 1 else _rows(piece, len(bases[0])) @ bases[1]
        turned = turned if len(bases) == 1 else bases[0].T @ turned
        accumulate(terms, turned.square().sum((0, 1)))
    return terms[0]


def _second_moments(grads: Individual) -> list[Tensor]:
    """Of all entries together; of a larger parameter's rows, and of its columns, or of entries, if it has one axis."""
    size = grads.shape.numel()
    if len(grads.shape) < 2 and size > LARGEST_FACTOR:
        return [grads.sum_squares()]
    whole = len(grads.shape) < 2 or size <= LARGEST
    height = 1 if whole else _height(grads.shape)
    found: list[list[Tensor]] = [[], []]
    for piece in grads.chunks():
        rows = _rows(piece, height)
        columns = partial(rows.reshape, -1, size // height)
        share = isinstance(piece, Explicit) and piece.summed and height == 1
        accumulate(found[1], moment_of_outputs(piece, size, columns) if share else second_moment(columns()))
        if not whole:
            accumulate(found[0], second_moment(rows.transpose(2, 3).reshape(-1, height)))
    return [moment for (moment,) in filter(None, found)]


def _rows(grads: Individual, height: int) -> Tensor:
    """Individual gradients as matrices of so many rows, ``[v, n, r, c]``."""
    return grads.dense().reshape(*grads.size, height, -1)


def _height(shape: torch.Size) -> int:
    """The number of rows, the product of the first sizes, with which the factors are smallest."""
    size = shape.numel()
    height = min(accumulated(shape[:-1], mul), key=lambda rows: rows**2 + (size // rows) ** 2)
    _check_size(shape, height, size // height)
    return height


def _check_size(shape: torch.Size, *sizes: int) -> None:
    if max(sizes) > LARGEST_FACTOR:
        raise ValueError(
            f"A parameter of shape {list(shape)} would have a Kronecker factor of {max(sizes)} rows, that is "
            f"{max(sizes) ** 2 / 2**28:.3g} GiB in float32; at most {LARGEST_FACTOR} rows are formed. Freeze the "
            f"parameter with requires_grad_(False) for this backward pass, or take an extension that is diagonal in it."
        )


def _sum(terms: list[Tensor]) -> Tensor:
    """Of factors, some of them diagonal."""
    if len({term.dim() for term in terms}) > 1:
        terms = [torch.diag(term) if term.dim() == 1 else term for term in terms]
    return sum(terms[1:], start=terms[0])
