"""Where samples begin: at the outputs of extended modules, and along which of their axes.

A sample is a row of an extended model's output: along axis 0, unless the sizes of the module's inputs allow another
axis. Where they leave a choice, nodes that saved an input of the module prove it (``evidence.py``). If there is no such
node, we take the layout under which samples stay apart. If that does not decide either, a copy of the module runs on
one row less, without gradients, and we take the axis that shrinks.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from torch.autograd.graph import Node

from backpack.graph import Edge, Graph, shape_of
from backpack.modules.calls import Note, run_on_fewer
from backpack.samples.evidence import layout_of_saved, proved, saved_inputs
from backpack.samples.ids import SampleIds
from backpack.samples.layouts import AnyLayout, Layout, layouts_in_blocks, same
from backpack.samples.owners import Owners, is_single_parameter
from backpack.samples.rows_above import Sweep, layouts_above
from backpack.torch_internals import memory_of


def candidates(shape: Sequence[int], note: Note) -> list[Layout]:
    """The layouts that an output may have, the one along axis 0 first."""
    first = note.axis if len(shape) > note.axis else 0
    sizes = note.sizes
    several = [n for n in sizes if n > 1]
    found = [Layout(n, axis) for n in several for axis in range(len(shape)) if axis != first and shape[axis] == n]
    if shape[first] == 1:
        return found if found and 1 not in sizes else [Layout(1, first)]
    if sizes == [1]:  # of the one sample, the output has several rows
        return [Layout(1, inner=shape[0])]
    found.insert(0, Layout(shape[first], first))
    if shape[first] not in sizes:
        blocks = [n for n in note.sizes_of_data if n > 1]
        found += [layout for n in blocks for layout in layouts_in_blocks(shape, n)]
    return found


def decide(
    graph: Graph,
    notes: dict[Edge, Note],
    calls: Sequence[Note],
    sweep: Sweep,
    wanted: set[Node],
    ids: SampleIds | None = None,
    single: Container[Edge] = (),
) -> tuple[dict[Edge, AnyLayout], Owners]:
    """Where the samples begin, and what follows from that for all other edges.

    ``calls``: of extended modules; ``wanted``: the nodes of parameters; ``ids``: as a user numbers the samples;
    ``single``: outputs that are of one sample.

    Raises:
        RuntimeError: It cannot be told.
    """
    for note in notes.values() if ids is None else ():
        if note.is_packed:
            raise RuntimeError(
                f"The output of {_name(note)} is a packed sequence, whose rows are positions of several samples: call "
                f"torch.nn.utils.rnn.pad_packed_sequence inside of the module that is extended, or pad the sequences."
            )
    shapes = {edge: shape for edge in notes if (shape := shape_of(*edge))}
    possible: dict[Edge, Sequence[Layout]] = {}
    if ids is None:
        possible = {
            edge: [Layout(1, inner=shape[0])] if edge in single else candidates(shape, notes[edge])
            for edge, shape in shapes.items()
        }
        chosen: dict[Edge, AnyLayout] = {edge: layouts[0] for edge, layouts in possible.items()}
    else:
        chosen = {edge: ids.layout(shape) for edge, shape in shapes.items() if ids.fits(shape)}
    decision = Decision(graph, calls, sweep, ids, chosen, sweep(chosen))
    for edge, shape in shapes.items():
        if edge not in chosen and edge in decision.owners.above:
            raise RuntimeError(
                f"sample_ids, of shape {list(ids.shape if ids else ())}, does not fit the output of "
                f"{_name(notes[edge])}, of shape {list(shape)}: give one number for each entry along its first axis, "
                f"or along its first axes."
            )
    for edge, layouts in possible.items():
        if len(layouts) > 1 and decision.is_taken(edge):
            decision.choose(edge, layouts, notes[edge])
    for edge in possible:
        if decision.is_taken(edge):
            decision.refuse_whole_inputs(edge, notes[edge])
    decision.begin_elsewhere(wanted)
    return decision.chosen, decision.owners


def _name(note: Note) -> str:
    module = note.module()
    return "a module" if module is None else type(module).__name__


@dataclass(eq=False)
class Decision:
    """The layouts that are ``chosen`` so far for edges where samples begin, and what follows from them."""

    graph: Graph
    calls: Sequence[Note]
    sweep: Sweep
    ids: SampleIds | None
    chosen: dict[Edge, AnyLayout]
    owners: Owners

    def is_taken(self, edge: Edge) -> bool:
        """Whether samples begin at an edge with the layout chosen for it, and not above."""
        return self.owners.owned.get(edge) is self.chosen[edge]

    def choose(self, edge: Edge, layouts: Sequence[Layout], note: Note) -> None:
        """Choose between the layouts that an output of a module may have; the first is the one along axis 0.

        Raises:
            RuntimeError: Several are as good.
        """
        first, *others = layouts
        verdict = proved(self.owners, [note], first.n)
        if verdict:
            return
        attempts = [
            (first, self.owners),
            *((layout, self.sweep({**self.chosen, edge: layout})) for layout in others),
        ]
        self.chosen[edge], self.owners = self._best(edge, attempts, note, verdict)

    def _best(
        self, edge: Edge, attempts: Sequence[tuple[Layout, Owners]], note: Note, verdict: bool | None
    ) -> tuple[Layout, Owners]:
        """The best of several layouts, with what follows from each; ``verdict``: of the proof of the first."""
        first = attempts[0][0]
        shown = [one for one in attempts[1:] if proved(one[1], [note], one[0].n)]
        if shown and (verdict is False or first.n not in note.sizes):
            return shown[0]
        left = [*(attempts[:1] if verdict is None else ()), *(shown or attempts[1:])]
        least = None if shown else _least_mixed(self.graph, left)
        if least is not None and least[0] is first:
            return least
        found = _by_running(edge, left, note) or least
        if found is not None:
            return found
        beside = [one for one in left if one[0].axis != first.axis and not _least_mixed(self.graph, [attempts[0], one])]
        if verdict is None and not shown and (first.n in note.sizes or not beside):
            return attempts[0]
        ways = dict.fromkeys(f"{layout.n} along axis {layout.axis}" for layout, _ in left)
        raise RuntimeError(
            f"The output of {_name(note)}, of shape {list(shape_of(*edge))}, does not tell where its samples lie: "
            f"{' or '.join(ways)}. Let the first axis of inputs and output count the samples; or say with "
            f"sample_ids= which sample each entry of the output belongs to."
        )

    def refuse_whole_inputs(self, edge: Edge, note: Note) -> None:
        """Raise where the output of a module has no axis of samples, as each of its entries depends on all inputs."""
        n, owners = self.chosen[edge].n, self.owners
        if n == 1 or len(note.inputs) != 1 or (n in note.sizes and note.inputs[0].dim() > 1):
            return
        (given,) = note.inputs
        is_used = False
        for node in self.graph.order:
            for k, value in saved_inputs(node):
                if memory_of(value) == memory_of(given):
                    if node in owners.sends and layout_of_saved(node, owners, k, value) is not None:
                        return
                    is_used = True
        if is_used:
            raise RuntimeError(
                f"The output of {_name(note)}, of shape {list(shape_of(*edge))}, has no axis of samples: each of its "
                f"entries depends on the whole input, of shape {list(given.shape)}. Give the input an axis of samples, "
                f"x[None] for one sample; or say with sample_ids= which sample each entry of the output belongs to."
            )

    def begin_elsewhere(self, wanted: set[Node]) -> None:
        """Let samples also begin at edges above all modules' outputs: derivatives, losses that a model computes itself.

        Such an edge is the first one on its path with an axis of the samples' size. That is proved where it comes to
        rows whose samples are known already, or to nodes that saved an input of a module. What does neither belongs to
        no sample. ``wanted``: the nodes of parameters.
        """
        left = [edge for edge in self.owners.above if edge not in self.owners.joined]
        if not any(edge[0] in wanted or edge in self.owners.mixed for edge in left):
            return
        sizes = {layout.n for edge, layout in self.chosen.items() if self.is_taken(edge)}
        data = self._above_data()
        needed = self._above_parameters(wanted)
        for node in self.graph.order:
            if node not in needed or node not in data:
                continue
            for number in sorted(number for other, number in self.owners.above if other is node):
                shape, edge = shape_of(node, number), (node, number)
                if not shape or edge in self.owners.owned:
                    continue
                for layout in self._layouts_elsewhere(shape, sizes):
                    attempt = self.sweep({**self.chosen, edge: layout})
                    is_told = self.ids is not None and not sizes
                    if is_told or self._agrees(attempt, layout.n, data):
                        self.chosen, self.owners = {**self.chosen, edge: layout}, attempt
                        break
        self._begin_above(wanted)

    def _begin_above(self, wanted: set[Node]) -> None:
        """Let samples begin where parameters are used above all edges at which they begin so far, if rows tell."""
        found = layouts_above(self.graph, self.owners, self.chosen, self.sweep, wanted)
        if found:
            attempt = self.sweep({**self.chosen, **found})
            if all(same(layout, attempt.owned.get(edge)) for edge, layout in self.owners.owned.items()):
                self.chosen, self.owners = {**self.chosen, **found}, attempt

    def _above_data(self) -> set[Node]:
        """The nodes behind which there are samples, or inputs of modules."""
        inputs = {memory_of(tensor) for note in self.calls for tensor in note.inputs}
        found: set[Node] = set()
        for node in reversed(self.graph.order):
            is_above = any(edge[0] in found or edge in self.owners.owned for edge in self.graph.inputs_of(node))
            if is_above or any(memory_of(tensor) in inputs for _, tensor in saved_inputs(node)):
                found.add(node)
        return found

    def _above_parameters(self, wanted: set[Node]) -> set[Node]:
        """The nodes above the samples from which paths lead to parameters, or to where samples are mixed."""
        owners, above = self.owners, {node for node, _ in self.owners.above}
        found: set[Node] = set()
        for node in reversed(self.graph.order):
            following = self.graph.inputs_of(node)
            is_used = any(edge in owners.mixed or edge[0] in wanted or edge[0] in found for edge in following)
            if is_used and node in above and node not in owners.sends:
                found.add(node)
        return found

    def _layouts_elsewhere(self, shape: Sequence[int], sizes: set[int]) -> Sequence[AnyLayout]:
        if self.ids is not None:
            return [self.ids.layout(shape)] if self.ids.fits(shape) else []
        if not sizes:
            return [layout for note in self.calls for layout in candidates(shape, note) if layout.n in note.sizes]
        exact = [Layout(n, axis) for n in sizes for axis in range(len(shape)) if shape[axis] == n]
        return exact + [layout for n in sizes if n > 1 for layout in layouts_in_blocks(shape, n)]

    def _agrees(self, after: Owners, n: int, data: set[Node]) -> bool:
        """Whether known owners stay so with another beginning, and it is proved by one of them, or by a saved input.

        ``data``: nodes behind which inputs are. Where they are mixed there is no proof, and the new beginning is taken.
        """
        before = self.owners
        if any(not same(layout, after.owned.get(edge)) for edge, layout in before.owned.items()):
            return False
        new = [edge for node in after.sends if node not in before.sends for edge in self.graph.edges[node]]
        if any(edge in before.owned or (edge in before.mixed and edge[0] in data) for edge in new):
            return True
        if any(edge in before.above and edge not in after.above for edge in before.owned):
            return True
        return bool(proved(after, self.calls, n))


def _least_mixed(graph: Graph, attempts: Sequence[tuple[Layout, Owners]]) -> tuple[Layout, Owners] | None:
    """The layout under which samples are mixed at fewer nodes, all of which are mixed under the others as well."""
    if len(attempts) < 2:
        return None
    mixed = [{node for node, _ in owners.mixed if not is_single_parameter(node, graph)} for _, owners in attempts]
    for attempt, own in zip(attempts, mixed, strict=True):
        if all(own < other for other in mixed if other is not own):
            return attempt
    return None


def _by_running(edge: Edge, attempts: Sequence[tuple[Layout, Owners]], note: Note) -> tuple[Layout, Owners] | None:
    """The layout whose axis shrinks when the module runs on one row less; ``None``: there is not one alone."""
    found = []
    for layout, owners in attempts:
        expected = list(shape_of(*edge))
        expected[layout.axis] -= layout.factor
        output = note.outputs(run_on_fewer(note, layout.n))
        if list(getattr(output, "shape", ())) == expected:
            found.append((layout, owners))
    return found[0] if len(found) == 1 else None
