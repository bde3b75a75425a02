"""Second order: roots of the loss Hessian are pulled back by autograd through whatever graph it recorded.

When the cotangent reaches the loss, columns of a root of its Hessian (*seeds*) are sent through the graph from the
loss's input on, some at a time, before the ordinary backward pass goes on. The same hooks as in first order bring
the cotangents to the uses of the parameters, now with a seed axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from backpack.bystanders import forget_retained
from backpack.compat import outside_vmap, vmap
from backpack.delivery import Delivery
from backpack.engine import HERE, Block
from backpack.joined import Joined
from backpack.landmarks import Found, Origin, count_uses, landmarks
from backpack.loss_call import PASSES, LossCall
from backpack.losses import LossRoot
from backpack.memory import empty
from backpack.passages import Passage
from backpack.pooling import pooled
from backpack.quantities import Curvature
from backpack.recomputed import drop, is_dropped
from backpack.recorder import Call, Source
from backpack.rerun import agree, outputs_again
from backpack.samples import Layout, Subset
from backpack.uses import Derived, Individual
from backpack.watched import trainable, without_rules

WIDEST = 2**23
"""Entries of the widest layer's output, over all seeds of one pass, that the automatic chunk size aims at."""


@dataclass(eq=False)
class SeedPass:
    """Seeds of one kind, for extensions that share them, pulled back chunk by chunk.

    ``outer``: the cotangent of the loss. ``last``: nothing else will be computed for the block, so that modules are
    done when this pass is through them.
    """

    block: Block
    extensions: list[Curvature]
    loss: LossCall
    make_root: Callable[[], LossRoot]
    layout: Layout
    found: Found
    ends: list[GradientEdge]
    outer: Tensor
    last: bool
    delivery: Delivery = field(default_factory=Delivery)
    results: dict[tuple[int, int], list[Any]] = field(default_factory=dict)
    first: bool = True
    final: bool = False
    gathered: bool = False
    selected: bool = False
    batched: bool = True
    batchable: bool = True
    count: int = 0
    start: int = 0
    weights: Tensor | None = None
    finished: set[int] = field(default_factory=set)
    waiting: list[tuple[Call, Source]] = field(default_factory=list)
    late: list[Call] = field(default_factory=list)
    twice = False
    """Whether the model is differentiated twice, so that it is run again where it has fused functions."""

    def __post_init__(self) -> None:
        self.joined = Joined(self.loss.edge)

    def run(self) -> None:
        """Pull back all seeds and store the results."""
        self.subset = self.extensions[0].subset
        edge, rows = self.loss.edge, self.subset.rows(self.layout.n, self.loss.input.device)
        select: Tensor | None = None
        if rows is not None:
            own = self._rerun(rows)
            if own is not None:
                edge, select, self.subset, self.selected = own, rows, Subset(), True
                self.joined, (self.found, self.ends) = Joined(edge), landmarks(edge)
        self.uses = count_uses(self.found)

        def pull() -> None:
            for number, seeds in self._chunks(edge):
                self.final = number >= self.columns
                self._pull([edge], self.ends, [self._place(seeds, rows, select)])
                if self.final or not self.gathered:
                    self._finish()
                    self.first = False

        HERE.inner = self
        try:
            try:
                pull()
            except RuntimeError:
                if not self.batched:
                    raise
                self._clear()  # a node that looped.py does not know cannot take seeds together, or memory was short
                self.batchable, self.first = False, True
                pull()
        finally:
            HERE.inner = None
            self._clear()

    def _clear(self) -> None:
        for store in (self.delivery, self.results, self.finished, self.waiting, self.late):
            store.clear()

    def _chunks(self, edge: GradientEdge) -> Iterator[tuple[int, Tensor]]:
        """Seeds ``[v, n, d]``, some at a time, and how many have been given by then."""
        whole = self.extensions[0].whole
        chunk = 1 if self.columns == 1 and not whole else self._chunk(edge)
        self.gathered = whole and chunk == 1
        if whole and not self.gathered:
            chunk = self.columns
        passes = -(-self.columns // chunk)
        chunk = -(-self.columns // max(1, passes))  # equally many in each
        for start in range(0, self.columns, chunk):
            self.start, stop = start, min(start + chunk, self.columns)
            yield stop, self._seeds(start, stop)
        if self.columns == 0:
            yield 0, self.loss.input.new_zeros(1, self.layout.n, self.loss.input.numel() // self.layout.n)

    def _chunk(self, edge: GradientEdge) -> int:
        """How many seeds are pulled back from an edge at a time."""
        if torch.is_grad_enabled() or not self.batchable or self.joined.must_loop(edge):
            return 1
        return self.extensions[0].chunk_size or max(3, WIDEST // max(origin.widest for _, origin in self.found))

    def _seeds(self, start: int, stop: int) -> Tensor:
        """Some of the seeds, ``[v, n, d]``."""
        kind = self.extensions[0].seeds
        if kind == "gradient":
            return self.root.weighed(self.loss.grad(self.layout, self.outer))[None]
        if kind == "sampled":
            drawn = [self.root.sampled() for _ in range(start, stop)]
            return torch.stack(drawn) / self.columns**0.5 if self.columns > 1 else drawn[0][None]
        return getattr(self.root, kind)(start, stop)

    @property
    def root(self) -> LossRoot:
        """Of the loss's Hessian."""
        return self.make_root()

    @cached_property
    def columns(self) -> int:
        """The number of seeds."""
        first = self.extensions[0]
        if first.seeds in ("sampled", "gradient"):
            return first.mc_samples if first.seeds == "sampled" else 1
        return self.root.columns if first.seeds == "exact" else self.root.documented_columns

    def _place(self, seeds: Tensor, rows: Tensor | None, select: Tensor | None) -> Tensor:
        """``[v, n, d]`` in the form of the loss's input; of the selected samples only."""
        layout = self.layout
        shape = layout.split(self.loss.input).shape[1:]
        if select is not None:
            seeds, layout = seeds[:, select], replace(layout, n=len(select))
        elif rows is not None:
            chosen = torch.zeros(layout.n, dtype=seeds.dtype, device=seeds.device)
            chosen[rows] = 1
            seeds = seeds * chosen[:, None]
        return layout.join(seeds.reshape(*seeds.shape[:2], *shape), leading=1).to(self.loss.input.dtype)

    def _pull(self, edges: list[GradientEdge], ends: list[GradientEdge], seeds: list[Tensor]) -> Tensor:
        """Send seeds, given at each of the edges, through the graph.

        Returns the cotangents that reach the last of the ends (``[v]``: none do).
        """
        create = torch.is_grad_enabled()

        def pull(*seed: Tensor) -> Tensor:
            found = self.joined.grad(edges, ends, seed, create_graph=create)
            return seed[0].new_zeros(()) if found[-1] is None else found[-1]

        self.count = len(seeds[0])
        self.batched = self.count > 1
        try:
            if not self.batched:
                return pull(*(seed[0] for seed in seeds))[None]
            with pooled(() if self.block.reads_passages else self.joined.poolings, self.count, [*edges, *ends]):
                return vmap(pull, *seeds)  # recomputed activations may draw dropout again
        finally:
            forget_retained()

    def _rerun(self, rows: Tensor | None, rounded: bool = False) -> GradientEdge | None:
        """The graph of the selected samples alone, where running the module on them gives the same output.

        ``rounded``: it was computed in 16 bits before, and is not now.
        """
        edge, origin = self.found[0]
        if edge != self.loss.edge or self.layout.factor > 1 or len(self.found) > 1:
            return None
        outputs = self._run_again(origin, rows)
        expected = self.loss.input if rows is None else self.loss.input.index_select(self.layout.axis, rows)
        if outputs is None or not agree(outputs[origin.place], expected, rounded):
            return None
        return get_gradient_edge(outputs[origin.place])

    def _run_again(self, origin: Origin, rows: Tensor | None) -> list[Any] | None:
        return outputs_again(origin, rows)

    def receive(self, call: Call, place: int, grads: Tensor) -> None:
        """Note cotangents of one of a call's outputs; finish parameters that have no other use."""
        for source in self.delivery.receive(call, place, grads):
            if (
                not self.gathered
                and self.uses[id(source.tensor)] == 1
                and source.tensor.grad_fn is None
                and call.outputs == 1
            ):
                if call.recomputed:
                    self.waiting.append((call, source))
                else:
                    self._compute(source)
        if call.recomputed:
            self.late.append(call)
        if self.waiting:
            self._compute_recomputed()

    def _compute_recomputed(self) -> None:
        """Parameters whose inputs have come back since; then these may go again."""
        ready = [(call, source) for call, source in self.waiting if not is_dropped(call)]
        self.waiting = [pair for pair in self.waiting if pair not in ready]
        for _, source in ready:
            self._compute(source)
        for call, _ in ready:
            if not any(id(source.tensor) in self.delivery.arrivals for source, _ in call.uses):
                drop(call)

    def _finish(self) -> None:
        """Parameters with several uses, and those behind computed tensors."""
        HERE.inner, HERE.muted = None, True
        try:
            for source in self.delivery.computed():
                grads = self.delivery.fetch(source.tensor).individual(self.subset)
                for parameter in source.parameters:
                    derived = Derived(grads, source.tensor, parameter)
                    self.delivery.derive(source, parameter, self.subset.key, derived)
            for source in list(self.delivery.sources.values()):
                self._compute(source)
            self.delivery.clear()
            for call in self.late:
                drop(call)
        finally:
            self.waiting.clear()
            self.late.clear()
            HERE.inner, HERE.muted = self, False

    def _compute(self, source: Source) -> None:
        parameter = source.tensor
        contributions = self.delivery.fetch(parameter)
        extensions = without_rules(self.extensions, parameter, source.name, last=self.final)
        if extensions:
            if self.first:
                for extension in extensions:
                    vars(parameter).pop(extension.savefield, None)  # its memory is needed for the new result
            grads = contributions.individual(self.subset)
            if self.weights is not None:
                rows = self.subset.rows(self.weights.shape[1], self.weights.device)
                grads = grads.weighted(self.weights if rows is None else self.weights[:, rows])
            rooms = [self._room(extension, parameter, grads) for extension in extensions]
            grads.room = next((room for room in rooms if room is not None), None)
            grads.prepare([name for extension in extensions for name in extension.reads])
            self._add(parameter, grads, extensions)
        if self.final and self.last:
            self.finished.add(id(parameter))
            self.block.owners_done(parameter, self.finished)

    def _add(self, parameter: Tensor, grads: Individual, extensions: list[Curvature]) -> None:
        """Add what some seeds give to the results of a parameter."""
        values: list[Any] = []
        for extension in extensions:
            value = self._value(extension, grads)
            room = self._room(extension, parameter, grads)
            results = self.results.setdefault((id(extension), id(parameter)), [])
            if room is None:
                # Results are merged in place: none may be another's.
                values.append(value.clone() if any(value is other for other in values) else value)
                results.append(values[-1])
            elif value is grads.room:
                grads.room = None  # it is where it belongs; what further extensions keep of it are copies
            else:
                room.copy_(value)
            if len(results) > 1 and extension.additive:
                results[:] = [extension.merge(results)]
            if self.final:
                del self.results[id(extension), id(parameter)]  # whoever takes it may free it
                merged = extension.merge(results) if len(results) > 1 else results[0]
                self.block.store(parameter, extension.savefield, extension.complete(merged, grads))

    def _room(self, extension: Curvature, parameter: Tensor, grads: Individual) -> Tensor | None:
        """Where the columns of these seeds, of more to come, belong in a result that keeps those of all."""
        if extension.additive or torch.is_grad_enabled():
            return None
        seeds, samples = grads.size
        if seeds >= self.columns:
            return None
        results = self.results.setdefault((id(extension), id(parameter)), [])
        if not results:
            results.append(empty((self.columns, samples, *parameter.shape), parameter))
        return results[0][self.start : self.start + seeds]

    def _value(self, extension: Curvature, grads: Individual) -> Any:
        """What some seeds give to the result of an extension."""
        return extension.compute(grads)

    def module_passed(self, passage: Passage, g_out: tuple[Tensor | None, ...]) -> None:
        """The cotangents of a module's outputs have arrived."""
        module = passage.module
        for extension in self.extensions:
            if extension.rules and extension.rule_for(module) is not None:
                if len(g_out) > 1 or g_out[0] is None:
                    raise RuntimeError(
                        f"{type(module).__name__} has several outputs: {type(extension).__name__} can't take a rule "
                        f"for it. Do without the rule: none is needed for any module."
                    )
                tap(self, partial(self._keep, (id(extension), id(module))), g_out[0])
        if self.final and self.last:
            known = None if self.selected else passage  # that of the selected samples is not what users expect
            if not trainable(module):
                self.block.module_done(module, known)
            elif known is not None:
                self.block.passages[id(module)] = known

    def _keep(self, key: tuple[int, int], grads: Tensor) -> None:
        """Note the cotangents ``[v, n, ...]`` of a module's output for a rule."""
        rows = None if self.selected else self.subset.rows(self.layout.n, grads.device)
        self.block.pulled.setdefault(key, []).append(grads if rows is None else grads.index_select(1, rows))


def tap(running: SeedPass, receive: Callable[[Tensor], None], grad: Tensor) -> None:
    """Bring a cotangent to the running pass, as ``[v, ...]``."""
    if running.batched:
        with outside_vmap(grad, running.count) as grads:
            receive(grads)
    else:
        receive(grad[None])


PASSES["sqrt"] = SeedPass
