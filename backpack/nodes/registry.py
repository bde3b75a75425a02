"""Normal forms by kind of node. Nodes without one are used in the general form, which is always right."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch.autograd import Function
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from backpack.graph import kept, kind, saved, shape_of
from backpack.samples import AnyLayout
from backpack.samples.layout_rules import sum_rows
from backpack.uses import Use


class Place:
    """Edge ``k`` of a node: its output number ``number`` belongs to samples, and what the edge leads to does not."""

    def __init__(self, node: Node, k: int, number: int, layout: AnyLayout) -> None:
        self.node, self.k, self.number, self.layout = node, k, number, layout

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of what the edge leads to."""
        node, number = self.node.next_functions[self.k]
        assert node is not None
        return shape_of(node, number)

    @cached_property
    def out(self) -> tuple[int, ...]:
        """The shape of the output."""
        return shape_of(self.node, self.number)

    def saved(self, name: str) -> Any:
        """What the node saved under this name.

        Raises:
            RuntimeError: It was freed, or modified in place since.
        """
        return saved(self.node, name)

    def aligned(self, shape: tuple[int, ...] | None = None) -> tuple[int, ...] | None:
        """A shape that is expanded to the output, one size for each axis; ``None``: it is not 1 along samples' axes."""
        shape = self.shape if shape is None else shape
        own = (*[1] * (len(self.out) - len(shape)), *shape)
        return own if all(own[axis] == 1 for axis in self.layout.axes) else None

    def channels(self) -> tuple[int, ...]:
        """The shape of one number for each channel, axis 1, that is expanded to the output: one size for each axis."""
        return tuple(size if axis == 1 else 1 for axis, size in enumerate(self.out))


Form = Callable[[Place], "Use | None"]

FORMS: dict[str, Form] = {}


def form(*kinds: str | type[Function], rows_of: int | None = None) -> Callable[[Form], Form]:
    """Register a function that gives the normal form of these kinds of nodes, or ``None`` where there is none.

    A custom autograd function stands for its own kind. ``rows_of``: the function computes something of each row of
    this input, such as the terms of a loss, and may return the sum. Samples are then looked for in the rows of the
    input: ``layout`` of the ``Place`` says where they lie there.
    """

    def register(function: Form) -> Form:
        names = [name if isinstance(name, str) else name.__name__ for name in kinds]
        FORMS.update(dict.fromkeys(names, function))
        if rows_of is not None:
            sum_rows(names, rows_of)
        return function

    return register


def use_of(place: Place) -> Use | None:
    """The normal form of a use; ``None``: the general form is to be taken."""
    found = FORMS.get(kind(place.node))
    if found is None:
        return None
    if isinstance(place.node, BackwardCFunction):  # of which a form reads ``saved_tensors``
        with kept(place.node):
            return found(place)
    return found(place)
