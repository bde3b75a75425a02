"""Individual gradients of matrices that map inputs to outputs, of which there are Kronecker factors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from backpack.uses.base import Individual


class LinearMap(Individual):
    """Individual gradients of the matrix of a linear map."""

    matrix: tuple[int, int]
    """Its shape, and the sizes of its two factors."""
    blocks: tuple[int, int] = (1, 1)
    """Of how many diagonal blocks the two factors consist."""
    rows: range
    """Those of the matrix that the map uses."""
    inputs_first = False
    """Whether the rows are inputs."""

    @abstractmethod
    def output_factor(self, approx: str | None) -> Tensor:
        """Sum over seeds and samples of outer products of cotangents."""

    @abstractmethod
    def input_factor(self, approx: str | None) -> Tensor:
        """Mean over samples of outer products of inputs; of one axis where it is diagonal."""

    @abstractmethod
    def rotated(self, rows: Tensor, columns: Tensor) -> Individual:
        """Gradients in the bases ``rows`` and ``columns``; a basis of one axis is the identity."""

    def transposed(self) -> LinearMap | None:
        """The map as one of the transposed matrix, where it can be seen as such."""
        return None

    def maps(self) -> Sequence[LinearMap]:
        return [self]


BLOCKS = 4
"""Into how many blocks of columns a second moment is divided, of which only those up to the diagonal are computed."""


def second_moment(rows: Tensor) -> Tensor:
    """``sum_r rows[... r a] rows[... r b]``."""
    size = rows.shape[-1]
    if size < 64 * BLOCKS or torch.is_grad_enabled():
        return rows.transpose(-1, -2) @ rows
    result = rows.new_empty(*rows.shape[:-2], size, size)
    for block in torch.arange(size).tensor_split(BLOCKS):
        start, stop = int(block[0]), int(block[-1]) + 1
        upper = rows[..., :stop].transpose(-1, -2) @ rows[..., start:stop]
        result[..., :stop, start:stop] = upper
        result[..., start:stop, :start] = upper[..., :start, :].transpose(-1, -2)
    return result


def diagonal_blocks(matrix: Tensor, groups: int) -> Tensor:
    """``[g a, g b]`` to ``[g, a, b]``."""
    if groups == 1:
        return matrix
    return matrix.unflatten(1, (groups, -1)).unflatten(0, (groups, -1)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
