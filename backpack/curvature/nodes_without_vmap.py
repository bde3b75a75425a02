"""Nodes that seeds go through one by one, since ``torch.vmap`` is slow there or fails.

Max pooling: ``torch.vmap`` copies the input of a pooling layer and the places of its maxima for each seed, which takes
two thirds of the time of their pull-back. Here seeds take turns, each into its place of the result. A ReLU whose output
is pooled passes on what is selected where that is positive, of which there is less than of its entries.

Group normalization of tensors in another memory format than the contiguous one: ``torch.vmap`` fails.

A node's function cannot be replaced; it is given a single zero, and its result is replaced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.graph import call
from backpack.graph.vmap_limits import Instead
from backpack.memory import empty
from backpack.torch_internals import inside_vmap, is_mapped, is_packed, outside_vmap

NAME = "MaxPool2DWithIndicesBackward0"
"""The node of max pooling in two dimensions, and in one."""

SMALL = 2**15
"""Entries of a layer's input up to which copies take less time than turns."""


@dataclass(eq=False)
class Turns:
    """A node with one output that is used, and which several seeds go through one by one."""

    node: Any

    def attach(self, handles: ExitStack, count: int, taken: set[GradientEdge]) -> None:
        """Pull back ``count`` seeds. ``taken``: edges at which others start or end."""
        last = self._last(taken)
        results: list[Tensor] = []
        handles.callback(self.node.register_prehook(partial(self._pull, results, count, last)).remove)
        handles.callback(last.register_hook(partial(_replace, results)).remove)

    def _last(self, taken: set[GradientEdge]) -> Node:
        """The node whose result is replaced."""
        return self.node

    def _pull(self, results: list[Tensor], count: int, last: Node, grads: tuple[Tensor | None, ...]) -> Any:
        """Pull cotangents back, and leave a zero to the nodes themselves."""
        grad, *others = grads
        if grad is None or not is_mapped(grad):
            return None
        with outside_vmap([grad], count) as (seeds,):
            zero = seeds.new_zeros(()).expand(seeds.shape[1:])
            found = self._pulled_back(seeds, others, last)
        results.append(inside_vmap(found, grad))
        return (zero, *others)

    def _pulled_back(self, seeds: Tensor, others: Sequence[Tensor | None], last: Node) -> Tensor:
        """What the last node returns for seeds ``[v, ...]``, given what arrives at the other outputs."""
        rows = [call(self.node, [seed, *others])[0] for seed in seeds]
        return torch.stack([row for row in rows if row is not None])


@dataclass(eq=False)
class Pooling(Turns):
    """A node of max pooling, and the edges from it to the ReLU whose output it pools; none where there is no such."""

    below: list[GradientEdge]

    def _last(self, taken: set[GradientEdge]) -> Node:
        return self.below[-1].node if self.below and taken.isdisjoint(self.below) else self.node

    def _pulled_back(self, seeds: Tensor, others: Sequence[Tensor | None], last: Node) -> Tensor:
        node = self.node
        x, places = node._saved_self, node._saved_result1
        sizes = (node._saved_kernel_size, node._saved_stride, node._saved_padding, node._saved_dilation)
        if last is not node:
            selected = x.flatten(-2).gather(-1, places.flatten(-2)).reshape(places.shape)
            seeds = torch.ops.aten.threshold_backward(seeds, selected, 0)
        found = empty((len(seeds), *x.shape), seeds)
        for seed, out in zip(seeds, found, strict=True):
            torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
                seed, x, *sizes, node._saved_ceil_mode, places, grad_input=out
            )
        return found


def _replace(results: list[Tensor], grads: tuple[Tensor, ...], _: Any) -> Any:
    """Put what was pulled back in the place of the zeros."""
    return (results.pop().reshape(grads[0].shape), *grads[1:]) if results else None


def poolings(graph: Sequence[Node], instead: Instead) -> list[Pooling]:
    """The nodes of max pooling in a graph in which others take the place of some edges."""
    found = [node for node in graph if node.name() == NAME and _is_large(node)]
    if not found:
        return []
    arriving = Counter(following for node in graph for following in node.next_functions)
    return [Pooling(node, _below(node, arriving, instead)) for node in found]


def turns(graph: Sequence[Node]) -> list[Turns]:
    """Those nodes of a graph that normalize groups in an order for which ``torch.vmap`` fails."""
    return [Turns(node) for node in graph if is_reordered(node)]


def is_reordered(node: Any) -> bool:
    """Whether a node normalizes groups in another memory format than the contiguous one."""
    if node.name() != "NativeGroupNormBackward0" or is_packed(node._raw_saved_input):
        return False
    return not node._saved_input.is_contiguous()


@contextmanager
def by_turns(found: Iterable[Turns], count: int, ends: Iterable[GradientEdge]) -> Iterator[None]:
    """Inside, ``count`` seeds that are pulled back under ``torch.vmap`` go through these nodes one by one.

    ``ends``: the edges at which the pull-back starts and ends.
    """
    taken = {GradientEdge(end.node, end.output_nr) for end in ends}
    with ExitStack() as handles:
        for node in found:
            node.attach(handles, count, taken)
        yield


def _is_large(node: Any) -> bool:
    """Whether turns pay off. A tensor that is packed, as by checkpointing, is not unpacked to find out."""
    if is_packed(node._raw_saved_self):
        return False
    return node._saved_self.numel() > SMALL and node._saved_self.is_contiguous()


def _below(node: Node, arriving: Counter[Any], instead: Instead) -> list[GradientEdge]:
    """The edges to a ReLU, if nothing else uses its output, and nobody looks at it."""
    found: list[GradientEdge] = []
    while True:
        following, number = node.next_functions[0]
        if following is None or arriving[following, number] > 1:
            return []
        edge = GradientEdge(following, number)
        if edge in instead:
            return []
        found.append(edge)
        node = following
        if node.name() == "ReluBackward0":
            return found
        if node.name() != "UnsqueezeBackward0":  # as pooling in one dimension has
            return []
