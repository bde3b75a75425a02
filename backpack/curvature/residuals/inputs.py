"""The inputs of a node with respect to which it is differentiated twice, and which of their entries may interact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Size, Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.curvature.residuals.nodes import is_bilinear, positions_of
from backpack.samples import AnyLayout, Layout
from backpack.torch_internals import shape_at

WIDEST = 512
"""Entries that may interact for their blocks to be diagonalized."""

LARGEST = 2**24
"""Entries that all blocks together may have."""


@dataclass(eq=False)
class NodeInputs:
    """The inputs of a node that hold samples and lead to a use; ``layouts``: where the samples lie in each."""

    node: Node
    edges: list[GradientEdge]
    layouts: list[AnyLayout]

    def __post_init__(self) -> None:
        self.n = self.layouts[0].n

    @cached_property
    def shapes(self) -> list[Size]:
        """The shape of each input."""
        return [shape_at(edge) for edge in self.edges]

    @cached_property
    def sizes(self) -> list[int]:
        """How many entries of each input belong to one sample."""
        return [prod(self.shape_of_sample(place)) for place in range(len(self.edges))]

    def shape_of_sample(self, place: int) -> Sequence[int]:
        """The axes of an input that are left for each sample once the samples are split off."""
        return self.layouts[place].split(torch.empty(self.shapes[place], device="meta")).shape[1:]

    def split(self, place: int, tensor: Tensor) -> Tensor:
        """``[v, ...]`` at an input to ``[v, n, d]``."""
        return self.layouts[place].split(tensor, 1).flatten(2)

    def join(self, place: int, tensor: Tensor) -> Tensor:
        """Undo ``split``."""
        return self.layouts[place].join(tensor.reshape(*tensor.shape[:2], *self.shape_of_sample(place)), 1)

    @cached_property
    def block_axes(self) -> tuple[int, ...] | None:
        """The axes along which entries interact; ``None``: the blocks of such entries are too large to diagonalize."""
        if len(set(zip(self.shapes, self.layouts, strict=True))) > 1:
            return None
        count, shape, layout = len(self.shapes), self.shapes[0], self.layouts[0]
        axes = positions_of(self.node, len(shape))
        if not isinstance(layout, Layout):
            if axes is None or layout.occupies(axes):
                return None
        elif axes is None:
            if layout.factor > 1:
                return None
            axes = tuple(axis for axis in range(len(shape)) if axis != layout.axis)
        width = count * prod(shape[axis] for axis in axes)
        return axes if width <= WIDEST and count * shape.numel() * width <= LARGEST else None

    @cached_property
    def is_bilinear(self) -> bool:
        """Whether there are two inputs, and the node is linear in each."""
        return len(self.sizes) == 2 and is_bilinear(self.node)

    @cached_property
    def paired(self) -> list[tuple[int, int]]:
        """The inputs whose entries pairs of columns go over, with their sizes: of two linear ones, the smaller one."""
        sizes = list(enumerate(self.sizes))
        return [min(sizes, key=lambda pair: pair[1])] if self.is_bilinear else sizes

    def count_columns(self) -> int:
        """How many columns the residual has, if it is not zero."""
        return sum(self.sizes) if self.block_axes is not None else 2 * sum(size for _, size in self.paired)
