"""Linear maps that a parameter is the matrix of, and what their Kronecker factors need of them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from backpack.uses.base import Individual


class LinearMap(ABC):
    """A linear map, with the individual gradients of its matrix."""

    matrix: tuple[int, int]
    """The shape of the matrix, and the sizes of its two factors."""
    blocks: tuple[int, int] = (1, 1)
    """Of how many diagonal blocks the two factors consist."""
    ranks: tuple[int, int]
    """Upper bounds of the ranks of the two factors."""
    inputs_first = False
    """Whether the rows of the matrix are inputs."""
    diagonal_inputs = False
    """Whether the input factor is diagonal, and stored with one axis."""

    @property
    def rows(self) -> range:
        """The rows of the matrix that the map uses."""
        return range(self.matrix[0])

    @abstractmethod
    def output_factor(self, approx: str | None) -> Tensor:
        """Sum over seeds and samples of outer products of cotangents."""

    def output_blocks(self, moment: Tensor) -> Tensor:
        """The output factor, given the second moment ``[c, c]`` of the outputs of all groups together."""
        return moment

    @abstractmethod
    def input_factor(self, approx: str | None, scale: float = 1.0) -> Tensor:
        """``scale`` times the mean over samples of outer products of inputs; if it is diagonal, a vector."""

    @abstractmethod
    def rotated(self, rows: Tensor, columns: Tensor) -> Individual:
        """The individual gradients in the bases ``rows`` and ``columns``; a basis of one axis is the identity."""

    def ungrouped(self) -> LinearMap:
        """The map without blocks of rows, for bases that do not have them."""
        return self

    def transposed(self) -> LinearMap | None:
        """The map as one of the transposed matrix, or of a stack of them, where it can be seen as such."""
        return None
