"""Products with curvature matrices that work after the backward pass, with the block of each parameter by itself.

They need a graph that outlives the backward pass: that of the forward pass, which is kept, or that of the modules that
were run again with functions that have second derivatives. Its nodes get copies of the parameters that they saved, so
that the curvature stays that at the weights of the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Size, Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import Module

from backpack.backward.collector import Prepared
from backpack.curvature.double_backward import DoubleBackwardPass, loss_gradients
from backpack.curvature.loss_term import PASSES
from backpack.curvature.masked_entries import keep_apart
from backpack.curvature.residual_graph import ResidualGraph
from backpack.curvature.residuals.local import vmap_or_loop
from backpack.curvature.spliced_graph import SplicedGraph
from backpack.graph import LEAF, copy_saved_parameters, count_outputs, forget_recomputed, shape_of, variable_of
from backpack.graph.users_hooks import observed, undisturbed
from backpack.graph.vmap_limits import nodes
from backpack.modules.thread_state import muted
from backpack.nodes import Place, use_of
from backpack.torch_internals import shape_at

Product = Callable[[Tensor], Tensor]


class Handle:
    """The functions of one backward pass share a handle: what they need is kept as long as one of them lives."""


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


class ProductPass(DoubleBackwardPass):
    """Stores functions on the parameters, for extensions that share a subset; their graph outlives the pass."""

    def run(self) -> None:
        """Store the functions; nothing is multiplied yet."""
        self.refuse_rules()
        given = self.subset.rows(self.n, self.device)
        rows, counts = (None, None) if given is None else given.unique(return_counts=True)
        self._switch_to_twice_differentiable(rows)
        self._keep_graph()
        chosen = None if self.chosen is None else rows
        weights = None if counts is None else counts.to(self.dtype)
        if weights is not None and rows is not None and chosen is None:
            weights = weights.new_zeros(self.prepared.n).index_copy(0, rows, weights)
        gradient, starts = partial(loss_gradients, self.terms, self.layouts, chosen, weights), self.start_tensors
        tensors: list[ref[Tensor] | Tensor] = [*map(ref, starts), *observed(self.prepared.graph)]
        curvature = CurvatureBlocks(self.spliced, self.prepared, starts, gradient, tensors)
        owner, handle, products = self._owner, Handle(), list[Product]()
        HELD.setdefault(owner, WeakKeyDictionary())[handle] = products
        for leaf in self.prepared.plan.expected:
            parameter = variable_of(leaf)
            for extension in self.extensions:
                self.block.store(parameter, extension.savefield, BlockProduct(handle, owner, len(products)))
                products.append(extension.product(curvature, parameter))

    def _keep_graph(self) -> None:
        """Make the graph outlive the backward pass, and stay the graph of the present parameters."""
        own = set(self.origin.prepared.graph.order)
        if any(node in own and node.name() != LEAF for node in self.spliced.nodes):
            self.block.keeps_graph = True
        # The gradients of the losses depend on the parameters through their inputs, in the graph as it was recorded.
        inputs = [get_gradient_edge(start) for start in self.start_tensors]
        copy_saved_parameters(list(dict.fromkeys([*self.spliced.nodes, *nodes(inputs)])))


@dataclass(eq=False)
class Entrance:
    """Where a parameter enters the graph: at itself, or at the only output that depends on it, linearly.

    ``change``: how what is there changes as the parameter moves along a vector.
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

    ``gradient``: the gradients of the losses at ``starts``, where the graph starts, or at any other values.

    If a parameter's gradient is a linear function of the gradient at an output, the latter is differentiated instead:
    what is linear in the parameters need not be differentiated twice, and all parameters share one graph of first
    derivatives.
    """

    spliced: SplicedGraph
    prepared: Prepared
    starts: Sequence[Tensor]
    gradient: Callable[[Sequence[Tensor]], list[Tensor]]
    tensors: list[ref[Tensor] | Tensor]
    modified: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.edges = self.spliced.starts
        self._pulled: dict[Any, dict[Any, Tensor]] = {}

    @cached_property
    def _of_hessian(self) -> list[Tensor]:
        """The gradients of the losses as functions of the parameters."""
        return self.gradient(self.starts)

    @cached_property
    def _of_ggn(self) -> tuple[list[Tensor], list[Tensor]]:
        """Points, and the gradients of the losses as functions of them."""
        points = [start.detach().requires_grad_() for start in self.starts]
        return points, self.gradient(points)

    def hessian(self, parameter: Tensor) -> Product:
        """The Hessian of the loss (Pearlmutter, 1994)."""
        cotangents = self._of_hessian

        def pull() -> tuple[Entrance, Tensor]:
            return self._pull(parameter, self.edges, cotangents)

        def product(vector: Tensor) -> Tensor:
            entrance, found = pull()
            (result,) = _grads(found, [parameter], entrance.change(vector))
            return torch.zeros_like(parameter) if result is None else _dense(result)

        return _of_one_or_several(product, pull, parameter, self.tensors)

    def ggn(self, parameter: Tensor) -> Product:
        """The generalized Gauss-Newton matrix (Schraudolph, 2002)."""
        return self._semidefinite(parameter, self.edges, [], [])

    def positive(self, parameter: Tensor, modify: Product) -> Product:
        """The sum of the GGN and, for every node, its residual with modified eigenvalues."""
        if modify not in self.modified:
            with muted():
                coupled = keep_apart(self.spliced, self.prepared)
            if coupled:
                raise RuntimeError(
                    f"{next(iter(coupled)).name()} couples samples in second order, although its values keep them "
                    f"apart: its second derivatives have no eigenvalues of one sample. Use the Hessian or the GGN."
                )
            graph = ResidualGraph(self.spliced, self.prepared)
            grads = [cotangent.detach() for cotangent in self._of_ggn[1]]
            with muted():
                found = [(residual.edges, residual.modified(modify)) for residual in graph.residuals(grads)]
            edges = [edge for own, _ in found for edge in own]
            zeros = [self.starts[0].new_zeros(shape_at(edge), requires_grad=True) for edge in edges]
            self.modified[modify] = [*self.edges, *edges], found, zeros
        return self._semidefinite(parameter, *self.modified[modify])

    def _semidefinite(
        self,
        parameter: Tensor,
        edges: Sequence[GradientEdge],
        residuals: list[tuple[list[GradientEdge], Any]],
        zeros: list[Tensor],
    ) -> Product:
        """The GGN plus ``J^T R J`` for each matrix ``R`` between the edges given with it.

        ``edges``: the loss's, and all of these; ``zeros``: at the latter.
        """
        points, cotangents = self._of_ggn

        def pull() -> tuple[Entrance, Tensor]:
            return self._pull(parameter, edges, [*cotangents, *zeros])

        def product(vector: Tensor) -> Tensor:
            entrance, found = pull()
            inputs = [*points, *zeros]
            grads = _grads(found, inputs, entrance.change(vector))
            pushed = [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)]
            seeds, rest = pushed[: len(points)], pushed[len(points) :]
            for own, multiply in residuals:
                seeds += multiply(rest[: len(own)])
                rest = rest[len(own) :]
            (result,) = self.spliced.grad(edges, [parameter], seeds)
            assert result is not None
            return _dense(result)

        return _of_one_or_several(product, pull, parameter, self.tensors)

    def _pull(
        self, parameter: Tensor, edges: Sequence[GradientEdge], cotangents: list[Tensor]
    ) -> tuple[Entrance, Tensor]:
        """Where a parameter enters, and the cotangents at the edges pulled back to there, as a function of them."""
        entrance = self._entrances.get(id(parameter))
        entrances = list(self._entrances.values())
        if entrance is None:
            entrance = Entrance(parameter, lambda vector: vector)
            entrances = [entrance]
        key = (*map(id, cotangents), None if isinstance(entrance.place, GradientEdge) else id(parameter))
        if key not in self._pulled:
            places = {own.key: own.place for own in entrances}
            with torch.enable_grad():
                found = self.spliced.grad(edges, list(places.values()), cotangents, create_graph=True)
            self._pulled[key] = {k: tensor for k, tensor in zip(places, found, strict=True) if tensor is not None}
        return entrance, self._pulled[key][entrance.key]

    @cached_property
    def _entrances(self) -> dict[int, Entrance]:
        return dict(self._outputs())

    def _outputs(self) -> Iterator[tuple[int, Entrance]]:
        """For parameters, the output that is linear in them, and through which alone the loss depends on them."""
        parts = self.spliced.parts
        if len(parts) > 1 or any(edge not in part.values() for part in parts for edge in self.edges):
            return  # what functions have kept leads to graphs that others replace
        plan, graph = self.prepared.plan, self.prepared.graph
        for node, uses in plan.uses.items():
            for planned in uses:
                if planned.leaf is None or not planned.is_alone or planned.number or planned.sent is not None:
                    continue
                if len({number for _, _, number in graph.incoming[node]}) > 1 or count_outputs(node) > 1:
                    continue
                leaf, parameter = planned.leaf, variable_of(planned.leaf)
                if len(graph.incoming[leaf]) > 1 or node._input_metadata[0].dtype != parameter.dtype:
                    continue
                use = use_of(Place(node, planned.k, 0, planned.layout))
                forward = None if use is None else use.forward()
                if forward is not None:
                    shape = torch.Size(shape_of(node, 0))
                    change = partial(_change, forward, shape, planned.turned)
                    yield id(parameter), Entrance(GradientEdge(node, 0), change)


def _change(forward: Callable[[Tensor, Size], Tensor], output: Size, turned: bool, vector: Tensor) -> Tensor:
    """How a node's output ``[*output]`` changes as its parameter, perhaps transposed, moves along a vector."""
    with torch.no_grad():
        return forward(vector.T if turned else vector, output)


def _grads(value: Tensor, inputs: Sequence[Tensor], vector: Tensor) -> Sequence[Tensor | None]:
    if not value.requires_grad:
        return [None] * len(inputs)
    return torch.autograd.grad(value, inputs, vector, retain_graph=True, allow_unused=True)


def _dense(gradient: Tensor) -> Tensor:
    """The gradient of a table may be sparse."""
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


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
        try:
            with muted(), undisturbed(tensors):
                prepare()
                if vector.shape == shape:
                    return product(vector)
                (products,) = vmap_or_loop(lambda one: (product(one),), [vector])
                return products
        finally:
            forget_recomputed()

    return multiply


PASSES["products"] = ProductPass
