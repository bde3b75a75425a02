"""Where samples begin: at the outputs of extended modules, and along which of their axes.

A sample is a row of an extended model's output: along axis 0, unless the sizes of the module's inputs allow another
axis. Where they leave a choice, nodes that saved an input of the module prove it (``evidence.py``). If there is no such
node, we take the layout under which samples stay apart. If that does not decide either, a copy of the module runs on
one row less, without gradients, and we take the axis that shrinks.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from torch.autograd.graph import Node

from backpack.graph import Edge, Graph, shape_of
from backpack.modules.calls import Note, run_on_fewer
from backpack.samples.evidence import layout_of_saved, proved, saved_inputs
from backpack.samples.ids import SampleIds
from backpack.samples.layouts import AnyLayout, Layout, layouts_in_blocks, same
from backpack.samples.owners import Owners, is_single_parameter
from backpack.torch_internals import memory_of

Sweep = Callable[[dict[Edge, AnyLayout]], Owners]


def candidates(shape: Sequence[int], note: Note) -> list[Layout]:
    """The layouts that an output may have, the one along axis 0 first."""
    first = note.axis if len(shape) > note.axis else 0
    sizes = note.sizes
    several = [n for n in sizes if n > 1]
    found = [Layout(n, axis) for n in several for axis in range(len(shape)) if axis != first and shape[axis] == n]
    if shape[first] == 1:
        return found if found and 1 not in sizes else [Layout(1, first)]
    found.insert(0, Layout(shape[first], first))
    if shape[first] not in sizes:
        blocks = [n for n in note.sizes_of_data if n > 1 or sizes == [1]]
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
    owners = sweep(chosen)
    for edge, shape in shapes.items():
        if edge not in chosen and edge in owners.above:
            raise RuntimeError(
                f"sample_ids, of shape {list(ids.shape if ids else ())}, does not fit the output of "
                f"{_name(notes[edge])}, of shape {list(shape)}: give one number for each entry along its first axis, "
                f"or along its first axes."
            )
    for edge, layouts in possible.items():
        if len(layouts) > 1 and owners.owned.get(edge) is chosen[edge]:
            choice = Choice(graph, edge, layouts, notes[edge], chosen, owners, sweep)
            chosen[edge], owners = choice.made()
    for edge, layout in chosen.items() if ids is None else ():
        if owners.owned.get(edge) is layout:
            _refuse_whole_inputs(graph, owners, edge, notes[edge], layout.n)
    if _has_more(owners, wanted):
        chosen, owners = _elsewhere(graph, calls, chosen, owners, sweep, wanted, ids)
    return chosen, owners


def _refuse_whole_inputs(graph: Graph, owners: Owners, edge: Edge, note: Note, n: int) -> None:
    """Raise where the output of a module has no axis of samples, as each of its entries depends on all inputs."""
    if n == 1 or len(note.inputs) != 1 or (n in note.sizes and note.inputs[0].dim() > 1):
        return
    (given,) = note.inputs
    is_used = False
    for node in graph.order:
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


def _name(note: Note) -> str:
    module = note.module()
    return "a module" if module is None else type(module).__name__


@dataclass(eq=False)
class Choice:
    """Between the layouts that an output of a module may have; the first is the one along axis 0."""

    graph: Graph
    edge: Edge
    layouts: Sequence[Layout]
    note: Note
    chosen: dict[Edge, AnyLayout]
    owners: Owners
    sweep: Sweep

    def made(self) -> tuple[Layout, Owners]:
        """The layout, and what follows from it.

        Raises:
            RuntimeError: Several are as good.
        """
        first, *others = self.layouts
        verdict = proved(self.owners, [self.note], first.n)
        if verdict:
            return first, self.owners
        attempts = [
            (first, self.owners),
            *((layout, self.sweep({**self.chosen, self.edge: layout})) for layout in others),
        ]
        shown = [one for one in attempts[1:] if proved(one[1], [self.note], one[0].n)]
        if shown and (verdict is False or first.n not in self.note.sizes):
            return shown[0]
        left = [*(attempts[:1] if verdict is None else ()), *(shown or attempts[1:])]
        least = None if shown else _least_mixed(self.graph, left)
        if least is not None and least[0] is first:
            return least
        found = _by_running(self.edge, left, self.note) or least
        if found is not None:
            return found
        beside = [one for one in left if one[0].axis != first.axis and not _least_mixed(self.graph, [attempts[0], one])]
        if verdict is None and not shown and (first.n in self.note.sizes or not beside):
            return attempts[0]
        ways = dict.fromkeys(f"{layout.n} along axis {layout.axis}" for layout, _ in left)
        raise RuntimeError(
            f"The output of {_name(self.note)}, of shape {list(shape_of(*self.edge))}, does not tell where its samples "
            f"lie: {' or '.join(ways)}. Let the model return the samples along the first axis, of a size that no other "
            f"axis has."
        )


def _least_mixed(graph: Graph, attempts: Sequence[tuple[Layout, Owners]]) -> tuple[Layout, Owners] | None:
    """The layout under which samples are mixed at fewer nodes, all of which are mixed under the others as well."""
    if len(attempts) < 2:
        return None
    mixed = [{node for node, _ in owners.mixed if not is_single_parameter(node, graph)} for _, owners in attempts]
    for attempt, own in zip(attempts, mixed, strict=True):
        if all(own < other for other in mixed if other is not own):
            return attempt
    return None


def _has_more(owners: Owners, wanted: set[Node]) -> bool:
    """Whether something but the samples' rows reaches parameters, directly or where samples are mixed."""
    left = [edge for edge in owners.above if edge not in owners.joined]
    return any(edge[0] in wanted or edge in owners.mixed for edge in left)


def _elsewhere(
    graph: Graph,
    calls: Sequence[Note],
    chosen: dict[Edge, AnyLayout],
    owners: Owners,
    sweep: Sweep,
    wanted: set[Node],
    ids: SampleIds | None,
) -> tuple[dict[Edge, AnyLayout], Owners]:
    """Samples also begin at edges that no module's output is above: derivatives, losses that a model computes itself.

    Such an edge is the first one on its path with an axis of the samples' size. That is proved where it comes to rows
    whose samples are known already, or to nodes that saved an input of a module. What does neither belongs to no
    sample.
    """
    sizes = {layout.n for edge, layout in chosen.items() if owners.owned.get(edge) is layout}
    inputs = {memory_of(tensor) for note in calls for tensor in note.inputs}
    above = {node for node, _ in owners.above}
    reaches_data: set[Node] = set()
    is_needed: set[Node] = set()
    for node in reversed(graph.order):
        following = graph.inputs_of(node)
        is_above_data = any(edge[0] in reaches_data or edge in owners.owned for edge in following)
        if is_above_data or any(memory_of(tensor) in inputs for _, tensor in saved_inputs(node)):
            reaches_data.add(node)
        is_used = any(edge in owners.mixed or edge[0] in wanted or edge[0] in is_needed for edge in following)
        if is_used and node in above and node not in owners.sends:
            is_needed.add(node)
    for node in graph.order:
        if node not in is_needed or node not in reaches_data:
            continue
        for number in sorted(number for other, number in owners.above if other is node):
            shape = shape_of(node, number)
            if not shape or (node, number) in owners.owned:
                continue
            for layout in _layouts_elsewhere(shape, sizes, calls, ids):
                attempt = sweep({**chosen, (node, number): layout})
                is_told = ids is not None and not sizes
                if is_told or _agrees(graph, owners, attempt, calls, layout.n, reaches_data):
                    chosen, owners = {**chosen, (node, number): layout}, attempt
                    break
    return chosen, owners


def _layouts_elsewhere(
    shape: Sequence[int], sizes: set[int], calls: Sequence[Note], ids: SampleIds | None
) -> Sequence[AnyLayout]:
    if ids is not None:
        return [ids.layout(shape)] if ids.fits(shape) else []
    if not sizes:
        return [layout for note in calls for layout in candidates(shape, note) if layout.n in note.sizes]
    exact = [Layout(n, axis) for n in sizes for axis in range(len(shape)) if shape[axis] == n]
    return exact + [layout for n in sizes if n > 1 for layout in layouts_in_blocks(shape, n)]


def _agrees(graph: Graph, before: Owners, after: Owners, calls: Sequence[Note], n: int, data: set[Node]) -> bool:
    """Whether what was known of edges stays so, and the new edge is proved by one of them, or by a saved input.

    ``data``: nodes behind which inputs are. Where they are mixed there is no proof, and the rows of the edge are taken.
    """
    if any(not same(layout, after.owned.get(edge)) for edge, layout in before.owned.items()):
        return False
    if any(
        edge in before.mixed and edge[0] in data
        for node in after.sends
        if node not in before.sends
        for edge in graph.edges[node]
    ):
        return True
    joined = any(edge in before.above and edge not in after.above for edge in before.owned)
    if joined or any(
        edge in before.owned and node not in before.sends for node in after.sends for edge in graph.edges[node]
    ):
        return True
    return bool(proved(after, calls, n))


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
