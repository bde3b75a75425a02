"""Notes that calls of extended losses leave in the graph: the arguments of each call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Module
from torch.nn.modules.loss import _Loss

from backpack.graph import Edge, Graph, edge_of
from backpack.modules.calls import leaves_of
from backpack.modules.tensor_references import version_of

LOSS = "backpack loss"

WITH_ROOTS: set[type[Module]] = set()
"""Classes of losses for which there is a rule."""

WITH_HEADS: tuple[type[Module], ...] = tuple(filter(None, [getattr(torch.nn, "LinearCrossEntropyLoss", None)]))
"""The losses of PyTorch that have a linear layer in them; none in old versions."""

_losses: dict[type[Module], bool] = {}
"""Whether a class of modules is known as a loss, for classes that were asked for before."""


def is_known_loss(module: Module) -> bool:
    """Whether a module is one of PyTorch's losses, or there is a rule for its class."""
    cls = type(module)
    known = _losses.get(cls)
    if known is None:
        known = _losses[cls] = isinstance(module, _Loss) or not WITH_ROOTS.isdisjoint(cls.__mro__)
    return known


@dataclass(eq=False)
class LossCall:
    """One call of an extended loss."""

    loss: Module
    input: Tensor
    edge: GradientEdge
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_certain: bool = True
    """Otherwise it is a loss if the rest of the graph only reduces its output, a value for each row or position."""

    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    """Of a loss with a linear layer, tensors that it computed its value from, and how often they were written to."""

    def require_unchanged(self) -> None:
        """Raise if what the loss was computed from is not what it was.

        Raises:
            RuntimeError: A tensor was overwritten.
        """
        for tensor, version in self.versions:
            if version_of(tensor) != version:
                raise RuntimeError(
                    f"A tensor of shape {list(tensor.shape)} that {type(self.loss).__name__} was computed from was "
                    f"modified in place since: call backward() before the optimizer steps or the tensor is overwritten."
                )

    @property
    def further_arguments(self) -> list[Tensor]:
        """The tensors that the loss was called with, apart from its input."""
        return [leaf for leaf in leaves_of((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def depends_on_further_arguments(self) -> bool:
        """Whether the loss has a gradient with respect to more than its input."""
        return any(tensor.requires_grad for tensor in self.further_arguments)

    @property
    def place(self) -> Edge:
        """The edge of the input, as a key."""
        return edge_of(self.edge)


def leave_loss(loss: Module, args: Any, kwargs: Any, output: Tensor, is_certain: bool) -> None:
    """Leave a note of a loss's arguments at the node that computed its output."""
    kwargs = dict(kwargs)
    input, args = (args[0], args[1:]) if args else (kwargs.pop("input", None), args)
    if not isinstance(input, Tensor) or not input.requires_grad or output.grad_fn is None:
        return
    if not is_certain and not _is_by_rows(input, output):
        return
    node = input.grad_fn
    if node is output.grad_fn:  # handed through: a node must not hold itself
        return
    edge = get_gradient_edge(input) if node is None else GradientEdge(node, input.output_nr)
    metadata: Any = output.grad_fn.metadata
    within = metadata.get(LOSS)  # a loss inside of this one, which hands its value through
    if within is None or within[1].depends_on_further_arguments:
        call = LossCall(loss, input, edge, args, kwargs, is_certain)
        if isinstance(loss, WITH_HEADS):
            given = [input, *call.further_arguments, *loss.parameters()]
            call.versions = [(tensor, version_of(tensor)) for tensor in given]
        metadata[LOSS] = output.output_nr, call


def _is_by_rows(input: Tensor, output: Tensor) -> bool:
    """Whether there may be a value for each row: for each entry along the first axis, or along the first axes."""
    count = output.dim()
    return output.shape == input.shape[:count] and (count == 1 or count < input.dim())


def losses_in(graph: Graph) -> Iterator[tuple[Node, int, LossCall]]:
    """The calls of losses whose outputs are in a graph."""
    for node, left in graph.notes.items():
        if LOSS in left:
            yield node, *left[LOSS]
