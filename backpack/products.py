"""Products with curvature matrices that can be used after the backward pass, each parameter's block for itself.

They need a graph that outlives the backward pass: that of the forward pass where it is kept, else the model is run
once more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Size, Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Module

from backpack.bystanders import forget_retained, undisturbed
from backpack.compat import dtype_at, graph_is_kept, shape_at
from backpack.engine import muted
from backpack.graph import Graph, following, has_autocast
from backpack.hessian import HessianPass
from backpack.joined import Joined, place_of
from backpack.looped import edges_from, nodes
from backpack.losses.functional import hessian_product
from backpack.recorder import call_at
from backpack.samples import Layout
from backpack.seeds import PASSES, bystanders, origins, targets

Product = Callable[[Tensor], Tensor]


class Handle:
    """What the functions of one backward pass share: what they need is kept as long as one of them lives."""


HELD: WeakKeyDictionary[Module, WeakKeyDictionary[Handle, list[Product]]] = WeakKeyDictionary()
"""What the functions need, by the module whose graph they hold.

The graph leads to the parameters, through references that the garbage collector does not see: a function on a parameter
that held the graph itself would never be freed.
"""


class BlockProduct:
    """The function on a parameter."""

    def __init__(self, handle: Handle, owner: Module, place: int) -> None:
        self._handle, self._owner, self._place = handle, ref(owner), place

    def __call__(self, vector: Tensor) -> Tensor:
        """Multiply ``[*p]``, or several ``[V, *p]``.

        Raises:
            RuntimeError: The model is gone.
            ValueError: ``vector`` has another shape.
        """
        owner = self._owner()
        if owner is None:
            raise RuntimeError(
                "The model that this function multiplies with the curvature of has been deleted, and its graph with "
                "it. Keep a reference to the model as long as its functions are used."
            )
        return HELD[owner][self._handle][self._place](vector)


@dataclass(eq=False)
class ProductPass(HessianPass):
    """Leaves functions on the parameters, for extensions that share a subset."""

    extensions: list[Any]

    def run(self) -> None:
        """Store the functions; nothing is multiplied yet."""
        self._refuse_rules()
        loss, rows, counts = self.loss, None, None
        given = self.extensions[0].subset.rows(self.layout.n, loss.input.device)
        if given is not None:
            rows, counts = given.unique(return_counts=True)
        chosen = rows if self._take_lasting(rows) else None
        layout = self.layout if chosen is None else Layout(len(chosen), self.layout.axis)
        axis = layout.axis
        shape, dtype = list(loss.input.shape), loss.input.dtype
        weight = loss.input.new_ones(())
        if rows is not None and counts is not None:
            weight = counts.to(loss.input.dtype)
            if chosen is None:
                weight = weight.new_zeros(layout.n).index_copy(0, rows, weight)
            weight = weight[layout.owners(shape, weight.device)]
        whole = hessian_product(loss.loss, loss.input, loss.args, loss.kwargs, self.outer)

        def multiply(vector: Tensor) -> Tensor:
            if chosen is None:
                return whole(vector.to(dtype)) * weight
            embedded = vector.new_zeros(shape, dtype=dtype).index_copy(axis, chosen, vector.to(dtype))
            return whole(embedded).index_select(axis, chosen) * weight

        grad = self._place(loss.grad(self.layout, self.outer)[None], None, chosen)[0].detach() * weight
        grad = grad.to(dtype_at(self.joined.start))
        curvature = CurvatureBlocks(self.joined, layout, grad, multiply, list(bystanders(self.found)))
        module = self.found[0][1].root()
        owner, handle, products = loss.loss if module is None else module, Handle(), list[Product]()
        HELD.setdefault(owner, WeakKeyDictionary())[handle] = products
        for parameter in self._parameters():
            for extension in self.extensions:
                self.block.store(parameter, extension.savefield, BlockProduct(handle, owner, len(products)))
                products.append(extension.product(curvature, parameter))

    def _parameters(self) -> list[Tensor]:
        """Those that the loss's input may depend on."""
        return list({id(p): p for call in self._calls() for source in call.sources for p in source.parameters}.values())

    def _take_lasting(self, rows: Tensor | None) -> bool:
        """Go over to a graph that outlives the backward pass; returns whether it is of these samples alone."""
        rounded = has_autocast(self.loss.edge)
        edge = None if rows is None else self._rerun(rows, rounded)
        if edge is not None and not (rounded and has_autocast(edge)):
            self.joined, self.found = Joined(edge), list(origins(edge))
            return True
        if graph_is_kept() and not rounded and not self._has_fused():
            return False
        alone = len({id(origin.calls) for _, origin in self.found}) == 1 and self.loss.edge == self.found[0][0]
        if (alone or graph_is_kept()) and self._join(rounded):
            return False
        raise RuntimeError(
            f"{type(self.extensions[0]).__name__} needs a graph that outlives the backward pass, and running the model "
            f"again does not give the input of the loss (as with dropout in training mode, where the output is "
            f"reshaped before the loss, or where the model itself uses autocast). Run the forward pass inside the "
            f"backpack(...) block and without autocast, and call backward(retain_graph=True)."
        )


@dataclass(eq=False)
class Entrance:
    """Where a parameter enters the graph: itself, or the only output that it has a part in and that is linear in it.

    ``change``: of what is there, as the parameter moves along a vector.
    """

    place: Tensor | GradientEdge
    change: Product

    @property
    def key(self) -> Any:
        """Equal for the same place."""
        return id(self.place) if isinstance(self.place, Tensor) else self.place


@dataclass(eq=False)
class CurvatureBlocks:
    """Multiplies with blocks of the Hessian, of the GGN, and of the GGN with a part of the residuals.

    ``grad``: of the loss where the graph starts; ``of_loss`` multiplies with the Hessian of the loss there.

    Second derivatives are taken between the loss and where a parameter enters the graph: what is linear in it need not
    be differentiated twice, and parameters of one call share the graph of the first derivatives.
    """

    joined: Joined
    layout: Layout
    grad: Tensor
    of_loss: Product
    tensors: list[ref[Tensor] | Tensor]
    modified: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.edge = self.joined.start
        self._entrances = dict(self._outputs())
        self._pulled: dict[Any, tuple[dict[Any, Tensor], list[Tensor]]] = {}

    def hessian(self, parameter: Tensor) -> Product:
        """Of the loss (Pearlmutter, 1994)."""
        entrance = self._entrance(parameter)

        def product(vector: Tensor) -> Tensor:
            found, (cotangent,) = self._pull([self.edge], entrance)
            residual, pushed = _grads(found, [entrance.place, cotangent], entrance.change(vector))
            seeds = [self.of_loss(torch.zeros_like(cotangent) if pushed is None else pushed)]
            return self._push(parameter, entrance, [self.edge], seeds, residual)

        return _of_one_or_several(product, lambda: self._pull([self.edge], entrance), parameter, self.tensors)

    def ggn(self, parameter: Tensor) -> Product:
        """The generalized Gauss-Newton matrix (Schraudolph, 2002)."""
        return self._semidefinite(parameter, [])

    def positive(self, parameter: Tensor, modify: Product) -> Product:
        """The GGN and, for every node, its residual with modified eigenvalues."""
        if modify not in self.modified:
            graph = Graph(self.joined, targets(self.edge, self.joined.instead), self.layout)
            with muted():
                found = [(residual.edges, residual.modified(modify)) for residual in graph.residuals(self.grad)]
            self.modified[modify] = found
        return self._semidefinite(parameter, self.modified[modify])

    def _semidefinite(self, parameter: Tensor, residuals: list[tuple[list[GradientEdge], Any]]) -> Product:
        """The GGN, and ``J^T R J`` for symmetric ``R`` between the edges given with each."""
        entrance = self._entrance(parameter)
        edges = [self.edge, *(edge for own, _ in residuals for edge in own)]

        def product(vector: Tensor) -> Tensor:
            found, cotangents = self._pull(edges, entrance)
            grads = _grads(found, cotangents, entrance.change(vector))
            pushed = [torch.zeros_like(c) if g is None else g for c, g in zip(cotangents, grads, strict=True)]
            seeds, rest = [self.of_loss(pushed[0])], pushed[1:]
            for own, multiply in residuals:
                seeds += multiply(rest[: len(own)])
                rest = rest[len(own) :]
            return self._push(parameter, entrance, edges, seeds, None)

        return _of_one_or_several(product, lambda: self._pull(edges, entrance), parameter, self.tensors)

    def _entrance(self, parameter: Tensor) -> Entrance:
        """Where second derivatives end."""
        return self._entrances.get(id(parameter)) or Entrance(parameter, lambda vector: vector)

    def _outputs(self) -> Iterator[tuple[int, Entrance]]:
        """Of parameters: the output that all of the loss depends on them through, linear in them."""
        if len(self.joined.parts) > 1 or any(self.edge not in part.values() for part in self.joined.parts):
            return  # what functions have kept leads to graphs that others have taken the place of
        incoming: dict[Node, list[GradientEdge]] = {}
        before: dict[Node, list[Node]] = {}
        for node in nodes(self.edge):
            for edge in following(node):
                incoming.setdefault(edge.node, []).append(edge)
                before.setdefault(edge.node, []).append(node)
        for edge in edges_from(self.edge):
            call = call_at(edge)
            if call is None or call.outputs > 1 or any(other != edge for other in incoming.get(edge.node, ())):
                continue
            for source, use in call.uses:
                parameter, forward = source.tensor, use.forward()
                node = get_gradient_edge(parameter).node
                while node != edge.node and len(before.get(node, ())) == 1:
                    (node,) = before[node]
                if (
                    forward is not None
                    and node == edge.node
                    and dtype_at(edge) == parameter.dtype
                    and parameter.is_leaf
                ):
                    yield id(parameter), Entrance(edge, partial(_change, forward, call.shape, shape_at(edge)))

    def _pull(self, edges: list[GradientEdge], entrance: Entrance) -> tuple[Tensor, list[Tensor]]:
        """The pull-back of cotangents at the edges to an entrance, and these: the first one is the loss's gradient."""
        shared = isinstance(entrance.place, GradientEdge)
        key = (*map(place_of, edges), None if shared else entrance.key)
        if key not in self._pulled:
            entrances = {own.key: own for own in self._entrances.values()} if shared else {entrance.key: entrance}
            zeros = [self.grad.new_zeros(shape_at(edge)) for edge in edges[1:]]
            with torch.enable_grad():
                cotangents = [cotangent.detach().requires_grad_() for cotangent in (self.grad, *zeros)]
                places = [own.place for own in entrances.values()]
                found = self.joined.grad(edges, places, cotangents, create_graph=True)
            known = {key: tensor for key, tensor in zip(entrances, found, strict=True) if tensor is not None}
            self._pulled[key] = known, cotangents
        known, cotangents = self._pulled[key]
        return known[entrance.key], cotangents

    def _push(
        self,
        parameter: Tensor,
        entrance: Entrance,
        edges: list[GradientEdge],
        seeds: list[Tensor],
        residual: Tensor | None,
    ) -> Tensor:
        """The gradient of a parameter, from seeds at the edges and the gradient at its entrance beside them."""
        if residual is not None and isinstance(entrance.place, GradientEdge):
            edges, seeds, residual = [*edges, entrance.place], [*seeds, residual], None
        (found,) = self.joined.grad(edges, [parameter], seeds)
        assert found is not None
        return found if residual is None else found + residual


def _change(forward: Callable[[Tensor, Size], Tensor], output: Size, shape: Size, vector: Tensor) -> Tensor:
    """That of a call's output ``[*output]``, in the shape of what it is a view of."""
    with torch.no_grad():
        return forward(vector, output).reshape(shape)


def _grads(value: Tensor, inputs: Sequence[Any], vector: Tensor) -> Sequence[Tensor | None]:
    return torch.autograd.grad(value, inputs, vector, retain_graph=True, allow_unused=True)


def _of_one_or_several(
    product: Product, prepare: Callable[[], Any], parameter: Tensor, tensors: list[ref[Tensor] | Tensor]
) -> Product:
    """A function of ``[*p]`` or ``[V, *p]``; ``prepare`` does what must not happen inside of ``torch.vmap``."""

    def multiply(vector: Tensor) -> Tensor:
        shape = parameter.shape
        if vector.shape != shape and vector.shape[1:] != shape:
            raise ValueError(
                f"The product takes a vector of the parameter's shape {list(shape)}, or several of them stacked, "
                f"{['V', *shape]}; got {list(vector.shape)}."
            )
        with muted(), undisturbed(tensors):
            prepare()
            if vector.shape == shape:
                return product(vector)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    return torch.vmap(product)(vector)
            except (RuntimeError, UserWarning):  # a derivative that cannot be batched
                forget_retained()
                return torch.stack([product(one) for one in vector])

    return multiply


PASSES["products"] = ProductPass
