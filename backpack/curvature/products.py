"""Products with curvature matrices that can be used after the backward pass, each parameter's block for itself.

They need a graph that outlives the backward pass: that of the forward pass where it is kept, else the model is run
once more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Size, Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import Module

from backpack.backward.collector import Prepared
from backpack.bystanders import forget_retained, observed, undisturbed
from backpack.compat import shape_at
from backpack.curvature.joined import Joined
from backpack.curvature.loss_call import PASSES
from backpack.curvature.residual_graph import ResidualGraph, has_autocast
from backpack.curvature.twice import LossGradient, TwicePass
from backpack.engine import muted
from backpack.graph import count_outputs, forget_recomputed, shape_of, variable_of
from backpack.nodes import Place, use_of

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


class ProductPass(TwicePass):
    """Leaves functions on the parameters, for extensions that share a subset, with a graph that outlives the pass."""

    def run(self) -> None:
        """Store the functions; nothing is multiplied yet."""
        self._refuse_rules()
        given = self.subset.rows(self.layout.n, self.loss.input.device)
        rows, counts = (None, None) if given is None else given.unique(return_counts=True)
        chosen = rows if self._take_lasting(rows) else None
        layout = self.prepared.begin[self.joined.start.node, self.joined.start.output_nr]
        weights = None if counts is None else counts.to(self.loss.input.dtype)
        if weights is not None and rows is not None and chosen is None:
            weights = weights.new_zeros(layout.n).index_copy(0, rows, weights)
        gradient = LossGradient(self.loss, self.outer, layout, chosen)
        tensors: list[ref[Tensor] | Tensor] = [ref(self.start_tensor), *observed(self.prepared.graph)]
        curvature = CurvatureBlocks(self.joined, self.prepared, self.start_tensor, partial(gradient, weights), tensors)
        module = next((module for note in self.notes.values() if (module := note.module()) is not None), None)
        owner, handle, products = self.loss.loss if module is None else module, Handle(), list[Product]()
        HELD.setdefault(owner, WeakKeyDictionary())[handle] = products
        for leaf in self.prepared.plan.expected:
            parameter = variable_of(leaf)
            for extension in self.extensions:
                self.block.store(parameter, extension.savefield, BlockProduct(handle, owner, len(products)))
                products.append(extension.product(curvature, parameter))

    def _take_lasting(self, rows: Tensor | None) -> bool:
        """Go over to a graph that outlives the backward pass; returns whether it is of these samples alone."""
        rounded = has_autocast(self.joined.nodes)
        if self._take_selected(rows, rounded):
            return True
        if self.origin.keeps_graph and not rounded and not self._has_fused() and not self._has_reordered():
            return False
        alone = len({id(note.arguments) for note in self.notes.values()}) == 1 and self.loss.place in self.notes
        if (alone or self.origin.keeps_graph) and self._join(rounded):
            return False
        raise RuntimeError(
            f"{self._name} needs a graph that outlives the backward pass, and running the model "
            f"again does not give the input of the loss (as with dropout in training mode, a state that is kept from "
            f"call to call, an output that is reshaped before the loss, or autocast in the model). Run the forward "
            f"pass inside the backpack(...) block and without autocast, and call backward(retain_graph=True)."
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

    ``gradient``: of the loss, at ``start``, where the graph starts, or at any other values.

    Of a gradient that is a linear function of those at an output, these are differentiated instead: what is linear in
    the parameters need not be differentiated twice, and all parameters share one graph of first derivatives.
    """

    joined: Joined
    prepared: Prepared
    start: Tensor
    gradient: Product
    tensors: list[ref[Tensor] | Tensor]
    modified: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.edge = self.joined.start
        self._pulled: dict[Any, dict[Any, Tensor]] = {}

    @cached_property
    def _of_hessian(self) -> Tensor:
        """The gradient of the loss as a function of the parameters."""
        return self.gradient(self.start)

    @cached_property
    def _of_ggn(self) -> tuple[Tensor, Tensor]:
        """A point, and the gradient of the loss as a function of it."""
        point = self.start.detach().requires_grad_()
        return point, self.gradient(point)

    def hessian(self, parameter: Tensor) -> Product:
        """Of the loss (Pearlmutter, 1994)."""
        cotangent = self._of_hessian

        def pull() -> tuple[Entrance, Tensor]:
            return self._pull(parameter, [self.edge], [cotangent])

        def product(vector: Tensor) -> Tensor:
            entrance, found = pull()
            (result,) = _grads(found, [parameter], entrance.change(vector))
            return torch.zeros_like(parameter) if result is None else result

        return _of_one_or_several(product, pull, parameter, self.tensors)

    def ggn(self, parameter: Tensor) -> Product:
        """The generalized Gauss-Newton matrix (Schraudolph, 2002)."""
        return self._semidefinite(parameter, [], [])

    def positive(self, parameter: Tensor, modify: Product) -> Product:
        """The GGN and, for every node, its residual with modified eigenvalues."""
        if modify not in self.modified:
            graph = ResidualGraph(self.joined, self.prepared, self.prepared.plan)
            with muted():
                found = [(r.edges, r.modified(modify)) for r in graph.residuals(self._of_ggn[1].detach())]
            edges = [edge for own, _ in found for edge in own]
            zeros = [self.start.new_zeros(shape_at(edge), requires_grad=True) for edge in edges]
            self.modified[modify] = found, zeros
        return self._semidefinite(parameter, *self.modified[modify])

    def _semidefinite(
        self, parameter: Tensor, residuals: list[tuple[list[GradientEdge], Any]], zeros: list[Tensor]
    ) -> Product:
        """The GGN and ``J^T R J`` for matrices ``R`` between the edges given with each; ``zeros``: at all these."""
        edges = [self.edge, *(edge for own, _ in residuals for edge in own)]
        point, cotangent = self._of_ggn

        def pull() -> tuple[Entrance, Tensor]:
            return self._pull(parameter, edges, [cotangent, *zeros])

        def product(vector: Tensor) -> Tensor:
            entrance, found = pull()
            inputs = [point, *zeros]
            grads = _grads(found, inputs, entrance.change(vector))
            pushed = [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)]
            seeds, rest = pushed[:1], pushed[1:]
            for own, multiply in residuals:
                seeds += multiply(rest[: len(own)])
                rest = rest[len(own) :]
            (result,) = self.joined.grad(edges, [parameter], seeds)
            assert result is not None
            return result

        return _of_one_or_several(product, pull, parameter, self.tensors)

    def _pull(self, parameter: Tensor, edges: list[GradientEdge], cotangents: list[Tensor]) -> tuple[Entrance, Tensor]:
        """Where a parameter enters, and the pull-back to there of cotangents at the edges, as a function of them."""
        entrance = self._entrances.get(id(parameter))
        entrances = list(self._entrances.values())
        if entrance is None:
            entrance = Entrance(parameter, lambda vector: vector)
            entrances = [entrance]
        key = (*map(id, cotangents), None if isinstance(entrance.place, GradientEdge) else id(parameter))
        if key not in self._pulled:
            places = {own.key: own.place for own in entrances}
            with torch.enable_grad():
                found = self.joined.grad(edges, list(places.values()), cotangents, create_graph=True)
            self._pulled[key] = {k: tensor for k, tensor in zip(places, found, strict=True) if tensor is not None}
        return entrance, self._pulled[key][entrance.key]

    @cached_property
    def _entrances(self) -> dict[int, Entrance]:
        return dict(self._outputs())

    def _outputs(self) -> Iterator[tuple[int, Entrance]]:
        """Of parameters: the output that all of the loss depends on them through, linear in them."""
        if len(self.joined.parts) > 1 or any(self.edge not in part.values() for part in self.joined.parts):
            return  # what functions have kept leads to graphs that others have taken the place of
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
    """That of a node's output ``[*output]``, as its parameter, perhaps transposed, moves along a vector."""
    with torch.no_grad():
        return forward(vector.T if turned else vector, output)


def _grads(value: Tensor, inputs: Sequence[Tensor], vector: Tensor) -> Sequence[Tensor | None]:
    if not value.requires_grad:
        return [None] * len(inputs)
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
        try:
            with muted(), undisturbed(tensors):
                prepare()
                return product(vector) if vector.shape == shape else several(vector)
        finally:
            forget_recomputed()

    def several(vectors: Tensor) -> Tensor:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                return torch.vmap(product)(vectors)
        except (RuntimeError, UserWarning):  # a derivative that cannot be batched
            forget_retained()
            return torch.stack([product(one) for one in vectors])

    return multiply


PASSES["products"] = ProductPass
