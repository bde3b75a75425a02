"""Second order: autograd pulls roots of the loss Hessian back through the graph that it recorded.

Before the ordinary backward pass, columns of a root of the loss's Hessian (*seeds*) are sent through the graph from its
input on, some at a time. They reach the uses of the parameters as cotangents do in first order, with one more axis.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from backpack.backward.arrivals import Contributions
from backpack.backward.block import Block
from backpack.backward.collector import Prepared
from backpack.curvature.columns import Columns
from backpack.curvature.loss_term import PASSES, Origin, Term, fewer
from backpack.curvature.losses.in_codes import classes_in_codes
from backpack.curvature.rerun import agree, output_of, outputs_again
from backpack.curvature.spliced_graph import SplicedGraph
from backpack.extensions.interface import Curvature, without_rules
from backpack.graph import shape_of, variable_of
from backpack.memory import at_a_time, empty
from backpack.modules.calls import Note
from backpack.modules.module_io import ModuleIO, module_io_of
from backpack.modules.parameters import name_of, trainable
from backpack.samples import AnyLayout, Layout, Subset
from backpack.uses import Individual


class SeedPass:
    """Seeds of one kind, for extensions that share them, pulled back chunk by chunk.

    ``last``: nothing else will be computed for the block, so that a module is done when this pass is through it.
    """

    reads_all_uses = False
    """Whether it goes through the uses of all parameters, also if results are wanted of some only."""
    double_backward = False
    """Whether the model is differentiated twice, so that it is run again where it has fused functions."""

    def __init__(self, block: Block, extensions: list[Any], origin: Origin, last: bool) -> None:
        self.block, self.extensions, self.origin, self.last = block, extensions, origin, last
        self.terms = origin.terms
        self.prepared, self.notes, self.module_io = self._only(origin.prepared), origin.notes, origin.module_io
        self.n = self.prepared.n
        like = self.terms[0].call.input
        self.device, self.dtype = like.device, like.dtype
        edges, order = [term.call.edge for term in self.terms], self.prepared.graph.order
        self.spliced = SplicedGraph(edges, known=order[min(order.index(edge.node) for edge in edges) :])
        self.start_tensors = [term.call.input for term in self.terms]
        """Where the graph starts."""
        self.layouts: Sequence[AnyLayout] = [term.layout for term in self.terms]
        """Where the samples lie there."""
        self.results: dict[tuple[int, int], list[Any]] = {}
        self.final = False
        self.gathered = self.selected = False
        self.batchable = True
        self.collector: Columns | None = None
        self.start = 0
        self.weights: Tensor | None = None
        self.finished: set[int] = set()
        self.subset: Subset = extensions[0].subset

    @property
    def _name(self) -> str:
        """The class of an extension, for messages."""
        return type(self.extensions[0]).__name__

    @property
    def with_rules(self) -> dict[Node, list[tuple[Any, ModuleIO]]]:
        """Extensions and calls of modules that they have a rule for, by the node that computed the module's output."""
        found: dict[Node, list[tuple[Any, ModuleIO]]] = {}
        for node, module_io in self.module_io.items():
            for io, extension in product(module_io, self.extensions):
                if extension.rules and extension.rule_for(io.module) is not None:
                    found.setdefault(node, []).append((extension, io))
        return found

    @property
    def to_report(self) -> dict[Node, list[ModuleIO]]:
        """Calls of modules that a user is told of when this pass is through them."""
        return self.module_io if self.last and self.block.extension_hook is not None else {}

    def refuse_rules(self) -> None:
        """Raise where an extension has rules of users."""
        for extension in self.extensions:
            if extension.rules:
                raise RuntimeError(
                    f"{type(extension).__name__} takes no rules of users: none is needed for any module. Construct it "
                    f"without set_module_extension()."
                )

    def _only(self, prepared: Prepared) -> Prepared:
        return prepared if self.reads_all_uses else prepared.only(self.block.only)

    def report(self, io: ModuleIO) -> None:
        """Tell the user that a module is done: the last columns have come to its output."""
        known = None if self.selected else io  # that of the selected samples is not what users expect
        if not trainable(io.module):
            self.block.module_done(io.module, known)
        elif known is not None:
            self.block.module_io[id(io.module)] = known

    def run(self) -> None:
        """Pull back all seeds and store the results."""
        if not self.prepared.plan.expected:
            deque(self._chunks(), maxlen=0)  # what is drawn next does not depend on which results are wanted
            return
        rows = self.subset.rows(self.n, self.device)
        if rows is not None and self._select(rows):
            self.subset = Subset()
        try:
            self._together_or_not(lambda: self._pull_all(rows))
        finally:
            self._clear()

    def _together_or_not(self, pull: Callable[[], None]) -> None:
        """Pull several seeds back at a time; if that fails, one by one."""
        try:
            pull()
        except RuntimeError:
            if self.collector is None or not self.collector.batched:
                raise
            self._clear()  # a node that vmap_limits.py does not know cannot take seeds together, or memory was short
            self.batchable = False
            pull()

    def _pull_all(self, rows: Tensor | None) -> None:
        for number, seeds in self._chunks():
            self.collector = columns = self.collector or Columns(self, self.spliced)
            self.final = number >= self.columns
            columns.pull(self.spliced.starts, self._place(seeds, rows))
            if self.final or not self.gathered:
                columns.finish()

    def _switch_to(self, spliced: SplicedGraph, layouts: Sequence[AnyLayout]) -> None:
        """Continue with a graph that was recorded anew."""
        self.spliced, self.layouts = spliced, layouts
        prepared, self.notes = self.origin.prepare(spliced.starts, layouts, spliced.replaced)
        self.prepared = self._only(prepared)
        self.spliced.known = self.prepared.graph.order
        self.module_io = module_io_of(self.prepared.graph) if self.module_io else {}

    def _clear(self) -> None:
        self.results.clear()
        self.finished.clear()
        self.collector = None  # it refers to this pass, and both to the graph

    @property
    def widest(self) -> int:
        """Entries of the largest output of a node that uses parameters; those in codes are made for one sample."""
        sizes = [torch.Size(shape_of(node, 0)).numel() for node in self.prepared.plan.uses]
        coded = [term.call.input.shape[0] * classes_in_codes(term.call.loss) // max(1, self.n) for term in self.terms]
        return max(*sizes, *coded, 1)

    @property
    def _entries_pulled_through(self) -> int:
        """Entries of the samples' gradients, for one seed, that go through regions where samples are mixed."""
        plan = self.prepared.plan
        leaves = {leaf for entry in plan.mixed for leaf in plan.entries[entry]}
        return self.n * sum(variable_of(leaf).numel() for leaf in leaves)

    def _chunks(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Seeds ``[v, r, d]`` of each term, some at a time, and how many have been given by then."""
        whole = self.extensions[0].whole
        chunk = 1 if self.columns == 1 and not whole else self._chunk
        self.gathered = whole and chunk == 1
        if whole and not self.gathered:
            chunk = max(1, self.columns)
        passes = max(1, -(-self.columns // chunk))
        chunk = max(1, -(-self.columns // passes))  # equally many in each
        for start in range(0, self.columns, chunk):
            self.start, stop = start, min(start + chunk, self.columns)
            yield stop, self._seeds(start, stop)
        if self.columns == 0:
            yield 0, [term.none(1) for term in self.terms]

    @property
    def _chunk(self) -> int:
        """How many seeds are pulled back at a time."""
        if torch.is_grad_enabled() or not self.batchable or self.spliced.must_loop:
            return 1
        most = at_a_time("columns", self.device)
        if self.prepared.plan.mixed:
            return max(1, min(self.extensions[0].chunk_size or most, most // self._entries_pulled_through))
        return self.extensions[0].chunk_size or max(3, most // self.widest)

    def _seeds(self, start: int, stop: int) -> list[Tensor]:
        """Some of the seeds, for each term ``[v, r, d]``: those of one term after the other, zero for other terms."""
        found, end = [], 0
        for term, count in zip(self.terms, self.counts, strict=True):
            begin, end = end, end + count
            first, last = max(start, begin), min(stop, end)
            if first >= last:
                found.append(term.none(stop - start))
                continue
            own = self._columns_of(term, first - begin, last - begin)
            around = term.none(first - start), term.none(stop - last)
            found.append(own if len(own) == stop - start else torch.cat([around[0], own, around[1]]))
        return found

    def _columns_of(self, term: Term, start: int, stop: int) -> Tensor:
        """Some of the columns of a loss's root, ``[v, r, d]``."""
        first = self.extensions[0]
        if first.seeds == "gradient":
            return term.root.weighed(term.grad())[None]
        if first.seeds == "sampled":
            drawn = term.root.drawn(stop - start)
            return drawn / first.mc_samples**0.5 if first.mc_samples > 1 else drawn
        return getattr(term.root, first.seeds)(start, stop)

    @cached_property
    def counts(self) -> list[int]:
        """The number of seeds of each term."""
        first = self.extensions[0]
        if first.seeds in ("sampled", "gradient"):
            return [first.mc_samples if first.seeds == "sampled" else 1] * len(self.terms)
        roots = [term.root for term in self.terms]
        return [root.columns if first.seeds == "exact" else root.documented_columns for root in roots]

    @property
    def columns(self) -> int:
        """The number of seeds."""
        return sum(self.counts)

    def _place(self, seeds: Sequence[Tensor], rows: Tensor | None) -> list[Tensor]:
        """Seeds ``[v, r, d]`` of each term in the form of the loss's input, for the selected samples only."""
        return [term.placed(own, rows, self.selected) for term, own in zip(self.terms, seeds, strict=True)]

    def _select(self, rows: Tensor, rounded: bool = False) -> bool:
        """Continue with a graph of the selected samples alone, if running the module on them gives the same outputs.

        ``rounded``: the outputs were computed in 16 bits before, and must not be now.
        """
        notes = [self.notes.get(term.call.place) for term in self.terms]
        calls = {id(note.arguments): note for note in (*self.notes.values(), *notes) if note is not None}
        is_regular = all(isinstance(term.layout, Layout) and term.layout.factor == 1 for term in self.terms)
        if None in notes or len(calls) > 1 or not is_regular or self.prepared.plan.mixed:
            return False
        (note,) = calls.values()
        outputs = self._run_again(note, rows) if note.attached is None else []
        found: list[Tensor] = []
        for term, own in zip(self.terms, notes, strict=True):
            again = None if own is None else output_of(own, outputs)
            expected = term.call.input.index_select(term.layout.axes[0], rows)
            if again is None or not agree(again, expected, rounded):
                return False
            found.append(again)
        spliced = SplicedGraph([get_gradient_edge(again) for again in found])
        if rounded and spliced.has_autocast:
            return False
        self.start_tensors, self.selected = found, True
        self._switch_to(spliced, [fewer(layout, len(rows)) for layout in self.layouts])
        return True

    def _run_again(self, note: Note, rows: Tensor | None) -> list[Any]:
        return outputs_again(note, rows, self.n, self.double_backward)

    def keep_for_rules(self, calls: Sequence[tuple[Any, ModuleIO]], grads: Mapping[int, Tensor]) -> None:
        """Note the columns ``[v, n, ...]`` at a module's output for the rules of extensions."""
        for extension, io in calls:
            if len(io.numbers) > 1 or io.numbers[0] not in grads:
                raise RuntimeError(
                    f"{type(io.module).__name__} has several outputs: {type(extension).__name__} can't take a rule for "
                    f"it. Do without the rule: none is needed for any module."
                )
            own = grads[io.numbers[0]]
            rows = None if self.selected else self.subset.rows(self.n, own.device)
            own = own if rows is None else own.index_select(1, rows)
            self.block.pulled.setdefault((id(extension), id(io.module)), []).append(own)

    def compute(self, contributions: Contributions) -> None:
        """Compute results of a parameter, at which all of some columns has arrived."""
        parameter = contributions.tensor
        extensions = without_rules(self.extensions, parameter, name_of(parameter), last=self.final)
        if extensions:
            grads = self._weighed(contributions)
            rooms = [self._room(extension, parameter, grads) for extension in extensions]
            grads.room = next((room for room in rooms if room is not None), None)
            grads.prepare([name for extension in extensions for name in extension.reads])
            self._add(parameter, grads, extensions)
        if self.final and self.last:
            self.finished.add(id(parameter))
            self.block.owners_done(parameter, self.finished)

    def _weighed(self, contributions: Contributions) -> Individual:
        grads = contributions.individual(self.subset)
        if self.weights is None:
            return grads
        rows = self.subset.rows(self.weights.shape[1], self.weights.device)
        weights = self.weights.to(contributions.dtype)  # of parts in another precision as well
        return grads.weighted(weights if rows is None else weights[:, rows])

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
        """Where the columns of these seeds belong in a result that keeps the columns of all seeds."""
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


PASSES["sqrt"] = SeedPass
