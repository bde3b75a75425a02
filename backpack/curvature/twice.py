"""Passes that differentiate the model twice: over a graph of functions that all have second derivatives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack.curvature.joined import Joined, place_of
from backpack.curvature.loss_call import LossCall
from backpack.curvature.pooling import is_reordered
from backpack.curvature.rerun import agree
from backpack.curvature.residual_graph import has_autocast
from backpack.curvature.residuals import is_batch_norm, is_fused_node
from backpack.curvature.seeds import SeedPass, fewer
from backpack.samples import AnyLayout, Subset
from backpack.samples.notes import Note


@dataclass(eq=False)
class LossGradient:
    """The gradient of a loss with respect to its input, as a function of this, of all samples or the ``chosen`` ones.

    ``layout``: where these samples lie.
    """

    loss: LossCall
    outer: Tensor
    layout: AnyLayout
    chosen: Tensor | None

    def __call__(self, weights: Tensor | None, point: Tensor) -> Tensor:
        """With the terms of the samples weighed by ``weights[n]``."""
        loss = self.loss
        with torch.enable_grad():
            whole = point.to(loss.input.dtype).view_as(point)  # behind the hooks of the model's output
            if self.chosen is not None:
                (axis,) = self.layout.axes
                whole = loss.input.detach().index_copy(axis, self.chosen, whole)
            value = loss.loss.forward(whole, *loss.args, **loss.kwargs)
            (found,) = torch.autograd.grad(value, whole, self.outer if value.dim() else None, create_graph=True)
            found = found if self.chosen is None else found.index_select(axis, self.chosen)
            if weights is not None:
                found = found * weights[self.layout.owners(found.shape, weights.device)]
            return found.to(point.dtype)


class TwicePass(SeedPass):
    """Second order with second derivatives of the model."""

    twice = True
    chosen: Tensor | None = None
    """The samples that the graph is of, without duplicates; ``None``: all."""

    def _refuse_rules(self) -> None:
        for extension in self.extensions:
            if extension.rules:
                raise RuntimeError(
                    f"{type(extension).__name__} takes no rules of users: none is needed for any module. Construct it "
                    f"without set_module_extension()."
                )

    @property
    def _name(self) -> str:
        return type(self.extensions[0]).__name__

    def _take_selected(self, rows: Tensor | None, rounded: bool) -> bool:
        """Go over to a graph of the selected samples alone, if there is one."""
        if rows is None:
            return False
        chosen, places = rows.unique(return_inverse=True)
        edge = self._rerun(chosen, rounded)
        if edge is None or (rounded and has_autocast(Joined(edge).nodes)):
            return False
        self.subset, self.selected, self.chosen = Subset(places), True, chosen
        self._go_over(Joined(edge), fewer(self.layout, len(chosen)))
        return True

    def _has_fused(self) -> bool:
        """Whether there are functions without second derivatives, but others that compute the same."""
        owners = self.prepared.owners

        def is_apart(node: Node) -> bool:
            sent = owners.sends.get(node)
            return sent is not None and sent[0] is not None

        return any(is_fused_node(node) or (is_batch_norm(node) and is_apart(node)) for node in self.joined.nodes)

    def _has_reordered(self) -> bool:
        """Whether some second derivatives are slow, or fail, for the memory format that a tensor has."""
        return any(map(is_reordered, self.joined.nodes))

    def _join(self, rounded: bool) -> bool:
        """Run all modules again, with functions that have second derivatives, if that gives the same outputs."""
        modules: dict[int, list[tuple[GradientEdge, Note]]] = {}
        for (node, number), note in self.notes.items():
            modules.setdefault(id(note.arguments), []).append((GradientEdge(node, number), note))
        start, parts = place_of(self.loss.edge), []
        if not modules:
            return False
        for outputs in sorted(modules.values(), key=lambda own: -max(edge.node._sequence_nr() for edge, _ in own)):
            again = self._run_again(outputs[0][1], None)
            part = {}
            for edge, note in outputs:
                expected = self.loss.input if edge == start else note.value
                found = None if again is None or note.place >= len(again) else again[note.place]
                if not isinstance(found, Tensor) or found.grad_fn is None or expected is None:
                    return False
                if not agree(found, expected, rounded):
                    return False
                part[edge] = place_of(get_gradient_edge(found))
                if edge == start:
                    self.start_tensor = found
            parts.append(part)
        self._go_over(Joined(self.loss.edge, parts), self.layout)
        return not (rounded and has_autocast(self.joined.nodes))
