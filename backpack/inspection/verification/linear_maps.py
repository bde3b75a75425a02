"""The linear maps in a graph whose matrix is a parameter, from which Kronecker factors are verified.

A linear map has its inputs in its derivative: as the matrix moves along one of its columns, the output changes by an
input, in all channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack.graph import VIEWS, count_outputs, kind
from backpack.graph import call as call_node
from backpack.inspection.verification.plain_autograd import NotCompared, PlainAutograd, gradients, zeros_at
from backpack.samples import AnyLayout, Layout, found_layout, layouts
from backpack.torch_internals import dtype_at, shape_at

CHANNELS = {
    ("Addmm", 1): (0, 0),
    ("Addmm", 2): (1, 1),
    ("Mm", 0): (0, 0),
    ("Mm", 1): (1, 1),
    ("Bmm", 0): (1, 1),
    ("Bmm", 1): (2, 2),
    ("Convolution", 1): (0, 1),
    ("Embedding", 0): (1, -1),
}
"""Kind of a node, and the place at which it takes a matrix: the axes of channels in the matrix, and in the output."""

COPIES = VIEWS | {"Clone", "ToCopy"}

LARGEST = 2**9
"""The most positions of a sample whose cotangents are looked at one by one."""


@dataclass(eq=False)
class LinearMap:
    """A node whose function multiplies with a parameter.

    The parameter reaches the node at ``place``. ``way`` holds the nodes from there to the parameter, each with the
    number of the output on the way. Maps of the same ``form`` act as further positions of each other.
    """

    plain: PlainAutograd
    parameter: Tensor
    node: Node
    place: int
    way: list[tuple[Node, int]]

    def __post_init__(self) -> None:
        self.edge = GradientEdge(self.node, 0)
        self.shape, self.dtype = shape_at(self.edge), dtype_at(self.edge)
        own, axis = CHANNELS[kind(self.node), self.place]
        self.axis = axis % len(self.shape)
        self.groups = getattr(self.node, "_saved_groups", 1)
        self.swapped = getattr(self.node, "_saved_transposed", False)
        given = self._to_matrix(zeros_at(self.edge))
        own = 1 if self.swapped else own
        numbers = torch.arange(1, given.shape[own] + 1, dtype=self.dtype)
        numbered = numbers.reshape([-1 if a == own else 1 for a in range(given.dim())]) + 0 * given
        tags = self.matrix(self._to_parameter(numbered))
        self.inputs_first = bool((tags != tags[:, :1]).any())
        tags = tags[0] if self.inputs_first else tags[:, 0]
        self.rows = tags.nonzero()[:, 0]
        self.channels = tags[self.rows].long() - 1
        self.form = (self.inputs_first, self.groups, self.swapped, *self.rows.tolist())
        self.layout = layout_at(self.plain, self.edge, self.axis)

    @property
    def is_shared_table(self) -> bool:
        """Whether it looks up the same rows for all samples."""
        return kind(self.node) == "Embedding" and self.layout is None

    def matrix(self, tensor: Tensor) -> Tensor:
        """Bring a tensor of the parameter's shape to the shape of the matrix whose Kronecker factors there are."""
        return (tensor.transpose(0, 1) if self.swapped else tensor).flatten(1)

    def tensor(self, matrix: Tensor) -> Tensor:
        """Undo ``matrix``."""
        shape = self.parameter.shape
        return matrix.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1) if self.swapped else matrix.reshape(shape)

    def changes(self, matrices: Tensor) -> Tensor:
        """How the output changes as the matrix moves along ``k`` directions ``[k, r, c]``: ``[k, *output]``."""
        cotangent = zeros_at(self.edge).requires_grad_()
        pulled = self._to_parameter(self._to_matrix(cotangent))
        return torch.stack([gradients(pulled, [cotangent], self.tensor(matrix))[0] for matrix in matrices])

    def inputs(self, vectors: Tensor) -> Tensor:
        """The inputs along ``k`` vectors ``[k, c]``, by samples, positions and channels: ``[k, n, s, o]``."""
        ones = torch.ones(self.matrix(self.parameter).shape[int(self.inputs_first)], dtype=self.dtype)
        sides = [torch.outer(v, ones) if self.inputs_first else torch.outer(ones, v) for v in vectors.to(self.dtype)]
        return torch.stack([self._by_samples(change) for change in self.changes(torch.stack(sides))])

    def outputs(self, vector: Tensor) -> list[Tensor]:
        """For each group, the output with a combination ``vector``, ``[r]``, of its channels at all positions."""
        mask = torch.ones(self.shape, dtype=self.dtype)
        if kind(self.node) == "Embedding":  # it leaves out padding
            mask = self.changes(torch.ones(1, *self.matrix(self.parameter).shape, dtype=self.dtype))[0]
        found, size = [], self.shape[self.axis] // self.groups
        for group in range(self.groups):
            if self.swapped:
                rows, channels = self.rows, self.channels + group * size
            else:
                own = self.channels // size == group
                rows, channels = self.rows[own], self.channels[own]
            values = torch.zeros(self.shape[self.axis], dtype=self.dtype)
            values[channels] = vector[rows].to(self.dtype)
            found.append((mask.movedim(self.axis, -1) * values).movedim(-1, self.axis))
        return found

    def positions(self, outputs: Tensor) -> Iterator[Tensor]:
        """What ``outputs`` gave, ``[k, *output]``, at one position after the other, of all samples at a time."""
        rows = outputs.movedim(self.axis + 1, -1)
        split = rows.unsqueeze(1) if self.layout is None else self.layout.split(rows, 1)
        flat = split.reshape(*split.shape[:2], -1, split.shape[-1])
        if flat.shape[2] > LARGEST:
            raise NotCompared(f"there are more than {LARGEST} positions")
        for place in flat.ne(0).any(3).any(1).any(0).nonzero().flatten():
            part = torch.zeros_like(flat)
            part[:, :, place] = flat[:, :, place]
            own = part.reshape(split.shape)
            yield (own.squeeze(1) if self.layout is None else self.layout.join(own, 1)).movedim(-1, self.axis + 1)

    def _by_samples(self, output: Tensor) -> Tensor:
        rows = output.movedim(self.axis, -1)
        if self.layout is None:
            return rows.reshape(1, -1, rows.shape[-1]).expand(self.plain.n, -1, -1)
        return self.layout.split(rows).reshape(self.plain.n, -1, rows.shape[-1])

    def _to_matrix(self, cotangent: Tensor) -> Tensor:
        """The cotangent of the matrix, of one of the output."""
        found = call(self.node, 0, cotangent)[self.place]
        assert found is not None
        return found

    def _to_parameter(self, cotangent: Tensor) -> Tensor:
        """The cotangent of the parameter, of one of the matrix."""
        for node, number in self.way:
            cotangent = next(found for found in call(node, number, cotangent) if found is not None)
        return cotangent


def layout_at(plain: PlainAutograd, edge: GradientEdge, channels: int | None = None) -> AnyLayout | None:
    """Where the samples lie in the tensor at an edge, after its axis of channels is put last; ``None``: nowhere."""
    like = plain.loss_gradient
    draw = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=like.dtype)
    reached = []
    for number in range(plain.n):
        pulled = plain.pull_back(plain.only_sample(number, draw), edge)
        grad = zeros_at(edge) if pulled is None else pulled.detach()
        reached.append((grad if channels is None else grad.movedim(channels, -1)).ne(0))
    shape = reached[0].shape
    if plain.ids is not None:
        owned = torch.stack(reached).any(-1, keepdim=True) if channels is not None else torch.stack(reached)
        if bool((owned.sum(0) > 1).any()):
            return None
        return found_layout(plain.n, owned.to(torch.int64).argmax(0).where(owned.any(0), -1), exactly=True)

    def fits(layout: Layout) -> bool:
        owners = layout.owners(shape, reached[0].device)
        return not any(bool((own & (owners != number)).any()) for number, own in enumerate(reached))

    axes = range(len(shape) - (channels is not None))
    return next(filter(fits, layouts(shape, plain.n, axes) if axes else ()), None)


def call(node: Node, number: int, cotangent: Tensor) -> list[Tensor | None]:
    """The cotangents that a node sends along its edges, given that of one of its outputs."""
    return call_node(node, [cotangent if k == number else None for k in range(count_outputs(node))])


def linear_maps(plain: PlainAutograd, name: str) -> list[LinearMap]:
    """All linear maps whose matrix is a parameter; none if the graph uses the parameter in another way, too."""
    start = get_gradient_edge(plain.parameters[name]).node
    pending: list[tuple[Node, list[tuple[Node, int]]]] = [(start, [])]
    found = []
    for node, way in pending:
        for user, place, number in plain.users.get(node, ()):
            step = [(node, number), *way] if node != start else []
            if dtype_at(GradientEdge(user, 0)).is_complex:
                return []  # it is used as a complex matrix
            if (kind(user), place) in CHANNELS:
                found.append(LinearMap(plain, plain.parameters[name], user, place, step))
            elif kind(user) in COPIES:
                pending.append((user, step))
            else:
                return []
    return found
