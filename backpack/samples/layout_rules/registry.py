"""The registry of rules, and what a rule is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack.graph import kind, shape_of, signed
from backpack.samples.layouts import AnyLayout, found_layout
from backpack.torch_internals import is_packed


class Unknown(Exception):
    """The kind of node, the shapes and the saved numbers do not tell where the samples lie."""


class Output:
    """Output ``number`` of a node's function, where the samples lie in it, and the edges to the function's inputs."""

    __slots__ = ("_shape", "edges", "layout", "node", "number")

    def __init__(self, node: Node, edges: Sequence[Any], layout: AnyLayout, number: int) -> None:
        self.node, self.edges, self.layout, self.number = node, edges, layout, number
        self._shape: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        if self._shape is None:
            self._shape = shape_of(self.node, self.number)
        return self._shape

    @property
    def owner(self) -> Tensor:
        """The sample that each entry of the output belongs to, broadcastable to its shape."""
        return self.layout.owners(self.shape, torch.device("cpu"))

    def layout_of(self, owner: Tensor) -> AnyLayout:
        """The layout of an input whose entries belong to these of the samples."""
        return found_layout(self.layout.n, owner, exactly=True)

    def input_shape(self, k: int) -> tuple[int, ...]:
        """The shape of input ``k``, which must have an edge."""
        node, number = self.edges[k]
        return shape_of(node, number)

    def saved(self, name: str) -> Any:
        """A number, or numbers, that the node saved."""
        return getattr(self.node, f"_saved_{name}")

    def axes(self, name: str, dim: int | None = None) -> list[int]:
        """Saved axes of a tensor with ``dim`` of them, by default the output; negative ones count from the end."""
        dim, found = len(self.shape) if dim is None else dim, self.saved(name)
        return [signed(axis) % max(1, dim) for axis in (found if isinstance(found, (tuple, list)) else [found])]

    def indices(self, name: str) -> list[Any]:
        """Saved tensors of indices.

        Raises:
            Unknown: They would have to be computed again, or no edge of the node needs them.
        """
        raw = getattr(self.node, f"_raw_saved_{name}")
        if any(map(is_packed, raw if isinstance(raw, (tuple, list)) else [raw])):
            raise Unknown
        found = self.saved(name)
        if found is None:
            raise Unknown
        return [index if index is None else index.cpu() for index in ([found] if isinstance(found, Tensor) else found)]

    def each(self, layout_of_input: Callable[[int], AnyLayout | None]) -> list[AnyLayout | None]:
        """The layout of each input, by its number; ``None`` for an input without an edge."""
        return [None if other is None else layout_of_input(k) for k, (other, _) in enumerate(self.edges)]

    def unless_along(self, axes: Iterable[int]) -> AnyLayout:
        """The output's layout, which is the input's as well if no samples lie along these axes.

        Raises:
            Unknown: Samples do, and the function mixes or moves entries along these axes.
        """
        if self.layout.occupies(list(axes)):
            raise Unknown
        return self.layout

    def without_axes(self, gone: Sequence[int], dim: int) -> AnyLayout | None:
        """The layout of an input with ``dim`` axes, of which the output lacks some."""
        left = iter(range(len(self.shape)))
        return self.layout.moved([None if axis in gone else next(left) for axis in range(dim)])


Rule = Callable[[Output], "AnyLayout | None | Sequence[AnyLayout | None]"]
"""Where the samples lie in each input; ``None``: some entry belongs to several.

One layout is that of all inputs. A sequence may be shorter than there are inputs: ``None`` stands for all others.
"""

RULES: dict[str, Rule] = {}
"""The rule for each kind of node."""

_FOR_SEVERAL_AXES: set[Rule] = set()
"""Rules that also hold for samples along several axes."""


def rule(kinds: str, several_axes: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for kinds of nodes; ``several_axes``: it also holds for samples along several axes."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds.split(), function))
        if several_axes:
            _FOR_SEVERAL_AXES.add(function)
        return function

    return register


SUMMED: dict[str, int] = {}
"""For kinds of nodes that compute something of each row of an input, and may return the sum: which input that is."""


def rows_of_terms(out: Output) -> list[AnyLayout | None]:
    """The rows of that input belong to the samples of what is computed of them, if that is not summed."""
    k = SUMMED[kind(out.node)]
    if out.edges[k][0] is None:
        return out.each(lambda _: None)
    shape = out.input_shape(k)
    if not out.shape or out.shape != shape[: len(out.shape)]:
        raise Unknown
    own = out.layout.moved([*range(len(out.shape)), *[None] * (len(shape) - len(out.shape))])
    return out.each(lambda j: own if j == k else None)


def sum_rows(kinds: Sequence[str], k: int) -> None:
    """Note that nodes of these kinds compute something of each row of input ``k``, and may return the sum."""
    for name in kinds:
        SUMMED[name], RULES[name] = k, rows_of_terms


def summed_edge(node: Node) -> int | None:
    """The edge of a node to the input of which it sums up what it computes of each row; ``None``: there is none."""
    return SUMMED.get(kind(node))


def input_layouts(node: Node, edges: Sequence[Any], layout: AnyLayout, number: int) -> list[AnyLayout | None]:
    """Where the samples lie in each input of a node's function, given the layout of its output ``number``.

    Raises:
        Unknown: Only a coded pass can tell.
    """
    if len(edges) == 1 and edges[0][0] is None:  # as a view has that was changed in place
        return [None]
    found = RULES.get(kind(node))
    if found is None or (found not in _FOR_SEVERAL_AXES and len(layout.axes) > 1):
        raise Unknown
    layouts = found(Output(node, edges, layout, number))
    if layouts is None or isinstance(layouts, AnyLayout):
        return [layouts] * len(edges)
    return [*layouts, *[None] * (len(edges) - len(layouts))]
