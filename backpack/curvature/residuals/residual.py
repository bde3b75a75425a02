"""The residual of a node: its second derivatives, weighed by the gradient that arrives, as weighted columns.

``R_n = sum_v w[v, n] c_v[n] c_v[n]^T`` for each sample ``n``, at the inputs of the node. The Hessian of the loss is
its Gauss-Newton matrix and the sum of ``J_n^T R_n J_n`` over all nodes (the chain rule of second order).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Size, Tensor
from torch.autograd.graph import Node

from backpack.curvature.residuals.local import LocalHessian
from backpack.curvature.residuals.nodes import is_bilinear, positions_of
from backpack.samples import AnyLayout, Layout

WIDEST = 512
"""Entries that may interact for their blocks to be diagonalized."""

LARGEST = 2**24
"""Entries that all blocks together may have."""


class Residual(ABC):
    """Second derivatives of a node, of which the inputs at ``edges`` have these shapes and layouts."""

    columns: int

    def __init__(self, local: LocalHessian, shapes: Sequence[Size], layouts: Sequence[AnyLayout], like: Tensor) -> None:
        self.local, self.edges = local, local.edges
        self.shapes, self.layouts, self.like = shapes, layouts, like
        self.n = layouts[0].n

    @abstractmethod
    def exact(self, start: int, stop: int) -> tuple[list[Tensor], Tensor]:
        """Columns, ``[v, ...]`` for each edge, and their weights ``[v, n]``."""

    @abstractmethod
    def modified(self, modify: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
        """The function that multiplies vectors at the edges with the residual, its eigenvalues modified.

        Raises:
            RuntimeError: Too many entries interact for the residual to be diagonalized.
        """

    def sizes(self) -> list[int]:
        """Entries of each input that belong to one sample."""
        return _sizes(self.shapes, self.layouts)

    def split(self, place: int, tensor: Tensor) -> Tensor:
        """``[v, ...]`` at an edge to ``[v, n, d]``."""
        return self.layouts[place].split(tensor, 1).flatten(2)

    def join(self, place: int, tensor: Tensor) -> Tensor:
        """Undo ``split``."""
        rest = _split_shape(self.shapes[place], self.layouts[place])
        return self.layouts[place].join(tensor.reshape(*tensor.shape[:2], *rest), 1)


def _sizes(shapes: Sequence[Size], layouts: Sequence[AnyLayout]) -> list[int]:
    return [prod(_split_shape(*pair)) for pair in zip(shapes, layouts, strict=True)]


def _split_shape(shape: Size, layout: AnyLayout) -> Sequence[int]:
    """Sizes of the axes behind the sample axis."""
    return layout.split(torch.empty(shape, device="meta")).shape[1:]


class Blocks(Residual):
    """Entries interact in blocks of ``b``, which are diagonalized: their eigenvectors are the columns.

    The inputs have the same shape; ``positions`` are the axes along which entries interact.
    """

    def __init__(
        self,
        local: LocalHessian,
        shapes: Sequence[Size],
        layouts: Sequence[AnyLayout],
        like: Tensor,
        positions: tuple[int, ...],
    ) -> None:
        super().__init__(local, shapes, layouts, like)
        self.positions = positions
        k = len(self.edges)
        n, r, each = self._to_blocks(like.new_empty(0, *shapes[0])).shape[1:]
        basis = like.new_zeros(k * each, n, r, k * each)
        for b in range(k * each):
            basis[b, ..., b] = 1
        found = self.local.products(self._from_blocks(basis))
        matrices = torch.cat([self._to_blocks(f) for f in found], 3).movedim(0, -1)
        self.width = k * each
        self.columns = r * self.width
        if self.width == 1:
            self.values, self.vectors = matrices[..., 0], None
        else:
            values, vectors = torch.linalg.eigh((matrices + matrices.transpose(-1, -2)) / 2)
            self.values, self.vectors = values, vectors

    @property
    def is_zero(self) -> bool:
        return not self.values.any()

    def _own_axes(self) -> list[int]:
        """The interacting axes, once the samples are split off."""
        layout = self.layouts[0]
        if not isinstance(layout, Layout):
            left = [axis for axis in range(len(self.shapes[0])) if axis not in layout.axes]
            return [left.index(axis) + 2 for axis in self.positions]
        if layout.factor > 1:
            return [axis + 1 for axis in self.positions]
        return [axis if axis > layout.axis else axis + 1 for axis in self.positions]

    def _to_blocks(self, tensor: Tensor) -> Tensor:
        """``[v, ...]`` to ``[v, n, r, b]``."""
        split = self.layouts[0].split(tensor, 1)
        own = [axis + 1 for axis in self._own_axes()]
        last = list(range(split.dim() - len(own), split.dim()))
        each = 1
        for axis in own:
            each *= split.shape[axis]
        rows = prod(split.shape[2:]) // max(1, each)
        return split.movedim(own, last).reshape(len(split), self.n, rows, each)

    def _from_blocks(self, blocks: Tensor) -> list[Tensor]:
        """``[v, n, r, k b]`` to ``[v, ...]`` for each edge."""
        rest = _split_shape(self.shapes[0], self.layouts[0])
        own = [axis - 1 for axis in self._own_axes()]
        moved = [size for axis, size in enumerate(rest) if axis not in own] + [rest[axis] for axis in own]
        found = []
        for part in blocks.chunk(len(self.edges), 3):
            split = part.reshape(len(part), self.n, *moved)
            last = list(range(split.dim() - len(own), split.dim()))
            found.append(self.layouts[0].join(split.movedim(last, [axis + 2 for axis in own]), 1))
        return found

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
        number = torch.arange(start, min(stop, self.columns), device=self.like.device)
        row, entry = number // self.width, number % self.width
        blocks = self.like.new_zeros(len(number), self.n, self.columns // self.width, self.width)
        if self.vectors is None:
            blocks[torch.arange(len(number), device=number.device), :, row, 0] = 1
        else:
            vectors = self.vectors[:, row, :, entry]  # [v, n, b]: the indexed axes come first
            blocks[torch.arange(len(number), device=number.device), :, row] = vectors
        return self._from_blocks(blocks), self.values[:, row, entry].T


class Pairs(Residual):
    """``R = sum_v (e_v (R e_v)^T + (R e_v) e_v^T) / 2``, each term a difference of two squares.

    Where the node is linear in each of two operands, over the entries of the smaller one. Needs nothing of the
    structure of ``R``, and two columns an entry.
    """

    def __init__(self, local: LocalHessian, shapes: Sequence[Size], layouts: Sequence[AnyLayout], like: Tensor) -> None:
        super().__init__(local, shapes, layouts, like)
        sizes = self.sizes()
        places = operands(local.node, sizes)
        self.entries = [(place, sizes[place]) for place in places]
        self.factor = 1.0 if len(places) < len(sizes) else 0.5
        self.columns = 2 * sum(size for _, size in self.entries)

    def modified(self, modify: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
        sizes = self.sizes()
        if self.n * sum(sizes) ** 2 > LARGEST:
            raise RuntimeError(
                f"The residual of {self.local.node.name()} would have to be diagonalized, and {sum(sizes)} of its "
                f"entries interact in each of {self.n} samples: that is too large. Use the Hessian or the GGN."
            )
        basis = torch.eye(sum(sizes), dtype=self.like.dtype, device=self.like.device)
        units = basis.unsqueeze(1).expand(-1, self.n, -1).split(sizes, 2)
        found = self.local.products([self.join(place, unit.contiguous()) for place, unit in enumerate(units)])
        matrices = torch.cat([self.split(place, f) for place, f in enumerate(found)], 2).movedim(0, 2)
        values, vectors = torch.linalg.eigh((matrices + matrices.transpose(1, 2)) / 2)
        values = modify(values)

        def multiply(parts: list[Tensor]) -> list[Tensor]:
            whole = torch.cat([self.split(place, part.unsqueeze(0)) for place, part in enumerate(parts)], 2)
            coefficients = torch.einsum("nde,vnd->vne", vectors, whole) * values
            pieces = torch.einsum("nde,vne->vnd", vectors, coefficients).split(sizes, 2)
            return [self.join(place, piece)[0] for place, piece in enumerate(pieces)]

        return multiply

    def exact(self, start: int, stop: int) -> tuple[list[Tensor], Tensor]:
        number = torch.arange(start, min(stop, self.columns), device=self.like.device)
        units = [self.like.new_zeros(len(number), self.n, size) for size in self.sizes()]
        first = 0
        for place, size in self.entries:
            own = (number // 2 >= first) & (number // 2 < first + size)
            units[place][own.nonzero().flatten(), :, (number // 2)[own] - first] = 1
            first += size
        vectors = [self.join(place, unit) for place, unit in enumerate(units)]
        found = [self.split(place, f) for place, f in enumerate(self.local.products(vectors))]
        length = torch.stack([f.square().sum(2) for f in found]).sum(0).sqrt()
        scale = torch.where(length > 0, length, torch.ones_like(length))  # so that both terms are of the same size
        sign = 1 - 2 * (number % 2)
        columns = [u + f * (sign[:, None] / scale).unsqueeze(2) for u, f in zip(units, found, strict=True)]
        weights = self.factor * length * sign[:, None] / 2
        return [self.join(place, column) for place, column in enumerate(columns)], weights


def block_axes(node: Node, shapes: Sequence[Size], layouts: Sequence[AnyLayout]) -> tuple[int, ...] | None:
    """The axes along which entries interact; ``None``: the blocks of such entries are too large to diagonalize."""
    if len(set(zip(shapes, layouts, strict=True))) > 1:
        return None
    shape, layout = shapes[0], layouts[0]
    axes = positions_of(node, len(shape))
    if not isinstance(layout, Layout):
        if axes is None or layout.occupies(axes):
            return None
    elif axes is None:
        if layout.factor > 1:
            return None
        axes = tuple(axis for axis in range(len(shape)) if axis != layout.axis)
    width = len(shapes) * prod(shape[axis] for axis in axes)
    return axes if width <= WIDEST and len(shapes) * shape.numel() * width <= LARGEST else None


def operands(node: Node, sizes: Sequence[int]) -> list[int]:
    """Those inputs of a node over whose entries pairs go: of two in which it is linear each, the smaller one."""
    return [sizes.index(min(sizes))] if is_bilinear(node) and len(sizes) == 2 else list(range(len(sizes)))


def count_columns(node: Node, shapes: Sequence[Size], layouts: Sequence[AnyLayout]) -> int:
    """How many columns the residual of a node has, if it is not zero."""
    sizes = _sizes(shapes, layouts)
    if block_axes(node, shapes, layouts) is not None:
        return sum(sizes)
    return 2 * sum(sizes[place] for place in operands(node, sizes))


def residual_of(
    local: LocalHessian, shapes: Sequence[Size], layouts: Sequence[AnyLayout], like: Tensor
) -> Residual | None:
    """The residual in its cheapest form; ``None``: it is zero."""
    axes = block_axes(local.node, shapes, layouts)
    if axes is None:
        return Pairs(local, shapes, layouts, like)
    blocks = Blocks(local, shapes, layouts, like, axes)
    return None if blocks.is_zero else blocks
