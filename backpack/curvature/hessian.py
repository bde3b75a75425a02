"""The diagonal of the Hessian: columns start at the loss, and at every node of the graph that is not linear.

The Hessian of the loss with respect to a parameter is, by the chain rule, the sum over the nodes of the recorded graph
of ``J^T R J``, with ``J`` the Jacobian of a node's inputs and ``R`` the node's second derivatives weighed by the
gradient that arrives there. The loss itself contributes the Gauss-Newton matrix. Columns of all ``R`` are pulled back
like those of the loss's Hessian (Dangel, Harmeling & Hennig, 2020, for elementwise functions in a chain).

This computes parameters that enter the graph once, linearly, and by samples. All others are computed entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.backward.arrivals import Arrival, Contributions
from backpack.backward.plan import PlannedUse, make_plan
from backpack.curvature.columns import Columns
from backpack.curvature.double_backward import DoubleBackwardPass, loss_gradients
from backpack.curvature.hessian_cost import Costs, Share, warn_if_long
from backpack.curvature.hessian_entries import MANY, Entries, refuse_wrong_third, signs_like
from backpack.curvature.hessian_shortcuts import SimpleWay, simple_way, summed_squares
from backpack.curvature.linearity import linear_leaves
from backpack.curvature.loss_term import PASSES
from backpack.curvature.residual_graph import ResidualGraph
from backpack.extensions.interface import Curvature
from backpack.graph import is_recomputed, kind, shape_of, variable_of
from backpack.modules.parameters import name_of
from backpack.modules.thread_state import muted
from backpack.samples import Layout, Rows
from backpack.torch_internals import dtype_at
from backpack.uses import Cotangents, Dense, DenseUse, ElementwiseUse, Explicit, Individual
from backpack.utils.progress_bar import bar

PATIENCE = 5.0
"""Seconds after which a terminal shows how far the passes are."""


class HessianPass(DoubleBackwardPass):
    """The Hessian's diagonal for extensions that share a subset."""

    advance: Callable[..., Any]
    """Is called with the number of columns or entries that are done, to show it."""

    def run(self) -> None:
        """Pull back all columns and store the results."""
        self.refuse_rules()
        self.parameters: dict[int, Tensor] = {}
        self.totals: dict[int, tuple[Tensor, Dense, Tensor]] = {}
        rows = self.subset.rows(self.n, self.device)
        self._switch_to_twice_differentiable(rows)
        create = torch.is_grad_enabled()
        if create:
            refuse_wrong_third(self.spliced.nodes, self._name)
        linear = set() if create else linear_leaves(self.spliced, self.prepared)
        others = [leaf for leaf in self.prepared.plan.expected if leaf not in linear]
        try:
            with muted(), self._restricted_to(linear) as graph, self._progress(graph, others):
                if linear:
                    self._together_or_not(lambda: self._by_columns(graph, rows))
                if others:
                    self._by_entries(others)
            for extension in self.extensions:
                for key, parameter in self.parameters.items():
                    self.block.store(parameter, extension.savefield, self.results[id(extension), key][0])
        finally:
            self._clear()

    def _clear(self) -> None:
        super()._clear()
        self.totals.clear()
        self.weights = None

    def _by_columns(self, graph: ResidualGraph, rows: Tensor | None) -> None:
        self.collector = collector = Columns(self, self.spliced)
        chosen = rows if self.chosen is None else self.chosen
        seeds = self._place([term.grad()[None] for term in self.terms], chosen)
        grads = [own[0].to(dtype_at(start)) for own, start in zip(seeds, self.spliced.starts, strict=True)]
        for edges, columns, weights in self._weighted_columns(collector, graph, grads, chosen):
            self.weights = weights
            collector.pull(edges, columns)
            collector.finish()
            self.advance(len(columns[0]))
        self.weights = None
        for parameter, dense, total in self.totals.values():
            self._add_total(parameter, dense, total)

    def _by_entries(self, leaves: Sequence[Node]) -> None:
        n = self.prepared.n
        rows = self.subset.rows(n, self.device)
        counts = None if rows is None else torch.bincount(rows, minlength=n).to(self.dtype)
        parameters = [variable_of(leaf) for leaf in leaves]
        create = torch.is_grad_enabled()

        def gradients(weights: Tensor | None) -> Sequence[Tensor | None]:
            own = counts if weights is None else weights
            seeds = loss_gradients(self.terms, self.layouts, self.chosen, own, self.start_tensors)
            return self.spliced.grad(self.spliced.starts, parameters, seeds, create_graph=True)

        entries = Entries(gradients, n, parameters, create, not self.spliced.must_loop, self.advance)
        with torch.enable_grad():
            chosen = None if not self._by_sample else range(n) if rows is None else rows.tolist()
            found = entries.drawn(self.extensions[0].mc_samples) if self.sampled else entries.exact(chosen)
        for parameter, diagonal in zip(parameters, found, strict=True):
            if diagonal is not None:
                self._add_diagonal(parameter, diagonal if self._by_sample else diagonal[None])

    @contextmanager
    def _progress(self, graph: ResidualGraph, others: Sequence[Node]) -> Iterator[None]:
        """Warn beforehand of what takes long, and show on a terminal how far it is."""
        if self.sampled or not (others or graph.curved):
            with bar(False, None) as self.advance:
                yield
            return
        collector = Columns(self, self.spliced)
        costs = Costs(collector.graph, graph.n, collector.plan.uses, collector.captured)
        shares = [*self._cost_of_columns(costs, collector, graph), *self._cost_of_entries(costs, others)]
        names = " and ".join(type(extension).__name__ for extension in self.extensions)
        warn_if_long(self._owner, names, shares, costs.step)
        with bar(None, sum(share.count for share in shares), unit="column", delay=PATIENCE) as self.advance:
            yield

    def _cost_of_columns(self, costs: Costs, collector: Columns, graph: ResidualGraph) -> Iterator[Share]:
        """The costs of columns: those of the losses, and those of each node with second derivatives."""
        if not collector.plan.uses:
            return
        chunk = self._chunk
        steps = costs.columns(self.spliced.starts, self.columns, chunk, graph.leading) / costs.step
        losses = dict.fromkeys(type(term.call.loss).__name__ for term in self.terms)
        yield Share(" and ".join(losses), self.columns, steps)
        for node in graph.curved:
            count = 1 if self._shortcut(collector, graph, node) is not None else graph.columns(node)
            edges = [self.spliced.now(edge) for edge in graph.live(node)]
            steps = costs.columns(edges, count, chunk, graph.leading) / costs.step
            yield Share(f"{kind(node)} of shape {list(shape_of(node, 0))}", count, steps)

    def _cost_of_entries(self, costs: Costs, leaves: Sequence[Node]) -> Iterator[Share]:
        """The costs of each parameter whose diagonal is computed entry by entry."""
        samples = self.prepared.n if self._by_sample else 1
        one_by_one = torch.is_grad_enabled() or samples > MANY or not self.batchable
        samples = 1 if samples > MANY else samples
        for leaf in leaves:
            parameter = variable_of(leaf)
            count = parameter.numel() * samples
            steps = costs.entries(count, samples, one_by_one) / costs.step
            yield Share(name_of(parameter), count, steps, by_entries=True)

    @contextmanager
    def _restricted_to(self, leaves: set[Node]) -> Iterator[ResidualGraph]:
        """Inside, only the uses of these parameters count; the graph that leads to them."""
        prepared = self.prepared
        plan = make_plan(prepared.graph, prepared.owners, prepared.n, leaves)
        self.prepared = replace(prepared, plan=plan)
        try:
            yield ResidualGraph(self.spliced, self.prepared)
        finally:
            self.prepared = prepared

    def compute(self, contributions: Contributions) -> None:
        """Add some columns; of a gradient that is an outer product, only the sum of squared cotangents is needed."""
        parameter = contributions.tensor
        grads = self._weighed(contributions)
        if type(grads) is not Dense or grads.grad.shape[3] > 1:
            self._add(parameter, grads, self.extensions)
            return
        total = grads.grad.square()
        total = total.sum(0) if grads.weights is None else torch.einsum("vngso,vn->ngso", total, grads.weights)
        self._note_total(parameter, grads, total)

    def _note_total(self, parameter: Tensor, grads: Dense, total: Tensor) -> None:
        """Add up squared cotangents ``[n, g, s, o]``, each position by itself."""
        if id(parameter) in self.totals:
            total = total + self.totals[id(parameter)][2]
        self.totals[id(parameter)] = (parameter, grads, total)

    def _add_total(self, parameter: Tensor, dense: Dense, total: Tensor) -> None:
        unfold = dense.unfold
        assert unfold is not None
        squares = Dense(dense.inputs, total[None], dense.shape, dense.flipped, lambda *inputs: unfold(*inputs).square())
        self._add_diagonal(parameter, squares.dense()[0] if self._by_sample else squares.total()[None])

    @property
    def _by_sample(self) -> bool:
        """Whether diagonals are wanted for each sample."""
        return any("sample_squares" in extension.reads for extension in self.extensions)

    def _add_diagonal(self, parameter: Tensor, diagonal: Tensor) -> None:
        """Add ``[n, *p]``, in memory that nothing else uses; ``[1, *p]`` will do where only the sum is wanted."""
        found = Explicit(diagonal[None])
        if self._by_sample:
            found.know(sample_squares=diagonal)
        if any("sum_squares" in extension.reads for extension in self.extensions):
            found.know(sum_squares=diagonal.sum(0) if self._by_sample or len(diagonal) > 1 else diagonal[0])
        self._add(parameter, found, self.extensions)

    def _add(self, parameter: Tensor, grads: Individual, extensions: list[Curvature]) -> None:
        self.parameters[id(parameter)] = parameter
        self.final = False
        super()._add(parameter, grads, extensions)

    def _weighted_columns(
        self, collector: Columns, graph: ResidualGraph, grads: Sequence[Tensor], rows: Tensor | None
    ) -> Iterator[tuple[Sequence[GradientEdge], list[Tensor], Tensor | None]]:
        """The columns of the losses, then of each node: where they start, the columns, and their weights."""
        signs = None if self.sampled else self._signs(rows)
        for stop, seeds in self._chunks():
            yield self.spliced.starts, self._place(seeds, rows), None if signs is None else signs[self.start : stop]
        chunk = self._chunk
        if self.sampled:
            yield from self._drawn_columns(graph, grads, chunk)
            return
        recomputed = any(map(is_recomputed, graph.spliced.nodes))  # it is read only once
        for residual in graph.residuals(grads):
            simple = None if recomputed else self._shortcut(collector, graph, residual.inputs.node)
            if simple is not None:
                self._add_squares(summed_squares(residual, simple[0]), simple[1])
                self.advance(1)
                continue
            for start in range(0, residual.columns, chunk):
                columns, weights = residual.exact(start, start + chunk)
                yield residual.edges, columns, weights.expand(-1, graph.n)

    def _signs(self, rows: Tensor | None) -> Tensor | None:
        """The signs of the columns of all losses, ``[v, n]``; ``None``: all are positive."""
        roots = [term.root for term in self.terms]
        if all(root.signs is None for root in roots):
            return None
        ones = [torch.ones(root.columns, self.n, dtype=self.dtype, device=self.device) for root in roots]
        signs = torch.cat([one if root.signs is None else root.signs for one, root in zip(ones, roots, strict=True)])
        return signs[:, rows] if rows is not None and self.selected else signs

    @property
    def sampled(self) -> bool:
        """Whether columns are drawn."""
        return self.extensions[0].seeds == "sampled"

    def _drawn_columns(
        self, graph: ResidualGraph, grads: Sequence[Tensor], chunk: int
    ) -> Iterator[tuple[list[GradientEdge], list[Tensor], Tensor]]:
        """The sums and differences of ``r`` and ``R r`` as columns, for random signs ``r`` at all nodes at once.

        The expectation of ``(J^T r) * (J^T R r)`` is the diagonal of ``J^T R J``, and signs of different nodes are
        independent.
        """
        residuals = list(graph.residuals(grads))
        edges = [edge for residual in residuals for edge in residual.edges]
        count = self.extensions[0].mc_samples
        for start in range(0, count if residuals else 0, chunk):
            drawn = min(chunk, count - start)
            parts: list[Tensor] = []
            for residual in residuals:
                signs = [signs_like(residual.like, (drawn, *shape)) for shape in residual.inputs.shapes]
                products = residual.local.products(signs)
                size = sum(product.square().sum() for product in products)
                scale = (size / max(1, sum(product.numel() for product in products))) ** 0.25
                scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # both factors are of the same size
                for sign, product in zip(signs, products, strict=True):
                    parts.append(torch.cat([sign * scale + product / scale, sign * scale - product / scale]))
            weights = grads[0].new_ones(2 * drawn, graph.n) / (4 * count)
            weights[drawn:] *= -1
            yield edges, parts, weights

    def _shortcut(
        self, collector: Columns, graph: ResidualGraph, node: Node
    ) -> tuple[SimpleWay, list[tuple[int, Tensor, Arrival]]] | None:
        """The way from a node along which uses need sums of squares only, and these uses: where, and of what."""
        found = simple_way(graph, node)
        uses: list[tuple[int, Tensor, Arrival]] = []
        for place, (edge, mixed) in enumerate(() if found is None else found.edges):
            for planned in collector.plan.uses.get(edge.node, ()):
                arrival = collector.arrival(edge.node, planned, Cotangents({0: self.start_tensors[0]}))
                if not self._needs_squares_only(edge, planned, arrival, mixed):
                    return None
                assert planned.leaf is not None
                uses.append((place, variable_of(planned.leaf), arrival))
        return None if found is None else (found, uses)

    def _add_squares(self, totals: Sequence[Tensor], uses: list[tuple[int, Tensor, Arrival]]) -> None:
        """Add what the uses along a way make of the sums of squared columns at its edges."""
        for place, parameter, arrival in uses:
            total = totals[place]
            rows = Rows(arrival.layout, self.subset.rows(arrival.layout.n, total.device))
            own = rows.take(total[None], leading=1).to(parameter.dtype)
            shape = parameter.shape[::-1] if arrival.turned else parameter.shape
            if isinstance(arrival.use, ElementwiseUse):
                self._add_diagonal(parameter, arrival.use.squares(own, rows, shape).clone())
            elif isinstance(arrival.use, DenseUse):
                dense = arrival.use.bind(own, rows, shape)
                self._note_total(parameter, dense, dense.grad[0])

    def _needs_squares_only(self, edge: GradientEdge, planned: PlannedUse, arrival: Arrival, mixed: bool) -> bool:
        use, layout = arrival.use, arrival.layout
        if planned.leaf is None or arrival.turned or edge.output_nr or layout != Layout(layout.n):
            return False
        if isinstance(use, ElementwiseUse):
            return not mixed or use.padded == (1, shape_of(edge.node, 0)[1])
        return isinstance(use, DenseUse)


PASSES["hessian"] = HessianPass
