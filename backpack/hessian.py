"""The diagonal of the Hessian: seeds at the loss, and at every node of the graph that is not linear.

The Hessian of the loss with respect to a parameter is, by the chain rule, the sum over the nodes of the recorded graph
of ``J^T R J``, with ``J`` the Jacobian of a node's inputs and ``R`` the node's second derivatives weighed by the
gradient that arrives there. The loss itself contributes the Gauss-Newton matrix. Columns of all ``R`` are pulled back
like those of the loss's Hessian (Dangel, Harmeling & Hennig, 2020, for elementwise functions in a chain).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from backpack.compat import dtype_at
from backpack.delivery import Contributions
from backpack.engine import HERE, expanded
from backpack.hessian_graph import Graph, has_autocast, is_fused
from backpack.joined import Joined, place_of
from backpack.landmarks import Origin, count_uses, landmarks
from backpack.loss_call import PASSES
from backpack.quantities import Curvature
from backpack.recomputed import Dropped, drop
from backpack.recorder import Call, Source
from backpack.rerun import agree
from backpack.samples import Layout, Rows, Subset, layout_like
from backpack.seeds import WIDEST, SeedPass
from backpack.shortcuts import squares
from backpack.uses import Dense, DenseUse, Derived, ElementwiseUse, Explicit, Individual, PullbackUse, Use, join
from backpack.uses.replay import ReplayUse


@dataclass(eq=False)
class SecondOrderGraph:
    """A graph from the loss's input on, of all samples or of the selected ones alone (``rows``)."""

    edge: GradientEdge
    layout: Layout
    rows: Tensor | None


@dataclass(eq=False)
class HessianPass(SeedPass):
    """The Hessian's diagonal for extensions that share a subset."""

    parameters: dict[int, Tensor] = field(default_factory=dict)
    totals: dict[int, tuple[Tensor, Dense, Tensor]] = field(default_factory=dict)
    gradients: dict[Call, dict[int, Tensor]] | None = None
    again: set[Call] | None = None
    twice = True
    coupled: set[int] | None = None

    def run(self) -> None:
        """Pull back all columns and store the results."""
        if torch.is_grad_enabled():
            given = (self.block, self.extensions, self.loss, self.make_root, self.layout, self.found)
            PASSES["columns"](*given, self.ends, self.outer, self.last).run()
            return
        self._refuse_rules()
        self.subset = self.extensions[0].subset
        rows = self.subset.rows(self.layout.n, self.loss.input.device)
        own = self.graph(rows)
        graph = Graph(self.joined, self.ends, own.layout)
        self.uses = count_uses(self.found)
        grad = self._place(self.loss.grad(self.layout, self.outer)[None], rows, own.rows)[0].to(dtype_at(own.edge))
        HERE.muted = True
        try:
            for edges, columns, weights in self._columns(graph, grad, own, rows):
                self.weights = weights
                HERE.inner, HERE.muted = self, False
                self._pull(edges, self.ends, columns)
                self._finish()
                HERE.inner, HERE.muted = None, True
            self.weights = None
            for parameter, dense, total in self.totals.values():
                self._add_total(parameter, dense, total)
            self._add_couplings(graph, self.ends, grad)
            for extension in self.extensions:
                for key, parameter in self.parameters.items():
                    self.block.store(parameter, extension.savefield, self.results[id(extension), key][0])
        finally:
            HERE.inner, HERE.muted = None, False
            self.delivery.clear()
            self.results.clear()
            self.totals.clear()
            for call in self._calls() if self.recomputed else ():
                if call.recomputed:
                    drop(call)

    def _compute(self, source: Source) -> None:
        """Where a sample's gradient is an outer product, the sum of squared cotangents is all that is needed."""
        parameter = source.tensor
        grads = self.delivery.fetch(parameter).individual(self.subset)
        if self.weights is not None:
            rows = self.subset.rows(self.weights.shape[1], self.weights.device)
            grads = grads.weighted(self.weights if rows is None else self.weights[:, rows])
        if type(grads) is not Dense or grads.grad.shape[3] > 1 or self.uses[id(parameter)] > 1:
            self._add(parameter, grads, self.extensions)
            return
        total = grads.grad.square()
        total = total.sum(0) if grads.weights is None else torch.einsum("vngso,vn->ngso", total, grads.weights)
        self._note_total(parameter, grads, total)

    def _note_total(self, parameter: Tensor, grads: Dense, total: Tensor) -> None:
        """Add up squared cotangents ``[n, g, s, o]``, by themselves at each position."""
        if id(parameter) in self.totals:
            total = total + self.totals[id(parameter)][2]
        self.totals[id(parameter)] = (parameter, grads, total)

    def _add_total(self, parameter: Tensor, dense: Dense, total: Tensor) -> None:
        self._begin(parameter)
        unfold = dense.unfold
        assert unfold is not None
        squares = replace(dense, grad=total[None], unfold=lambda *inputs: unfold(*inputs).square(), gram=None)
        self._add_diagonal(parameter, squares.dense()[0] if self._each else squares.total()[None])

    def _refuse_rules(self) -> None:
        for extension in self.extensions:
            if extension.rules:
                raise RuntimeError(
                    f"{type(extension).__name__} takes no rules of users: none is needed for any module. Construct it "
                    f"without set_module_extension()."
                )

    def receive(self, call: Call, place: int, grads: Tensor) -> None:
        """Note cotangents: of the loss's gradient, of seeds at the data of a parameter used before, or of columns."""
        if self.again is not None and call not in self.again:
            return  # its output is the end of a module that ran again
        if self.gradients is not None:
            self.gradients.setdefault(call, {})[place] = grads
        elif self.coupled is None:
            super().receive(call, place, grads)
        elif any(id(p) in self.coupled for source in call.sources for p in source.parameters):
            self.delivery.receive(call, place, grads)

    def _add_couplings(self, graph: Graph, targets: list[GradientEdge], grad: Tensor) -> None:
        """What a parameter adds that enters the graph more than once, or not linearly.

        The nodes' residuals take the graph for a function of the data. A call that uses a parameter is a function of
        both: its mixed second derivatives count where the data depend on the same parameter, those with respect to
        the parameter where it is not linear in it.
        """
        if not any(
            source.tensor.grad_fn is not None
            or isinstance(use, PullbackUse)
            or any(self.uses[id(p)] > 1 for p in source.parameters)
            for call in dict.fromkeys(self._calls())
            for source, use in call.uses
        ):
            return
        self.gradients = {}
        self._deliver_from([graph.edge], targets, [grad.unsqueeze(0)])
        gradients, self.gradients = self.gradients, None
        for call, grads in gradients.items():
            for number, (source, use) in enumerate(call.uses):
                if not source.void:
                    self._add_own_curvature(call, source, use, grads)
                    for place, edge in enumerate(_edges_of(call, number)):
                        if edge is not None:
                            self._add_coupling(graph, targets, call, source, use, grads, place, edge)
        for source, total in self._totals(gradients):
            self._add_parametrization(source, total)

    def _deliver_from(self, edges: list[GradientEdge], targets: list[GradientEdge], seeds: list[Tensor]) -> None:
        HERE.inner, HERE.muted = self, False
        try:
            self._pull(edges, targets, seeds)
        finally:
            HERE.inner, HERE.muted = None, True

    def _rows(self, call: Call) -> Rows:
        return call.rows(self.subset.rows(call.n, self.loss.input.device))

    def _add_coupling(
        self,
        graph: Graph,
        targets: list[GradientEdge],
        call: Call,
        source: Source,
        use: Use,
        grads: dict[int, Tensor],
        place: int,
        edge: GradientEdge,
    ) -> None:
        """Twice the mixed derivatives of a call by its parameter and its data, along the data's unit vectors."""
        edge, data = GradientEdge(edge.node, edge.output_nr), use.data()[place]
        parameters = [p for p in source.parameters if self.uses[id(p)] > 1]
        if not parameters or not graph.leads(edge):
            return
        rows = self._rows(call)
        grad = rows.take(grads[0], leading=1).to(source.tensor.dtype)
        layout = layout_like(call.layout, data)
        split = layout.split(data)
        size = split[0].numel()
        wide = max(p.numel() for p in parameters) * max(1, len(split))
        looped = self.joined.must_loop(edge)
        chunk = 1 if looped else max(1, min(self.extensions[0].chunk_size or size, WIDEST // wide))
        self.coupled = {id(p) for p in parameters}
        try:
            count = self.extensions[0].mc_samples if self.sampled else size
            for start in range(0, count, chunk):
                number = torch.arange(start, min(start + chunk, count), device=data.device)
                if self.sampled:
                    units = signs_like(data, (len(number), len(split), size)) / count**0.5
                else:
                    units = data.new_zeros(len(number), len(split), size)
                    units[torch.arange(len(number), device=data.device), :, number] = 1
                units = units.reshape(len(number), *split.shape)
                self._deliver_from([edge], targets, [layout.join(units, 1)])
                earlier = {id(p): found for p in parameters if (found := self._total(p)) is not None}
                self.delivery.clear()
                if not earlier:
                    return
                chosen = units if rows.index is None else units[:, rows.index]
                mixed: Individual = use.varied(grad, rows, source.tensor.shape, place, chosen)
                for p in parameters:
                    if id(p) in earlier:
                        own = mixed if p is source.tensor else Derived(mixed, source.tensor, p)
                        self._add_diagonal(p, 2 * (earlier[id(p)].dense() * own.dense()).sum(0))
        finally:
            self.coupled = None

    def _total(self, parameter: Tensor) -> Individual | None:
        """What has reached a parameter, by all ways."""
        parts = []
        for key, source in self.delivery.sources.items():
            if any(p is parameter for p in source.parameters):
                arrived = Contributions(source.tensor, self.delivery.arrivals[key], {}).individual(self.subset)
                direct = source.tensor is parameter
                parts.append(arrived if direct else Derived(arrived, source.tensor, parameter))
        return join(parts) if parts else None

    def _add_own_curvature(self, call: Call, source: Source, use: Use, grads: dict[int, Tensor]) -> None:
        """Of a call that is not linear in its parameter."""
        rows = self._rows(call)
        for parameter in source.parameters:

            def directions(parameter: Tensor = parameter) -> Tensor:
                warn_of_columns(call.name, parameter)
                basis = torch.eye(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
                basis = basis.reshape(-1, *parameter.shape)
                return basis if parameter is source.tensor else push_forward(source.tensor, parameter, basis)

            grad = rows.take(grads[0], leading=1).to(source.tensor.dtype) if use.data() or len(grads) == 1 else grads[0]
            found = use.curvature(grad, rows, directions)
            if found is not None:
                own = sum(p is parameter for s, _ in call.uses for p in s.parameters)
                if own > 1:
                    raise RuntimeError(
                        f"{call.name} is given the same parameter {own} times, and is not linear in it: the Hessian "
                        f"of such a call is not supported. Apply the parameter in several calls."
                    )
                self._add_diagonal(parameter, found.reshape(-1, *parameter.shape))

    def _totals(self, gradients: dict[Call, dict[int, Tensor]]) -> Iterator[tuple[Source, Individual]]:
        """Individual gradients of tensors that are computed from parameters."""
        for call, grads in gradients.items():
            for place, found in grads.items():
                self.delivery.receive(call, place, found)
        for source in self.delivery.computed():
            yield source, self.delivery.fetch(source.tensor).individual(self.subset)
        self.delivery.clear()

    def _add_parametrization(self, source: Source, grads: Individual) -> None:
        """Of a tensor that is not linear in the parameters that it is computed from."""
        for parameter in source.parameters:
            with torch.enable_grad():
                (first,) = torch.autograd.grad(
                    source.tensor, parameter, torch.ones_like(source.tensor), create_graph=True, retain_graph=True
                )
            if not _depends(first, parameter):
                continue
            warn_of_columns(f"the tensor computed from parameter {source.name}", parameter)
            weighed = grads.dense()[0] if self._each else grads.total().unsqueeze(0)
            rows = []
            for grad in weighed:
                with torch.enable_grad():
                    (first,) = torch.autograd.grad(source.tensor, parameter, grad, create_graph=True, retain_graph=True)
                    entries = enumerate(first.flatten().unbind())
                columns = [
                    torch.autograd.grad(entry, parameter, retain_graph=True)[0].flatten()[k] for k, entry in entries
                ]
                rows.append(torch.stack(columns).reshape(parameter.shape))
            self._add_diagonal(parameter, torch.stack(rows))

    @property
    def _each(self) -> bool:
        """Whether diagonals are wanted for each sample."""
        return any("sample_squares" in extension.reads for extension in self.extensions)

    def _add_diagonal(self, parameter: Tensor, diagonal: Tensor) -> None:
        """Add ``[n, *p]``, memory that nothing else uses; one row will do where only the sum over samples is wanted."""
        found = Explicit(diagonal[None])
        if self._each:
            found.know(sample_squares=diagonal)
        if any("sum_squares" in extension.reads for extension in self.extensions):
            found.know(sum_squares=diagonal.sum(0) if self._each or len(diagonal) > 1 else diagonal[0])
        self._add(parameter, found, self.extensions)

    def _add(self, parameter: Tensor, grads: Individual, extensions: list[Curvature]) -> None:
        self._begin(parameter)
        super()._add(parameter, grads, extensions)

    def _begin(self, parameter: Tensor) -> None:
        """Drop the results of an earlier pass: their memory is needed for the new ones."""
        if id(parameter) not in self.parameters:
            for extension in self.extensions:
                vars(parameter).pop(extension.savefield, None)
        self.parameters[id(parameter)] = parameter

    def graph(self, rows: Tensor | None) -> SecondOrderGraph:
        """A graph whose nodes all have second derivatives, if possible of the selected samples alone."""
        rounded = has_autocast(self.loss.edge)
        edge = None if rows is None else self._rerun(rows, rounded)
        if rows is not None and edge is not None and not (rounded and has_autocast(edge)):
            self.subset, self.joined, (self.found, self.ends) = Subset(), Joined(edge), landmarks(edge)
            return SecondOrderGraph(edge, replace(self.layout, n=len(rows)), rows)
        if (self._has_fused() or rounded) and not self._join(rounded):
            raise RuntimeError(
                f"{type(self.extensions[0]).__name__}: the model has a fused attention or recurrent layer, or was run "
                f"under autocast, of which PyTorch has no second derivatives, and running it again in another form "
                f"was not possible or did not give the same output (as with dropout in training mode, or a state that "
                f"is kept from call to call). Run the forward pass inside the backpack(...) block and without "
                f"autocast, put the model into evaluation mode, or give it its state as an argument."
            )
        return SecondOrderGraph(self.joined.start, self.layout, None)

    def _calls(self) -> list[Call]:
        """All that were recorded on the way to the loss."""
        return [call for _, origin in self.found for call in origin.alive()]

    def _has_fused(self) -> bool:
        """Whether there are functions of which PyTorch has no second derivatives, but others that compute the same."""
        kinds = {use.kind if isinstance(use, Dropped) else type(use) for call in self._calls() for _, use in call.uses}
        return ReplayUse in kinds or is_fused(self.loss.edge)

    def _rerun(self, rows: Tensor | None, rounded: bool = False) -> GradientEdge | None:
        with expanded():
            return super()._rerun(rows, rounded)

    def _join(self, rounded: bool) -> bool:
        """Run all modules again, with functions that have second derivatives, if that gives the same outputs."""
        modules: dict[int, list[tuple[GradientEdge, Origin]]] = {}
        for edge, origin in self.found:
            modules.setdefault(id(origin.calls), []).append((edge, origin))
        parts = []
        for outputs in sorted(modules.values(), key=lambda own: -max(edge.node._sequence_nr() for edge, _ in own)):
            with expanded():
                again = self._run_again(outputs[0][1], None)
            part = {}
            for edge, origin in outputs:
                expected = self.loss.input if edge == self.loss.edge else origin.output
                if again is None or expected is None or not agree(again[origin.place], expected, rounded):
                    return False
                part[place_of(edge)] = get_gradient_edge(again[origin.place])
            parts.append(part)
        self.joined = Joined(self.loss.edge, parts)
        self.found, self.ends = landmarks(self.joined.start, self.joined.instead)
        self.again = set(self._calls())
        return not (rounded and has_autocast(self.joined.start, self.joined.instead))

    def _columns(
        self, graph: Graph, grad: Tensor, own: SecondOrderGraph, rows: Tensor | None
    ) -> Iterator[tuple[list[GradientEdge], list[Tensor], Tensor | None]]:
        """Where to start, columns, and their weights: of the loss, then of each node."""
        start = 0
        for stop, seeds in self._chunks(graph.edge):
            signs = self.root.signs if not self.sampled else None
            if signs is not None:
                signs = signs[start:stop] if own.rows is None else signs[start:stop, own.rows]
            yield [graph.edge], [self._place(seeds, rows, own.rows)], signs
            start = stop
        chunk = self._chunk(graph.edge)
        if self.sampled:
            yield from self._drawn_columns(graph, grad, chunk)
            return
        for residual in graph.residuals(grad):
            known = None if self.recomputed else squares(graph, residual)  # it reads what comes back only once
            if known is not None and self._add_squares(known):
                continue
            for start in range(0, residual.columns, chunk):
                columns, weights = residual.exact(start, start + chunk)
                yield residual.edges, columns, weights.expand(-1, own.layout.n)

    @cached_property
    def recomputed(self) -> bool:
        """Whether parts of the graph are computed again for each pull-back."""
        return any(call.recomputed for call in self._calls())

    @property
    def sampled(self) -> bool:
        """Whether columns are drawn."""
        return self.extensions[0].seeds == "sampled"

    def _drawn_columns(
        self, graph: Graph, grad: Tensor, chunk: int
    ) -> Iterator[tuple[list[GradientEdge], list[Tensor], Tensor]]:
        """``r`` and ``R r`` for random signs ``r`` at all nodes at a time, as a sum and a difference.

        The expectation of ``(J^T r) * (J^T R r)`` is the diagonal of ``J^T R J``, and signs of different nodes are
        independent.
        """
        residuals = list(graph.residuals(grad))
        edges = [edge for residual in residuals for edge in residual.edges]
        count = self.extensions[0].mc_samples
        for start in range(0, count if residuals else 0, chunk):
            drawn = min(chunk, count - start)
            parts: list[Tensor] = []
            for residual in residuals:
                signs = [signs_like(residual.like, (drawn, *shape)) for shape in residual.shapes]
                products = residual.local.products(signs)
                size = sum(product.square().sum() for product in products)
                scale = (size / max(1, sum(product.numel() for product in products))) ** 0.25
                scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # both factors are of the same size
                for sign, product in zip(signs, products, strict=True):
                    parts.append(torch.cat([sign * scale + product / scale, sign * scale - product / scale]))
            weights = grad.new_ones(2 * drawn, graph.layout.n) / (4 * count)
            weights[drawn:] *= -1
            yield edges, parts, weights

    def _add_squares(self, known: list[tuple[GradientEdge, Tensor, bool]]) -> bool:
        """Add what the sums of squared columns at edges give for the calls there, if that is all that these need."""
        arrived: dict[Call, dict[int, Tensor]] = {}
        uses = []
        for edge, total, mixed in known:
            self.gradients = {}
            self._deliver_from([edge], [edge], [total[None]])
            arrived |= self.gradients
            uses += [(call, source, use, mixed) for call in self.gradients for source, use in call.uses]
        self.gradients = None
        if not all(self._needs_squares_only(*use) for use in uses):
            return False
        for call, source, use, _ in uses:
            parameter, rows = source.tensor, self._rows(call)
            total = rows.take(arrived[call][0], leading=1).to(parameter.dtype)
            if isinstance(use, ElementwiseUse):
                self._add_diagonal(parameter, use.squares(total, rows, parameter.shape).clone())
            elif isinstance(use, DenseUse):
                dense = use.bind(total, rows, parameter.shape)
                self._note_total(parameter, dense, dense.grad[0])
        return True

    def _needs_squares_only(self, call: Call, source: Source, use: Use, mixed: bool) -> bool:
        simple = call.outputs == 1 and call.layout == Layout(call.n) and source.tensor.grad_fn is None
        if not simple or self.uses[id(source.tensor)] > 1:
            return False
        if isinstance(use, ElementwiseUse):
            return not mixed or use.padded == (1, call.shape[1])
        return isinstance(use, DenseUse)


def _edges_of(call: Call, number: int) -> list[GradientEdge | None]:
    """Those of the data of one of a call's uses; ``None``: they need no gradient."""
    if call.edges is not None:
        return call.edges[number]
    return [get_gradient_edge(data) if data.requires_grad else None for data in call.uses[number][1].data()]


def signs_like(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Random signs."""
    return torch.randint(0, 2, shape, device=tensor.device).to(tensor.dtype) * 2 - 1


def _depends(value: Tensor, parameter: Tensor) -> bool:
    """Whether a value is computed from a parameter."""
    if not value.requires_grad:
        return False
    (found,) = torch.autograd.grad(value, parameter, torch.zeros_like(value), retain_graph=True, allow_unused=True)
    return found is not None


def push_forward(tensor: Tensor, parameter: Tensor, directions: Tensor) -> Tensor:
    """``J u`` for directions ``u[k, *p]`` of the parameter that a tensor is computed from, ``[k, ...]``."""
    with torch.enable_grad():
        dummy = torch.zeros_like(tensor, requires_grad=True)
        (pulled,) = torch.autograd.grad(tensor, parameter, dummy, create_graph=True, retain_graph=True)
    return torch.stack([torch.autograd.grad(pulled, dummy, u, retain_graph=True)[0] for u in directions])


def warn_of_columns(what: str, parameter: Tensor) -> None:
    """Say what the exact but slow way costs."""
    warnings.warn(
        f"{what} is not linear in its parameter of shape {list(parameter.shape)}: this part of the Hessian's diagonal "
        f"is taken column by column, which costs {parameter.numel()} derivatives of second order.",
        stacklevel=2,
    )


PASSES["hessian"] = HessianPass
