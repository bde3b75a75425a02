"""Facts about nodes of the recorded graph, and calls of a node by itself.

A node computes the cotangents of a function's inputs from those of its outputs. Edge ``k`` of a node leads to the node
that computed input ``k``; ``None``: no gradient flows there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from backpack.graph.saved import kept

LEAF = "torch::autograd::AccumulateGrad"


@cache
def _kind(name: str) -> str:
    return re.sub(r"Backward\d*(_copy)?$", "", name)


def kind(node: Node) -> str:
    """The name of the function whose node it is, such as ``Addmm``; the node of a derivative is ``TanhBackward``."""
    return _kind(node.name())


def variable_of(leaf: Node) -> Tensor:
    """The tensor whose gradient a leaf's node accumulates."""
    return leaf.variable  # type: ignore[attr-defined]


_VIEWS = """
Alias Detach Expand Permute ReshapeAlias Select Slice Split SplitWithSizes Squeeze T Transpose Unbind UnsafeSplit
UnsafeView Unsqueeze View
"""
VIEWS = frozenset(_VIEWS.split())
"""Kinds of nodes that compute nothing: they return a tensor, or a part of it, in another form."""


def signed(number: int) -> int:
    """A number that a node saved: negative numbers are read from nodes as large positive ones."""
    return number - 2**64 if number >= 2**63 else number


def count_outputs(node: Node) -> int:
    """How many outputs the function has whose node it is."""
    return len(node._input_metadata)


def shape_of(node: Node, number: int) -> tuple[int, ...]:
    """The shape of output ``number`` of the function whose node it is."""
    if node.name() == LEAF:
        return tuple(variable_of(node).shape)
    return tuple(node._input_metadata[number].shape)


def dtype_of(node: Node, number: int) -> torch.dtype:
    """The data type of output ``number`` of the function whose node it is."""
    return variable_of(node).dtype if node.name() == LEAF else node._input_metadata[number].dtype


def is_complex(node: Node) -> bool:
    """Whether a function takes or returns complex numbers."""
    edges = [(node, number) for number in range(count_outputs(node))]
    edges += [(other, number) for other, number in node.next_functions if other is not None]
    return any(dtype_of(*edge).is_complex for edge in edges)


def call(node: Node, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The cotangents that a node sends along each of its edges, given one for each output of its function.

    They have the shapes and data types of what the edges lead to. No hook runs.
    """
    if isinstance(node, BackwardCFunction):
        given = [full_of(node, k, 0) if grad is None else grad for k, grad in enumerate(cotangents)]
        with kept(node):
            found: Any = node.apply(*given)
        found = found if isinstance(found, tuple) else (found,)
        needed = (grad for grad, is_needed in zip(found, node.needs_input_grad, strict=False) if is_needed)
        results = [None if other is None else next(needed, None) for other, _ in node.next_functions]
    else:
        with kept(node):
            found = node(*cotangents)  # type: ignore[operator]
        results = list(found) if isinstance(found, tuple) else [found]
    return [
        None if grad is None or other is None else _fitted(grad, other, number)
        for grad, (other, number) in zip(results, node.next_functions, strict=False)
    ]


def full_of(node: Node, number: int, value: float) -> Tensor:
    """A tensor of one value, like output ``number`` of the function whose node it is."""
    metadata = node._input_metadata[number]
    return torch.full(tuple(metadata.shape), value, dtype=metadata.dtype, device=metadata.device)


def _fitted(grad: Tensor, node: Node, number: int) -> Tensor:
    """A cotangent in the form that the engine of autograd would give it."""
    metadata = node._input_metadata[number]
    if grad.layout != torch.strided:
        grad = grad.to_dense()
    if grad.is_complex() and not metadata.dtype.is_complex:
        grad = grad.real
    if grad.dtype != metadata.dtype:
        grad = grad.to(metadata.dtype)
    shape = metadata.shape
    return grad if list(grad.shape) == list(shape) else grad.sum_to_size(shape)
