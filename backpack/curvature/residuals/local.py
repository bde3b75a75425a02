"""Products with the second derivatives of one node, by PyTorch's own derivative of its backward function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from backpack.graph.users_hooks import forget_retained
from backpack.torch_internals import dtype_at, shape_at


def vmap_or_loop(function: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor]) -> list[Tensor]:
    """``torch.vmap(function)(*tensors)``, or a loop if the function takes a derivative that cannot be batched."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return list(torch.vmap(function)(*tensors))
    except (RuntimeError, UserWarning):
        forget_retained()
        rows = [function(*one) for one in zip(*tensors, strict=True)]
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]


class Severed:
    """Context in which no gradient flows beyond these edges, although it arrives at them.

    One input of a node may be computed from another (``x * sigmoid(x)``): derivatives of the node itself must not
    go that way.
    """

    def __init__(self, edges: Sequence[GradientEdge]) -> None:
        self._nodes = {edge.node for edge in edges}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        try:
            for node in self._nodes:
                self._handles.append(node.register_prehook(_nothing))
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()


def _nothing(grads: tuple[Tensor | None, ...]) -> tuple[None, ...]:
    return (None,) * len(grads)  # not zeros, which would be computed with from there on


class LocalHessian:
    """The Hessian of ``sum_k <g_k, output_k>`` with respect to the inputs of a node at ``edges``.

    Raises:
        RuntimeError: PyTorch has no second derivative of the node.
    """

    def __init__(self, node: Node, edges: Sequence[GradientEdge], grads: dict[int, Tensor]) -> None:
        self.node, self.edges = node, list(edges)
        outputs = [GradientEdge(node, number) for number in grads]
        try:
            with torch.enable_grad(), Severed(edges):
                found = torch.autograd.grad(
                    outputs,
                    self.edges,
                    [grad.detach() for grad in grads.values()],
                    create_graph=True,
                    retain_graph=True,
                    allow_unused=True,
                )
        except RuntimeError as error:
            raise self._explained(error) from error
        self._first = [(k, grad) for k, grad in enumerate(found) if grad is not None and grad.requires_grad]

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor | None]:
        """The Hessian times a vector, given by its parts at the edges; ``None`` is zero whatever the vector is."""
        if not self._first:
            return [None] * len(self.edges)
        try:
            with Severed(self.edges):
                return list(
                    torch.autograd.grad(
                        [grad for _, grad in self._first],
                        self.edges,
                        [vectors[k] for k, _ in self._first],
                        retain_graph=True,
                        allow_unused=True,
                    )
                )
        except RuntimeError as error:
            if "not require grad" in str(error):
                return [None] * len(self.edges)
            raise self._explained(error) from error

    def is_zero(self) -> bool:
        """Whether the Hessian is zero whatever the values are."""
        if not self._first:
            return True
        grads = dict(self._first)
        like = self._first[0][1]
        zeros = [grads.get(k, like).new_zeros(shape_at(edge)) for k, edge in enumerate(self.edges)]
        return all(part is None for part in self.product(zeros))

    def products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Times several vectors ``[v, ...]``, in any precision."""
        vectors = [vector.to(dtype_at(edge)) for vector, edge in zip(vectors, self.edges, strict=True)]

        def product(*one: Tensor) -> tuple[Tensor, ...]:
            found = self.product(one)
            return tuple(torch.zeros_like(o) if f is None else f for o, f in zip(one, found, strict=True))

        try:
            return vmap_or_loop(product, vectors)
        finally:
            forget_retained()

    def _explained(self, error: RuntimeError) -> RuntimeError:
        return RuntimeError(
            f"The Hessian needs the second derivatives of {self.node.name()}, which PyTorch does not give ({error}). "
            f"Use another function there, or an extension of the Gauss-Newton matrix, which does not need them."
        )
