"""Linear maps that a parameter is the matrix of, found in a graph: what verifications of Kronecker factors read.

A function that is linear in a parameter has its inputs in its derivative: moved along a column of the matrix, the
output changes by an input, in all channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack.inspection.verification.plain import NoTruth, Plain
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
"""Function, and the place at which it takes a matrix, to the axes of the channels: of the matrix, of the output."""

VIEWS = {
    *("Alias", "Clone", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze"),
    *("T", "ToCopy", "Transpose", "Unbind", "UnsafeSplit", "UnsafeView", "Unsqueeze", "View"),
}

LARGEST = 2**9
"""Positions of a sample up to which the cotangents of each are looked at."""


@dataclass(eq=False)
class Map:
    """A function of the graph that multiplies with a parameter, which reaches it at ``place`` by the ``way``.

    The way is the functions between them, from there to the parameter, with the numbers of their outputs. ``form``:
    maps of one form act as further positions of each other.
    """

    plain: Plain
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
        given = call(self.node, 0, torch.zeros(self.shape, dtype=self.dtype))[self.place]
        assert given is not None
        own = 1 if self.swapped else own
        numbers = torch.arange(1, given.shape[own] + 1, dtype=self.dtype)
        tags = self.matrix(
            self._follow(numbers.reshape([-1 if a == own else 1 for a in range(given.dim())]) + 0 * given)
        )
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
        """A tensor of the parameter's shape in the form of which there are factors."""
        return (tensor.transpose(0, 1) if self.swapped else tensor).flatten(1)

    def tensor(self, matrix: Tensor) -> Tensor:
        """Undo ``matrix``."""
        shape = self.parameter.shape
        return matrix.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1) if self.swapped else matrix.reshape(shape)

    def changes(self, matrices: Tensor) -> Tensor:
        """Of the output as the matrix moves along these, ``[k, r, c]``: ``[k, *output]``."""
        dummy = torch.zeros(self.shape, dtype=self.dtype, requires_grad=True)
        given = call(self.node, 0, dummy)[self.place]
        assert given is not None
        pulled = self._follow(given)
        pulls = [torch.autograd.grad(pulled, dummy, self.tensor(m), retain_graph=True)[0] for m in matrices]
        return torch.stack(pulls)

    def inputs(self, vectors: Tensor) -> Tensor:
        """What the inputs have along these, ``[k, c]``: by samples, positions and channels, ``[k, n, s, o]``."""
        ones = torch.ones(self.matrix(self.parameter).shape[int(self.inputs_first)], dtype=self.dtype)
        sides = [torch.outer(v, ones) if self.inputs_first else torch.outer(ones, v) for v in vectors.to(self.dtype)]
        return torch.stack([self._by_samples(change) for change in self.changes(torch.stack(sides))])

    def outputs(self, vector: Tensor) -> list[Tensor]:
        """The output's channels combined as in ``vector``, ``[r]``: for each group."""
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
        """The same, ``[k, *output]``, at each position alone, of all samples at a time, as they do not interact."""
        rows = outputs.movedim(self.axis + 1, -1)
        split = rows.unsqueeze(1) if self.layout is None else self.layout.split(rows, 1)
        flat = split.reshape(*split.shape[:2], -1, split.shape[-1])
        if flat.shape[2] > LARGEST:
            raise NoTruth(f"there are more than {LARGEST} positions")
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

    def _follow(self, grad: Tensor) -> Tensor:
        for node, number in self.way:
            grad = next(found for found in call(node, number, grad) if found is not None)
        return grad


def layout_at(plain: Plain, edge: GradientEdge, channels: int | None = None) -> AnyLayout | None:
    """Where the samples lie in the tensor at an edge, the axis of its channels put last; ``None``: nowhere."""
    draw = torch.randn(plain.slope.shape, generator=torch.Generator().manual_seed(0), dtype=plain.slope.dtype)
    reached = []
    for number in range(plain.n):
        pulled = plain.pulled(plain.of_sample(draw, number), edge)
        grad = torch.zeros(shape_at(edge)) if pulled is None else pulled.detach()
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


def kind(node: Node) -> str:
    """The name of a function of the graph."""
    return node.name().removesuffix("0").removesuffix("1").removesuffix("Backward")


def call(node: Node, number: int, grad: Tensor) -> list[Tensor | None]:
    """The cotangents of a function's inputs, from that of one of its outputs."""
    grads: list[Tensor | None] = [None] * len(node._input_metadata)
    grads[number] = grad
    found = node(*grads)  # type: ignore[operator]
    return [None if f is None else f.to_dense() for f in (found if isinstance(found, (tuple, list)) else (found,))]


def maps(plain: Plain, name: str) -> list[Map]:
    """All functions that multiply with a parameter; none: the graph has others that take it."""
    start = get_gradient_edge(plain.parameters[name]).node
    pending: list[tuple[Node, list[tuple[Node, int]]]] = [(start, [])]
    found = []
    for node, way in pending:
        for user, place, number in plain.users.get(node, ()):
            step = [(node, number), *way] if node != start else []
            if dtype_at(GradientEdge(user, 0)).is_complex:
                return []  # it is used as a complex matrix
            if (kind(user), place) in CHANNELS:
                found.append(Map(plain, plain.parameters[name], user, place, step))
            elif kind(user) in VIEWS:
                pending.append((user, step))
            else:
                return []
    return found
