"""Sends columns through a graph: they reach the uses of parameters as cotangents do in first order.

Several columns go together under ``torch.vmap``, along one more axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.backward.arrivals import Contributions
from backpack.backward.collector import Collector
from backpack.backward.mixed_regions import place_in, pull_through
from backpack.curvature.nodes_without_vmap import by_turns
from backpack.curvature.spliced_graph import SplicedGraph, arrivals_at
from backpack.graph import count_outputs, kind, saved, variable_of
from backpack.graph.users_hooks import forget_retained
from backpack.modules.thread_state import HERE, muted
from backpack.torch_internals import outside_vmap, vmap
from backpack.uses import Cotangents, Derived, Explicit, Individual, Parts

if TYPE_CHECKING:
    from backpack.curvature.seeds import SeedPass


class Columns(Collector):
    """Collects what reaches the parameters when some columns are pulled back together.

    ``keeps``: what has arrived is kept until all columns have been pulled back.
    """

    def __init__(self, seed_pass: SeedPass, spliced: SplicedGraph, further: Sequence[GradientEdge] = ()) -> None:
        super().__init__(seed_pass.prepared)
        self.seed_pass, self.spliced, self.further = seed_pass, spliced, list(further)
        self.with_rules, self.to_report = seed_pass.with_rules, seed_pass.to_report
        self.reached: list[Tensor | None] = []
        """The columns at the ``further`` edges."""
        self.keeps = seed_pass.gathered
        self.count_of_seeds = 1
        self.batched = False
        self.kept: dict[Node, dict[int, list[Tensor]]] = {}
        tapped = [node for node in {**self.plan.uses, **self.with_rules, **self.to_report} if node in self.graph.edges]
        self.captured = set(self.lowest([start.node for start in spliced.starts], tapped))
        self.ends = [edge for node in self.captured for edge in arrivals_at(node, self.graph)]
        self._hooked = [node for node in tapped if node not in self.captured]

    def pull(self, edges: Sequence[GradientEdge], seeds: Sequence[Tensor]) -> None:
        """Send seeds ``[v, ...]``, given at each of the edges, through the graph."""
        create = torch.is_grad_enabled()

        def pull(*seed: Tensor) -> Tensor:
            found = self.spliced.grad(edges, [*self.ends, *self.further], seed, create_graph=create)
            self.reached = [self._unwrapped(grad) for grad in found[len(self.ends) :]]
            arrived: dict[Node, list[Tensor | None]] = {}
            for end, grad in zip(self.ends, found, strict=False):
                arrived.setdefault(end.node, [None] * count_outputs(end.node))[end.output_nr] = grad
            for node in sorted(arrived, key=self.places.__getitem__):
                self._arrived(node, arrived[node])
            return seed[0].new_zeros(())

        self.count_of_seeds = len(seeds[0])
        self.batched = self.count_of_seeds > 1
        handles: list[Any] = []
        before = HERE.inner, HERE.muted
        HERE.inner, HERE.muted, self.is_partial = self, False, True
        try:
            for node in self._hooked:
                handles.append(node.register_prehook(partial(self._arrived, node)))
            if not self.batched:
                pull(*(seed[0] for seed in seeds))
                return
            poolings = () if self.seed_pass.block.reads_module_io else self.spliced.poolings
            with by_turns([*poolings, *self.spliced.turns], self.count_of_seeds, [*edges, *self.ends]):
                vmap(pull, *seeds)  # recomputed activations may draw dropout again
        finally:
            (HERE.inner, HERE.muted), self.is_partial = before, False
            for handle in handles:
                handle.remove()
            forget_retained()

    def _unwrapped(self, grad: Tensor | None) -> Tensor | None:
        """What ``torch.vmap`` holds for all seeds, ``[v, ...]``."""
        if grad is None or not self.batched:
            return None if grad is None else grad[None]
        with outside_vmap([grad], self.count_of_seeds) as (columns,):
            return columns

    def _arrived(self, node: Node, grads: Sequence[Tensor | None]) -> None:
        if HERE.inner is not self or HERE.muted:
            return
        given = {number: grad for number, grad in enumerate(grads) if grad is not None}
        if not given:
            return
        if not self.batched:
            self._receive(node, {number: grad[None] for number, grad in given.items()})
            return
        with outside_vmap(list(given.values()), self.count_of_seeds) as unwrapped:
            self._receive(node, dict(zip(given, unwrapped, strict=True)))

    def _receive(self, node: Node, grads: dict[int, Tensor]) -> None:
        with muted():
            if node in self.with_rules:
                self.seed_pass.keep_for_rules(self.with_rules[node], grads)
            if self.seed_pass.final:
                for io in self.to_report.get(node, ()):
                    self.seed_pass.report(io)
            if node not in self.plan.uses:
                return
            if self.keeps:
                known = self.kept.setdefault(node, {})
                for number, grad in grads.items():
                    known.setdefault(number, []).append(grad)
            else:
                self._take_cotangents(node, Cotangents(grads))

    def _take_cotangents(self, node: Node, cotangents: Cotangents) -> None:
        for planned in self.plan.uses[node]:
            self.take_in(planned, self.arrival(node, planned, cotangents))

    def finish(self) -> None:
        """Pull through regions what has entered them, and complete the parameters that are left."""
        with muted():
            for node, grads in self.kept.items():
                whole = {number: torch.cat(parts) for number, parts in grads.items()}
                self._take_cotangents(node, Cotangents(whole))
            self.kept.clear()
            self.take_deferred()
            for node in self.entered():
                self._enter(node)
            self.entering.clear()
            for leaf in list(self.found):
                self.completed(leaf, self.found[leaf])
            self.found.clear()

    def _enter(self, node: Node) -> None:
        """Pull what entered a region through a node to the parameters behind it."""
        key, entered = self.seed_pass.subset.key, self.entering[node]
        individual = {number: found.individual(self.seed_pass.subset) for number, found in entered.items()}
        if node in self.plan.mixed:
            size = next(iter(individual.values())).size
            rows = {number: own.dense().flatten(0, 1) for number, own in individual.items()}
            for leaf, grads in pull_through(self.graph, self.places, node, rows, one_by_one=True).items():
                if leaf in self.plan.expected:
                    self.contributions(leaf).pulled.setdefault(key, []).append(Explicit(grads.unflatten(0, size)))
        for leaf in self.plan.entries[node]:
            looked_up = _looked_up(node, leaf)
            place = place_in(node, leaf)
            for number, own in individual.items() if node not in self.plan.mixed else ():
                found: Individual = Derived(
                    own, variable_of(leaf), partial(self._pull_through, node, number, leaf), *looked_up
                )
                found = found if place is None else Parts({place: own}, variable_of(leaf).shape)
                self.contributions(leaf).pulled.setdefault(key, []).append(found)
            self.count(leaf)

    def _pull_through(self, node: Node, number: int, leaf: Node, grads: Tensor) -> Tensor:
        """Pull cotangents ``[r, ...]`` at an output of a node's function on to a parameter, ``[r, *p]``."""
        with muted():
            found = pull_through(self.graph, self.places, node, {number: grads}, one_by_one=False)
        if leaf in found:
            return found[leaf]
        parameter = variable_of(leaf)
        return torch.zeros(len(grads), *parameter.shape, dtype=parameter.dtype, device=parameter.device)

    def completed(self, leaf: Node, contributions: Contributions) -> None:
        if self.found.pop(leaf, None) is not None and (contributions.arrivals or contributions.pulled):
            self.seed_pass.compute(contributions)


def _looked_up(node: Node, leaf: Node) -> tuple[Tensor, Tensor] | tuple[()]:
    """The rows of a parameter that a node looks up, and which of them count; nothing for other nodes."""
    if kind(node) != "Embedding" or node.next_functions[0][0] is not leaf or saved(node, "scale_grad_by_freq"):
        return ()
    index = saved(node, "indices")
    return index, index != saved(node, "padding_idx")  # none if that is -1
