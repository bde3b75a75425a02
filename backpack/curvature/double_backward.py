"""Passes that differentiate the model twice: over a graph of functions that all have second derivatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import Module

from backpack.curvature.loss_term import Term, modules_of
from backpack.curvature.nodes_without_vmap import is_reordered
from backpack.curvature.rerun import agree, output_of
from backpack.curvature.residuals.nodes import has_wrong_second, is_batch_norm, is_fused_node
from backpack.curvature.seeds import SeedPass
from backpack.curvature.spliced_graph import SplicedGraph, place_of
from backpack.graph import variable_of
from backpack.modules.calls import Note
from backpack.modules.thread_state import muted
from backpack.samples import AnyLayout, Subset
from backpack.torch_internals import pull_back, shape_at


def _dense_or_zero(grad: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if grad is None else grad.to_dense()


def loss_gradients(
    terms: Sequence[Term],
    layouts: Sequence[AnyLayout],
    chosen: Tensor | None,
    weights: Tensor | None,
    points: Sequence[Tensor],
) -> list[Tensor]:
    """The gradients of losses with respect to their inputs, as functions of these inputs.

    ``points``: the inputs of the ``chosen`` samples, ``None``: all; ``layouts``: where these samples lie in each;
    ``weights``: what the term of each sample is multiplied by, ``[n]``.
    """
    grads = []
    for term, layout, point in zip(terms, layouts, points, strict=True):
        call, axis = term.call, term.layout.axes[0] if chosen is not None else 0
        with torch.enable_grad(), muted():
            whole = point.to(call.input.dtype).view_as(point)  # behind the hooks of the model's output
            if chosen is not None:
                whole = call.input.detach().index_copy(axis, chosen, whole)
            grad = term.grad_at(whole, create_graph=True)
            grad = grad if chosen is None else grad.index_select(axis, chosen)
            if weights is not None:
                grad = grad * weights[layout.owners(grad.shape, weights.device)]
            grads.append(grad.to(point.dtype))
    return grads


class DoubleBackwardPass(SeedPass):
    """A pass that needs second derivatives of the model."""

    double_backward = True
    reads_all_uses = True
    chosen: Tensor | None = None
    """The samples that the graph holds, without duplicates; ``None``: all."""

    @property
    def _owner(self) -> Module:
        """A module whose call is part of the graph; a loss, if there is no other."""
        return next(modules_of(self.notes), self.terms[0].call.loss)

    def _switch_to_twice_differentiable(self, rows: Tensor | None) -> None:
        """Go over to a graph whose nodes all have second derivatives, if possible of the selected samples alone.

        Raises:
            RuntimeError: There is none.
        """
        rounded = self.spliced.has_autocast
        if rows is not None:
            chosen, places = rows.unique(return_inverse=True)
            if self._select(chosen, rounded):
                self.subset, self.chosen = Subset(places), chosen
                self._refuse_wrong()
                return
        needed = self._has_fused() or rounded
        # In some memory formats, second derivatives are slow or fail.
        if (needed or any(map(is_reordered, self.spliced.nodes))) and not self._rerun_modules(rounded) and needed:
            raise RuntimeError(
                f"{self._name}: the model has a fused attention or recurrent layer or a normalized weight, was run "
                f"under autocast, or has parts in 16 bits, of which PyTorch has no second derivatives or wrong ones, "
                f"and running it again in another form "
                f"was not possible or did not give the same output (as with dropout in training mode, or a state that "
                f"is kept from call to call). Run the forward pass inside the backpack(...) block and without "
                f"autocast, put the model into evaluation mode, or give it its state as an argument."
            )

        self._refuse_wrong()

    def _refuse_wrong(self) -> None:
        """Raise where a function is left whose second derivatives are wrong in PyTorch."""
        if has_wrong_second(self.spliced.nodes):
            raise RuntimeError(
                f"{self._name}: PyTorch's second derivatives of weight normalization are wrong, and a normalized "
                f"weight was computed outside of the modules' forward passes. Compute it in the forward pass, or "
                f"inside of backpack.hessianfree.TwiceDifferentiable()."
            )

    def _has_fused(self) -> bool:
        """Whether there are functions without second derivatives that can be replaced by others."""
        sends = self.prepared.owners.sends
        # Normalization of each sample by itself can be replaced, that of a batch cannot.
        return any(
            is_fused_node(node) or (is_batch_norm(node) and sends.get(node, [None])[0] is not None)
            for node in self.spliced.nodes
        )

    def _has_same_gradients(self, spliced: SplicedGraph, rounded: bool) -> bool:
        """Whether modules that ran again did the same, judging by gradients: an output may no longer be there."""
        parameters = [variable_of(leaf) for leaf in self.prepared.plan.expected]
        inputs, generator = [term.call.input for term in self.terms], torch.Generator().manual_seed(0)
        seeds = [torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z) for z in inputs]
        edges = [term.call.edge for term in self.terms]
        found, expected = spliced.grad(edges, parameters, seeds), pull_back(edges, parameters, seeds)
        size = max((float(grad.abs().max()) for grad in expected if grad is not None and grad.numel()), default=0.0)
        return all(
            agree(_dense_or_zero(new, p), _dense_or_zero(old, p), rounded, size)
            for new, old, p in zip(found, expected, parameters, strict=True)
        )

    def _rerun_modules(self, rounded: bool) -> bool:
        """Run all modules again, with functions that have second derivatives, if that gives the same outputs."""
        calls: dict[int, list[tuple[GradientEdge, Note]]] = {}
        for (node, number), note in self.notes.items():
            calls.setdefault(id(note.arguments), []).append((GradientEdge(node, number), note))
        if not calls:
            return False
        starts = [place_of(term.call.edge) for term in self.terms]
        start_tensors, parts, is_seen = list(self.start_tensors), [], True
        for outputs in sorted(calls.values(), key=lambda own: -max(edge.node._sequence_nr() for edge, _ in own)):
            again = self._run_again(outputs[0][1], None)
            part = {}
            for edge, note in outputs:
                places = [place for place, start in enumerate(starts) if start == edge]
                expected = self.terms[places[0]].call.input if places else note.value
                found = output_of(note, again)
                if found is None or found.shape != shape_at(edge):
                    return False
                if expected is not None and not agree(found, expected, rounded):
                    return False
                is_seen = is_seen and expected is not None
                part[edge] = place_of(get_gradient_edge(found))
                for place in places:
                    start_tensors[place] = found
            parts.append(part)
        spliced = SplicedGraph(starts, parts)
        if not is_seen and not self._has_same_gradients(spliced, rounded):
            return False
        self.start_tensors = start_tensors
        self._switch_to(spliced, self.layouts)
        return not (rounded and self.spliced.has_autocast)
