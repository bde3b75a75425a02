"""Where samples begin: at the outputs of extended modules, and along which of their axes.

A sample is a row of an extended model's output: along axis 0, if nothing speaks against it. What may speak against it
are the sizes of what the module was given. Where these leave a choice, it must be proved in the pass that uses it: a
node that saved an input of the module must own, row by row, what the input's rows say. Where none did, the layout under
which samples stay apart is taken; where that is no answer either, a copy of the module runs on one row less, without
gradients, and the axis that shrinks is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack.graph import Edge, Graph, kind, saved, shape_of
from backpack.modules.calls import Note, run_on_fewer
from backpack.samples.ids import SampleIds
from backpack.samples.layout_rules import broadcast_from
from backpack.samples.layouts import AnyLayout, Layout, same
from backpack.samples.owners import Owners, is_single_parameter
from backpack.torch_internals import is_packed

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
        blocks = [n for n in note.sizes_of_data if 0 < n < shape[0] and shape[0] % n == 0 and (n > 1 or sizes == [1])]
        found += [Layout(n, 0, *pair) for n in blocks for pair in ((1, shape[0] // n), (shape[0] // n, 1))]
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
            if value.untyped_storage()._cdata == given.untyped_storage()._cdata:
                sent = owners.sends.get(node)
                if sent is not None and _of_saved(node, graph, owners, k, value, sent) is not None:
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
        verdict = proved(self.graph, self.owners, [self.note], first.n)
        if verdict:
            return first, self.owners
        attempts = [
            (first, self.owners),
            *((layout, self.sweep({**self.chosen, self.edge: layout})) for layout in others),
        ]
        shown = [one for one in attempts[1:] if proved(self.graph, one[1], [self.note], one[0].n)]
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
    inputs = {tensor.untyped_storage()._cdata for note in calls for tensor in note.inputs}
    above = {node for node, _ in owners.above}
    reaches_data: set[Node] = set()
    is_needed: set[Node] = set()
    for node in reversed(graph.order):
        following = [(other, number) for other, number in graph.edges[node] if other is not None]
        if any(other in reaches_data or edge in owners.owned for edge in following for other in edge[:1]) or any(
            tensor.untyped_storage()._cdata in inputs for _, tensor in saved_inputs(node)
        ):
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
    blocks = [n for n in sizes if n > 1 and shape[0] > n and shape[0] % n == 0]
    return exact + [Layout(n, 0, *pair) for n in blocks for pair in ((1, shape[0] // n), (shape[0] // n, 1))]


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
    return bool(proved(graph, after, calls, n))


SAVED = {
    "Addmm": {1: "mat1", 2: "mat2"},
    "Mm": {0: "self", 1: "mat2"},
    "Bmm": {0: "self", 1: "mat2"},
    "Baddbmm": {1: "batch1", 2: "batch2"},
    "Mul": {0: "self", 1: "other"},
    "Convolution": {0: "input"},
    "NativeLayerNorm": {0: "input"},
    "NativeGroupNorm": {0: "input"},
    "NativeBatchNorm": {0: "input"},
    "Embedding": {0: "indices"},
    "MkldnnRnnLayer": {0: "input"},
}
"""Under which names kinds of nodes save their inputs."""


def saved_inputs(node: Node) -> Iterator[tuple[int, Tensor]]:
    """The inputs that a node saved, and their places; none that are computed again when they are read."""
    for k, name in SAVED.get(kind(node), {}).items():
        raw = getattr(node, f"_raw_saved_{name}", None)  # a product with a number has none
        if raw is not None and not is_packed(raw):
            found = getattr(node, f"_saved_{name}")
            if found is not None:
                yield k, found


def proved(graph: Graph, owners: Owners, calls: Sequence[Note], n: int) -> bool | None:
    """Whether nodes that saved an input of a module own what its ``n`` rows say; ``None``: there are none.

    One that does is a proof, and so are several of which each belongs to a sample of its own. One of which no row
    belongs to a single sample, but each entry does, speaks against it, and so does it if several samples have all
    inputs of this size in common.
    """
    inputs: dict[int, tuple[Tensor, int]] = {}
    storages: set[int] = set()
    shared: set[int] = set()
    whole: dict[tuple[int, int], int] = {}
    for call in calls:
        for tensor in call.inputs:
            storages.add(tensor.untyped_storage()._cdata)
            if tensor.dim() and tensor.shape[call.axis_of(tensor)] == n and tensor.numel():
                inputs[tensor.untyped_storage()._cdata] = (tensor, call.axis_of(tensor))
    against = False
    for node, sent in owners.sends.items():
        if kind(node) == "EmbeddingBag" and saved(node, "offsets").untyped_storage()._cdata in storages:
            if owners.owned[node, 0].axes == [0]:
                return True
            against = True
        for k, value in saved_inputs(node):
            storage = value.untyped_storage()._cdata
            own = _of_saved(node, graph, owners, k, value, sent) if storage in storages else None
            if own is None or own.n != n:
                continue
            owner = own.owners(value.shape, torch.device("cpu"))
            if n > 1 and len(samples := owner.unique()) == 1:
                whole[storage, int(value.storage_offset())] = int(samples)
                if len(set(whole.values())) > 1:
                    return True
            if storage in inputs:
                evidence = _evidence(owner.expand(value.shape), *inputs[storage], value)
                if evidence is Evidence.FOR:
                    return True
                against = against or evidence is Evidence.AGAINST
                shared.update({storage} if evidence is Evidence.SHARED else ())
    return False if against or (shared and shared == set(inputs)) else None


class Evidence(Enum):
    """What the samples of some entries say of the layout that they follow from."""

    FOR = "they are those of the rows of an input"
    AGAINST = "they are others"
    SHARED = "several have entries in common"
    NOTHING = "there are entries of one row at most"


def _evidence(owner: Tensor, tensor: Tensor, axis: int, like: Tensor) -> Evidence:
    """Whether entries belong to samples as the rows of the tensor do whose memory they are, in any order."""
    memory = tensor.untyped_storage().nbytes()
    size = memory // tensor.element_size()
    rows = torch.full((size,), -1)
    index = torch.arange(tensor.shape[axis]).reshape([-1 if a == axis else 1 for a in range(tensor.dim())])
    rows.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(index.expand(tensor.shape))
    own = torch.arange(memory // like.element_size())  # real parts are smaller than complex entries
    own = own * like.element_size() // tensor.element_size()
    entries = own.as_strided(like.shape, like.stride(), like.storage_offset()).flatten()
    owner = owner.flatten()
    of_entry = torch.full((size,), -1).index_put((entries,), owner)
    if bool((of_entry[entries] != owner).any()):
        return Evidence.SHARED
    there = owner >= 0
    row, owner = rows[entries][there].clamp(min=0), owner[there]
    of_row = torch.full((tensor.shape[axis],), -1).index_put((row,), owner)
    if not bool((of_row[row] == owner).all()):
        return Evidence.AGAINST
    if len(row.unique()) < 2:
        return Evidence.NOTHING
    return Evidence.FOR if len(owner.unique()) > 1 else Evidence.AGAINST


def _of_saved(
    node: Node, graph: Graph, owners: Owners, k: int, saved: Tensor, sent: Sequence[AnyLayout | None]
) -> AnyLayout | None:
    """Where the samples lie in an input that was saved."""
    number, layout = owners.first_owned(node)
    shape = shape_of(node, number)
    if kind(node) == "Embedding":
        return None if layout.occupies([len(shape) - 1]) else layout.moved(range(len(shape) - 1))
    if kind(node) == "Mul":
        return broadcast_from(saved.shape, layout, shape)
    return sent[k]


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
