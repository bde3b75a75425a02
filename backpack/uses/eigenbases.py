"""The eigenvectors of Kronecker factors, and the squares of individual gradients in the bases that they form."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from backpack.uses.base import Individual, accumulate
from backpack.uses.complex_numbers import squared
from backpack.uses.elementwise import Explicit
from backpack.uses.joint import join
from backpack.uses.linear_map import LinearMap
from backpack.uses.second_moments import MOMENT, diagonal_blocks, in_basis, matrices_of

OVERSAMPLED = 8
"""Random vectors in excess of the dimension of what their images are to span."""


def eigenbases(factors: list[Tensor], grads: Individual | None = None) -> list[Tensor]:
    """The eigenvectors of each factor, as columns; of a block-diagonal factor, those of each block.

    A factor that is stored as its diagonal, with one axis, has ones: its eigenvectors are the unit vectors.
    ``grads``: those that the factors were computed from, if there are no others.
    """
    ranks = [len(factor) for factor in factors]
    maps: Sequence[LinearMap] = [] if grads is None else grads.maps()
    blocks: Sequence[int] = (1, 1)
    if maps:
        ranks = [sum(own) for own in zip(*(a.ranks for a in maps), strict=True)]
        blocks = maps[0].blocks
    elif grads is None:
        blocks = [1 if factor.dim() == 1 else _blocks(factor) for factor in factors]
    elif len(factors) == 1:
        ranks = [prod(grads.size)]
    return [_basis(factor, rank, own, grads) for factor, rank, own in zip(factors, ranks, blocks, strict=False)]


def eigenbases_by_name(factors: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """The eigenvectors of the factors of several parameters, which are taken out of the dictionary.

    Factors that equal one of the parameter before, as that of a bias equals one of its matrix, have the same.
    """
    found, before = {}, list[tuple[Tensor, Tensor]]()
    for name in list(factors):
        own = factors.pop(name)
        known = [next((basis for other, basis in before if _is_equal(other, factor)), None) for factor in own]
        found[name] = [eigenbases([f])[0] if basis is None else basis for f, basis in zip(own, known, strict=True)]
        before = list(zip(own, found[name], strict=True))
    return found


def _is_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two factors are the same, also in their data type: of a complex and a real parameter, they may differ."""
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _basis(factor: Tensor, rank: int, blocks: int, grads: Individual | None) -> Tensor:
    if factor.dim() == 1:
        return torch.ones_like(factor)
    if blocks > 1:
        return torch.block_diag(*torch.linalg.eigh(_precise(diagonal_blocks(factor, blocks))).eigenvectors.to(factor))
    moment = None if grads is None or grads.shared is None else grads.shared.get((MOMENT, len(factor)))
    if grads is None or moment is None or not torch.equal(moment, factor):
        return eigenvectors(_precise(factor), rank).to(factor)
    # A bias and its matrix have the same output factor, unless positions are summed in one of them only.
    return grads.share(("basis", len(factor)), lambda: eigenvectors(_precise(factor), rank).to(factor)).clone()


def _precise(factor: Tensor) -> Tensor:
    """The factor in a data type in which decompositions are possible.

    That of the factor itself, if it has 32 bits: its own rounding moves eigenvectors as much as a decomposition's.
    """
    return factor.float() if factor.element_size() < 4 else factor


def eigenvectors(matrix: Tensor, rank: int) -> Tensor:
    """The eigenvectors of a symmetric or Hermitian matrix of at most this rank, in the order of ``torch.linalg.eigh``.

    The images of a few more random vectors than that span the range, and all vectors of any basis of its complement
    are eigenvectors (Halko, Martinsson & Tropp, 2011, section 4.1): the decomposition is of a matrix as small as that.
    """
    size, probes = len(matrix), rank + OVERSAMPLED
    if probes * 3 > size:
        return torch.linalg.eigh(matrix).eigenvectors
    generator = torch.Generator(matrix.device).manual_seed(0)  # what users draw does not depend on it
    images = matrix @ torch.randn(size, probes, generator=generator, dtype=matrix.dtype, device=matrix.device)
    reflectors, scales = torch.geqrf(images)
    span = torch.linalg.householder_product(reflectors, scales)
    vectors = torch.linalg.eigh(span.mH @ matrix @ span).eigenvectors
    within = matrix.new_zeros(size, size)
    within[probes:, : size - probes].fill_diagonal_(1)
    within[:probes, size - probes :] = vectors
    return torch.ormqr(reflectors, scales, within)


def _blocks(factor: Tensor) -> int:
    """The largest number of diagonal blocks of one size outside of which a matrix is zero."""
    if factor[:1, -1].any():
        return 1
    size, filled = len(factor), factor.count_nonzero()
    numbers = (number for number in range(size, 0, -1) if size % number == 0)
    return next(number for number in numbers if diagonal_blocks(factor, number).count_nonzero() == filled)


def squares_in_bases(grads: Individual, bases: list[Tensor]) -> Tensor:
    """Sums of squares of the individual gradients in a basis, with one axis for each of its factors."""
    maps = grads.maps()
    if maps:
        return join([a.rotated(*bases) for a in maps]).sum_squares()
    if len(bases) == 1 and bases[0].dim() == 1:
        return grads.sum_squares()
    if len(bases) == 1 and isinstance(grads, Explicit) and grads.summed:
        return squared(in_basis(grads, matrices_of(grads, 1)[:, :, 0], bases[0])).sum((0, 1))
    terms: list[Tensor] = []
    for piece in grads.chunks():
        rows = matrices_of(piece, 1)[:, :, 0] if len(bases) == 1 else matrices_of(piece, len(bases[0]))
        turned = rows @ bases[-1].conj()
        turned = turned if len(bases) == 1 else bases[0].mH @ turned
        accumulate(terms, squared(turned).sum((0, 1)))
    return terms[0]
