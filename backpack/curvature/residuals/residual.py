"""The residual of a node: its second derivatives, weighed by the gradient that arrives, as weighted columns.

``R_n = sum_v w[v, n] c_v[n] c_v[n]^T`` for each sample ``n``, at the inputs of the node. The Hessian of the loss is
its Gauss-Newton matrix and the sum of ``J_n^T R_n J_n`` over all nodes (the chain rule of second order).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from backpack.curvature.residuals.inputs import LARGEST, NodeInputs
from backpack.curvature.residuals.local import LocalHessian


class Residual(ABC):
    """Second derivatives of a node with respect to its inputs; ``like`` has their data type and device."""

    columns: int

    def __init__(self, inputs: NodeInputs, local: LocalHessian, like: Tensor) -> None:
        self.inputs, self.local, self.like = inputs, local, like
        self.n, self.edges = inputs.n, inputs.edges

    @abstractmethod
    def exact(self, start: int, stop: int) -> tuple[list[Tensor], Tensor]:
        """Columns, ``[v, ...]`` for each edge, and their weights ``[v, n]``."""

    @abstractmethod
    def modified(self, modify: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
        """The function that multiplies vectors at the edges with the residual, its eigenvalues modified.

        Raises:
            RuntimeError: Too many entries interact for the residual to be diagonalized.
        """

    def _numbers(self, start: int, stop: int) -> Tensor:
        """The numbers of some columns."""
        return torch.arange(start, min(stop, self.columns), device=self.like.device)


def _diagonalized(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of matrices that are symmetric but for rounding."""
    values, vectors = torch.linalg.eigh((matrices + matrices.transpose(-1, -2)) / 2)
    return values, vectors


class Blocks(Residual):
    """Entries interact in blocks of ``b``, which are diagonalized: their eigenvectors are the columns.

    The inputs have the same shape; ``positions`` are the axes along which entries interact.
    """

    def __init__(self, inputs: NodeInputs, local: LocalHessian, like: Tensor, positions: tuple[int, ...]) -> None:
        super().__init__(inputs, local, like)
        shape, layout = inputs.shapes[0], inputs.layouts[0]
        left = layout.split_sizes(range(2, 2 + len(shape)))  # no axis is mistaken for one that is added, of size 1
        self._axes = [left.index(axis + 2) + 2 for axis in positions]
        """The interacting axes in ``[v, n, ...]``."""
        n, r, each = self._to_blocks(like.new_empty(0, *shape)).shape[1:]
        self.width = len(self.edges) * each
        self.columns = r * self.width
        basis = like.new_zeros(self.width, n, r, self.width)
        for b in range(self.width):
            basis[b, ..., b] = 1
        found = self.local.products(self._from_blocks(basis))
        matrices = torch.cat([self._to_blocks(f) for f in found], 3).movedim(0, -1)
        self.vectors: Tensor | None = None
        if self.width == 1:
            self.values = matrices[..., 0]
        else:
            self.values, self.vectors = _diagonalized(matrices)

    @property
    def is_zero(self) -> bool:
        return not self.values.any()

    def _to_blocks(self, tensor: Tensor) -> Tensor:
        """``[v, ...]`` to ``[v, n, r, b]``."""
        split = self.inputs.layouts[0].split(tensor, 1)
        each = prod(split.shape[axis] for axis in self._axes)
        rows = prod(split.shape[2:]) // max(1, each)
        return split.movedim(self._axes, self._last(split)).reshape(len(split), self.n, rows, each)

    def _from_blocks(self, blocks: Tensor) -> list[Tensor]:
        """``[v, n, r, k b]`` to ``[v, ...]`` for each edge."""
        sizes = list(enumerate(self.inputs.shape_of_sample(0), start=2))
        moved = [size for axis, size in sizes if axis not in self._axes] + [dict(sizes)[axis] for axis in self._axes]
        found = []
        for part in blocks.chunk(len(self.edges), 3):
            split = part.reshape(len(part), self.n, *moved)
            found.append(self.inputs.layouts[0].join(split.movedim(self._last(split), self._axes), 1))
        return found

    def _last(self, split: Tensor) -> list[int]:
        """The last axes, as many as interact."""
        return list(range(split.dim() - len(self._axes), split.dim()))

    def modified(self, modify: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
        values = modify(self.values)

        def multiply(vectors: list[Tensor]) -> list[Tensor]:
            blocks = torch.cat([self._to_blocks(vector.unsqueeze(0)) for vector in vectors], 3)
            if self.vectors is None:
                blocks = blocks * values
            else:
                coefficients = torch.einsum("nrbe,vnrb->vnre", self.vectors, blocks) * values
                blocks = torch.einsum("nrbe,vnre->vnrb", self.vectors, coefficients)
            return [found[0] for found in self._from_blocks(blocks)]

        return multiply

    def exact(self, start: int, stop: int) -> tuple[list[Tensor], Tensor]:
        number = self._numbers(start, stop)
        row, entry = number // self.width, number % self.width
        blocks = self.like.new_zeros(len(number), self.n, self.columns // self.width, self.width)
        column = torch.arange(len(number), device=number.device)
        # The indexed axes come first: [v, n, b].
        blocks[column, :, row] = 1 if self.vectors is None else self.vectors[:, row, :, entry]
        return self._from_blocks(blocks), self.values[:, row, entry].T


class Pairs(Residual):
    """``R = sum_v (e_v (R e_v)^T + (R e_v) e_v^T) / 2``, each term a difference of two squares.

    Where the node is linear in each of two operands, over the entries of the smaller one. Needs nothing of the
    structure of ``R``, and two columns an entry.
    """

    def __init__(self, inputs: NodeInputs, local: LocalHessian, like: Tensor) -> None:
        super().__init__(inputs, local, like)
        self.columns = 2 * sum(size for _, size in inputs.paired)

    def _join(self, parts: list[Tensor]) -> list[Tensor]:
        """``[v, n, d]`` of each input in its own form."""
        return [self.inputs.join(place, part) for place, part in enumerate(parts)]

    def _split(self, tensors: list[Tensor]) -> list[Tensor]:
        """Undo ``_join``."""
        return [self.inputs.split(place, tensor) for place, tensor in enumerate(tensors)]

    def modified(self, modify: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
        sizes = self.inputs.sizes
        if self.n * sum(sizes) ** 2 > LARGEST:
            raise RuntimeError(
                f"The residual of {self.inputs.node.name()} would have to be diagonalized, and {sum(sizes)} of its "
                f"entries interact in each of {self.n} samples: that is too large. Use the Hessian or the GGN."
            )
        basis = torch.eye(sum(sizes), dtype=self.like.dtype, device=self.like.device)
        units = basis.unsqueeze(1).expand(-1, self.n, -1).split(sizes, 2)
        found = self.local.products(self._join([unit.contiguous() for unit in units]))
        values, vectors = _diagonalized(torch.cat(self._split(found), 2).movedim(0, 2))
        values = modify(values)

        def multiply(parts: list[Tensor]) -> list[Tensor]:
            whole = torch.cat(self._split([part.unsqueeze(0) for part in parts]), 2)
            coefficients = torch.einsum("nde,vnd->vne", vectors, whole) * values
            pieces = torch.einsum("nde,vne->vnd", vectors, coefficients).split(sizes, 2)
            return [joined[0] for joined in self._join(list(pieces))]

        return multiply

    def exact(self, start: int, stop: int) -> tuple[list[Tensor], Tensor]:
        number = self._numbers(start, stop)
        entry, sign = number // 2, 1 - 2 * (number % 2)
        units = [self.like.new_zeros(len(number), self.n, size) for size in self.inputs.sizes]
        first = 0
        for place, size in self.inputs.paired:
            own = (entry >= first) & (entry < first + size)
            units[place][own.nonzero().flatten(), :, entry[own] - first] = 1
            first += size
        found = self._split(self.local.products(self._join(units)))
        length = torch.stack([f.square().sum(2) for f in found]).sum(0).sqrt()
        scale = torch.where(length > 0, length, torch.ones_like(length))  # so that both terms are of the same size
        columns = [u + f * (sign[:, None] / scale).unsqueeze(2) for u, f in zip(units, found, strict=True)]
        weights = (1.0 if self.inputs.is_bilinear else 0.5) * length * sign[:, None] / 2
        return self._join(columns), weights


def residual_of(inputs: NodeInputs, local: LocalHessian, like: Tensor) -> Residual | None:
    """The residual in its cheapest form; ``None``: it is zero."""
    axes = inputs.block_axes
    if axes is None:
        return Pairs(inputs, local, like)
    blocks = Blocks(inputs, local, like, axes)
    return None if blocks.is_zero else blocks
