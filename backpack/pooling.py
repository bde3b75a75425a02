"""Max pooling, for several seeds at a time.

``torch.vmap`` copies the input of a pooling layer and the places of its maxima for each seed, which takes two thirds of
the time of their pull-back. Here seeds take turns, each into its place of the result. A node's function cannot be
replaced; it is given a single zero, and its result is replaced where it arrives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.compat import inside_vmap, is_mapped, is_packed, outside_vmap
from backpack.looped import Instead, nodes
from backpack.memory import empty
from backpack.recorder import call_at, is_start

NAME = "MaxPool2DWithIndicesBackward0"
"""Of what pools in one dimension as well."""

SMALL = 2**15
"""Entries of a layer's input up to which copies take less time than turns."""


def pooling_nodes(edge: GradientEdge, instead: Instead | None = None) -> list[Node]:
    """Nodes of a graph that can be treated so: where they lead to, nothing else arrives, and nobody looks at it."""
    graph = list(nodes(edge, instead))
    found = [node for node in graph if node.name() == NAME and _is_large(node)]
    arriving = Counter(following for node in graph if found for following in node.next_functions)
    return [node for node in found if arriving[node.next_functions[0]] == 1 and not _is_observed(_below(node))]


@contextmanager
def pooled(nodes: Iterable[Node], count: int, ends: Iterable[GradientEdge]) -> Iterator[None]:
    """Pull-backs of ``count`` seeds under ``torch.vmap``, between these edges, by turns at these nodes."""
    taken = {(end.node, end.output_nr) for end in ends}
    with ExitStack() as handles:
        for node in nodes:
            below = _below(node)
            if (below.node, below.output_nr) not in taken:
                results: list[Tensor] = []
                handles.callback(node.register_prehook(partial(_pull, node, results, count)).remove)
                handles.callback(below.node.register_prehook(partial(_replace, below.output_nr, results)).remove)
        yield


def _is_large(node: Any) -> bool:
    """Whether turns pay; what is packed, as by checkpointing, is not unpacked to see."""
    if is_packed(node._raw_saved_self):
        return False
    return node._saved_self.numel() > SMALL and node._saved_self.is_contiguous()


def _below(node: Node) -> GradientEdge:
    """To the input of a pooling layer."""
    (below, number), *_ = node.next_functions
    assert below is not None
    return GradientEdge(below, number)


def _is_observed(edge: GradientEdge) -> bool:
    """Whether what arrives at an edge is read by hooks of its tensor, which run first."""
    return is_start(edge) or call_at(edge) is not None


def _pull(node: Any, results: list[Tensor], count: int, grads: tuple[Tensor | None, ...]) -> Any:
    """Pull cotangents back, and leave a zero to the node itself."""
    grad, x = grads[0], node._saved_self
    if grad is None or not is_mapped(grad):
        return None
    with outside_vmap(grad, count) as seeds:
        sizes = (node._saved_kernel_size, node._saved_stride, node._saved_padding, node._saved_dilation)
        found = empty((count, *x.shape), seeds)
        for seed, out in zip(seeds, found, strict=True):
            torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
                seed, x, *sizes, node._saved_ceil_mode, node._saved_result1, grad_input=out
            )
        zero = seeds.new_zeros(()).expand(seeds.shape[1:])
    results.append(inside_vmap(found, grad))
    return (zero, *grads[1:])


def _replace(number: int, results: list[Tensor], grads: tuple[Tensor | None, ...]) -> Any:
    """What was pulled back, in the place of the zeros."""
    return (*grads[:number], results.pop(), *grads[number + 1 :]) if results else None
