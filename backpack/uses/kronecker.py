"""Kronecker factors: second moments of the inputs and of the cotangents of linear maps.

A parameter that is the matrix ``W[r c]`` of a linear map has the factors ``[F_r, F_c]`` of its rows and columns, so
that ``F_r kron F_c`` approximates its curvature in row-major order. One of them is the *output factor*, a sum over
seeds of outer products of cotangents; the other, the *input factor*, a mean over samples, does not depend on the seeds.
Those of a large parameter that is no such matrix are second moments of its individual gradients' rows and columns.

Factors of complex parameters are Hermitian: what they approximate is ``sum_v g_v g_v^H``, with ``g_v`` the columns that
are pulled back. Of a real parameter that is used as a complex one, they are those of any other large parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate as accumulated
from operator import mul

import torch
from torch import Tensor

from backpack.memory import contiguous
from backpack.uses.base import Individual, accumulate, sum_of
from backpack.uses.elementwise import Explicit
from backpack.uses.linear_map import LinearMap
from backpack.uses.second_moments import matrices_of, moment_of_outputs, second_moment

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
    """The parts of the factors that are sums over seeds: one tensor for each map.

    Raises:
        ValueError: A factor would have too many rows.
    """
    maps = _maps(grads)
    return [a.output_factor(approx) for a in maps] if maps else _second_moments(grads)


def averaged_factors(grads: Individual, curvature: Tensor, approx: str | None) -> list[Tensor]:
    """The output factors of a linear map or of its bias, given the curvature in the outputs, ``[p, c, q, p, c, q]``.

    ``c`` are channels. The values of the cotangents in ``grads`` are not used.
    """
    maps = _maps(grads)
    if curvature.shape[0] == curvature.shape[2] == 1:
        moment = contiguous(curvature[0, :, 0, 0, :, 0])
    elif maps and approx == "expand":
        moment = torch.einsum("pcqpdq->cd", curvature)
    else:
        moment = curvature.sum((0, 2, 3, 5))
    return [a.output_blocks(moment) for a in maps] or [moment]


def _maps(grads: Individual) -> Sequence[LinearMap]:
    """The linear maps of a parameter, if their factors are not too large."""
    maps = grads.maps()
    for a in maps:
        rows, columns = a.matrix
        _check_size(grads.shape, *((columns,) if a.diagonal_inputs else (rows, columns)))
    return maps


def complete(grads: Individual, outputs: list[Tensor], approx: str | None) -> list[Tensor]:
    """The factors, summed over maps, given the output factors of all seeds."""
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


def _second_moments(grads: Individual) -> list[Tensor]:
    """The second moment of all entries; of large parameters, those of rows and columns, or squares if of one axis."""
    size = grads.shape.numel()
    if len(grads.shape) < 2 and size > LARGEST_FACTOR:
        return [grads.sum_squares()]
    whole = len(grads.shape) < 2 or size <= LARGEST
    height = 1 if whole else _height(grads.shape)
    found: list[list[Tensor]] = [[], []]
    for piece in grads.chunks():
        rows = matrices_of(piece, height)
        columns = partial(rows.reshape, rows.shape[:-1].numel(), size // height)
        share = isinstance(piece, Explicit) and piece.summed and height == 1
        accumulate(found[1], moment_of_outputs(piece, size, columns) if share else second_moment(columns()))
        if not whole:
            accumulate(found[0], second_moment(rows.transpose(2, 3).reshape(-1, height)))
    return [moment for (moment,) in filter(None, found)]


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
    """The sum of factors, some of which may be diagonal."""
    if len({term.dim() for term in terms}) > 1:
        terms = [torch.diag(term) if term.dim() == 1 else term for term in terms]
    return sum_of(terms)
