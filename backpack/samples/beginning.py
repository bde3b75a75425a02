"""Where samples begin: at the outputs of extended modules, and along which of their axes.

A sample is a row of an extended model's output. Which axis counts the rows is told by the sizes of what the module was
given. Where these leave a choice, it must be proved in the pass that uses it: a node that saved an input of the module
must own, row by row, what the input's rows say. Where none did, the module is run on one row less, without gradients,
and the axis that shrinks is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import Module
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from backpack.compat import is_packed
from backpack.graph import LEAF, Graph, kind, saved, shape_of
from backpack.samples.layouts import AnyLayout, Layout, same
from backpack.samples.owners import Edge, Owners
from backpack.samples.table import onto

NOTE = "backpack output"


@dataclass(eq=False)
class Note:
    """What a call of an extended module leaves at the node of each of its outputs.

    ``place``: of this output among the leaves of all; ``axis``: the one that counts the samples of an input;
    ``arguments``: of the call.
    """

    module: ref[Module]
    arguments: tuple[Any, Any]
    axis: int
    place: int
    is_packed: bool = False
    """Whether the output is a packed sequence, whose rows are no samples."""

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that the module was called with."""
        return tensors_in(self.arguments)

    @property
    def sizes(self) -> list[int]:
        """How many rows each of them has, as far as they differ."""
        axis = self.axis
        return list(dict.fromkeys(t.shape[axis] if t.dim() > axis else t.shape[0] for t in self.inputs if t.dim()))


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of a nested structure."""
    if isinstance(value, Tensor):
        return [value]
    if type(value) in (tuple, list):
        return [tensor for entry in value for tensor in tensors_in(entry)]
    if type(value) is dict:
        return [tensor for entry in value.values() for tensor in tensors_in(entry)]
    return [] if value is None else [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def leave_note(module: Module, args: Any, kwargs: Any, output: Any, axis: int) -> None:
    """Note at the nodes of a module's outputs that they are such."""
    arguments = (args, kwargs)
    given: set[Edge] | None = None
    packed = any(isinstance(part, PackedSequence) for part in (output, *(output if type(output) is tuple else ())))
    for place, tensor in enumerate([output] if isinstance(output, Tensor) else tree_leaves(output)):
        if not isinstance(tensor, Tensor) or tensor.grad_fn is None:
            continue
        if given is None:
            given = {(t.grad_fn, t.output_nr) for t in tensors_in(arguments) if t.grad_fn is not None}
        base = tensor._base
        for value in (tensor,) if base is None else (tensor, base):
            node = value.grad_fn
            if node is None or (node, value.output_nr) in given:  # handed through: it belongs to where it comes from
                continue
            if value is base and base.shape != tensor.shape:
                continue
            metadata: Any = node.metadata
            metadata.setdefault(NOTE, {})[value.output_nr] = Note(ref(module), arguments, axis, place, packed)


def noted(graph: Graph) -> dict[Edge, Note]:
    """The outputs of extended modules in a graph."""
    found: dict[Edge, Note] = {}
    for node in graph.order:
        metadata: Any = node.metadata
        for number, note in metadata.get(NOTE, {}).items():
            found[node, number] = note
    return found


def candidates(shape: Sequence[int], note: Note) -> list[Layout]:
    """The layouts that sizes allow, the likeliest first."""
    axes = sorted(range(len(shape)), key=lambda axis: axis != note.axis)
    sizes = note.sizes
    several = [n for n in sizes if n != 1]
    exact = [Layout(n, axis) for n in several for axis in axes if shape[axis] == n]
    if exact:
        return exact
    if 1 in sizes and shape[note.axis if len(shape) > note.axis else 0] == 1:
        return [Layout(1, note.axis if len(shape) > note.axis else 0)]
    blocks = [n for n in several if n > 0 and shape[0] and shape[0] % n == 0]
    if blocks:
        return [Layout(n, 0, *factors) for n in blocks for factors in ((1, shape[0] // n), (shape[0] // n, 1))]
    if sizes and sizes[0] == 1:
        return [Layout(1, inner=shape[0])]
    return [Layout(shape[0])]


Sweep = Callable[[dict[Edge, AnyLayout]], Owners]


def decide(
    graph: Graph, notes: dict[Edge, Note], sweep: Sweep, wanted: set[Node]
) -> tuple[dict[Edge, AnyLayout], Owners]:
    """Where the samples begin, and what follows from that for all other edges.

    ``wanted``: the nodes of parameters.

    Raises:
        RuntimeError: It cannot be told.
    """
    for note in notes.values():
        if note.is_packed:
            module = note.module()
            raise RuntimeError(
                f"The output of {'a module' if module is None else type(module).__name__} is a packed sequence, whose "
                f"rows are positions of several samples: call torch.nn.utils.rnn.pad_packed_sequence inside of the "
                f"module that is extended, or pad the sequences."
            )
    possible = {edge: candidates(shape, note) for edge, note in notes.items() if (shape := shape_of(*edge))}
    chosen: dict[Edge, AnyLayout] = {edge: layouts[0] for edge, layouts in possible.items()}
    owners = sweep(chosen)
    for edge, layouts in possible.items():
        if len(layouts) > 1 and owners.owned.get(edge) is chosen[edge]:
            owners = _choose(graph, edge, layouts, notes[edge], chosen, owners, sweep)
    elsewhere = _elsewhere(graph, notes, chosen, owners, sweep, wanted) if _has_more(graph, owners, wanted) else None
    return elsewhere or (chosen, owners)


def _choose(
    graph: Graph,
    edge: Edge,
    layouts: Sequence[Layout],
    note: Note,
    chosen: dict[Edge, AnyLayout],
    owners: Owners,
    sweep: Sweep,
) -> Owners:
    """Choose between the layouts that sizes allow for a module's output."""
    attempts: list[tuple[Layout, Owners]] = []
    for layout in layouts:
        attempt = owners if layout is chosen[edge] else sweep({**chosen, edge: layout})
        verdict = proved(graph, attempt, [note], layout.n)
        if verdict:
            chosen[edge] = layout
            return attempt
        if verdict is None:
            attempts.append((layout, attempt))
    if not attempts:
        attempts = [(layout, sweep({**chosen, edge: layout})) for layout in layouts]
    found = attempts[0][0] if len(attempts) == 1 else _by_running(edge, [layout for layout, _ in attempts], note)
    found = found or _least_mixed(graph, attempts)
    if found is None:
        module = note.module()
        raise RuntimeError(
            f"The output of {'a module' if module is None else type(module).__name__}, of shape "
            f"{list(shape_of(*edge))}, does not tell along which axis its samples lie: "
            f"{' or '.join(f'{layout.n} along axis {layout.axis}' for layout in layouts)}. Let the model return the "
            f"samples along the first axis, of a size that no other axis has."
        )
    chosen[edge] = found
    return next(attempt for layout, attempt in attempts if layout is found)


def _least_mixed(graph: Graph, attempts: Sequence[tuple[Layout, Owners]]) -> Layout | None:
    """The layout under which samples are mixed at fewer nodes, all of which are mixed under the others as well."""

    def is_single_parameter(node: Node) -> bool:
        while node.name() != LEAF:
            following = [other for other, _ in graph.edges[node] if other is not None]
            if len(following) != 1:
                return False
            node = following[0]
        return True

    mixed = [{node for node, _ in owners.mixed if not is_single_parameter(node)} for _, owners in attempts]
    for (layout, _), own in zip(attempts, mixed, strict=True):
        if all(own < other for other in mixed if other is not own):
            return layout
    return None


def _has_more(graph: Graph, owners: Owners, wanted: set[Node]) -> bool:
    """Whether something but the samples' rows reaches parameters, directly or where samples are mixed."""
    left = [edge for edge in owners.above if edge not in owners.joined]
    return any(edge[0] in wanted or edge in owners.mixed for edge in left)


def _elsewhere(
    graph: Graph,
    notes: dict[Edge, Note],
    chosen: dict[Edge, AnyLayout],
    owners: Owners,
    sweep: Sweep,
    wanted: set[Node],
) -> tuple[dict[Edge, AnyLayout], Owners]:
    """Samples also begin at edges that no module's output is above: derivatives, losses that a model computes itself.

    Such an edge is the first one on its path with an axis of the samples' size. That is proved where it comes to rows
    whose samples are known already, or to nodes that saved an input of a module. What does neither belongs to no
    sample.
    """
    sizes = {layout.n for edge, layout in chosen.items() if owners.owned.get(edge) is layout}
    inputs = {tensor.untyped_storage()._cdata for note in notes.values() for tensor in note.inputs}
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
            for layout in _layouts_elsewhere(shape, sizes, notes):
                attempt = sweep({**chosen, (node, number): layout})
                if _agrees(graph, owners, attempt, notes, layout.n, reaches_data):
                    chosen, owners = {**chosen, (node, number): layout}, attempt
                    break
    return chosen, owners


def _layouts_elsewhere(shape: Sequence[int], sizes: set[int], notes: dict[Edge, Note]) -> list[Layout]:
    if not sizes:
        return [layout for note in notes.values() for layout in candidates(shape, note) if layout.n in note.sizes]
    exact = [Layout(n, axis) for n in sizes for axis in range(len(shape)) if shape[axis] == n]
    blocks = [n for n in sizes if n > 1 and shape[0] > n and shape[0] % n == 0]
    return exact + [Layout(n, 0, *pair) for n in blocks for pair in ((1, shape[0] // n), (shape[0] // n, 1))]


def _agrees(graph: Graph, before: Owners, after: Owners, notes: dict[Edge, Note], n: int, data: set[Node]) -> bool:
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
    return bool(proved(graph, after, list(notes.values()), n))


SAVED = {
    "Addmm": {1: "mat1", 2: "mat2"},
    "Mm": {0: "self", 1: "mat2"},
    "Bmm": {0: "self", 1: "mat2"},
    "Mul": {0: "self", 1: "other"},
    "Convolution": {0: "input"},
    "NativeLayerNorm": {0: "input"},
    "NativeGroupNorm": {0: "input"},
    "NativeBatchNorm": {0: "input"},
    "Embedding": {0: "indices"},
}
"""Under which names kinds of nodes save their inputs."""


def saved_inputs(node: Node) -> Iterator[tuple[int, Tensor]]:
    """The inputs that a node saved, and their places; none that are computed again when they are read."""
    for k, name in SAVED.get(kind(node), {}).items():
        if not is_packed(getattr(node, f"_raw_saved_{name}")):
            found = getattr(node, f"_saved_{name}")
            if found is not None:
                yield k, found


def proved(graph: Graph, owners: Owners, notes: Sequence[Note], n: int) -> bool | None:
    """Whether nodes that saved an input of a module own what its ``n`` rows say; ``None``: there are none."""
    inputs: dict[int, tuple[Tensor, int]] = {}
    for note in notes:
        for tensor in note.inputs:
            axis = note.axis if tensor.dim() > note.axis else 0
            if tensor.dim() and tensor.shape[axis] == n and tensor.numel():
                inputs[tensor.untyped_storage()._cdata] = (tensor, axis)
    storages = {tensor.untyped_storage()._cdata for note in notes for tensor in note.inputs}
    verdict: bool | None = None
    for node, sent in owners.sends.items():
        if kind(node) == "EmbeddingBag" and saved(node, "offsets").untyped_storage()._cdata in storages:
            if owners.owned[node, 0].axes != [0]:
                return False
            verdict = True
        for k, value in saved_inputs(node):
            if value.untyped_storage()._cdata not in inputs:
                continue
            own = _of_saved(node, graph, owners, k, value, sent)
            if own is None or own.n != n:
                continue
            expected = _rows_of(*inputs[value.untyped_storage()._cdata], value)
            found = own.owners(value.shape, torch.device("cpu")).expand(value.shape)
            if not bool((found == expected).all()):
                return False
            verdict = True
    return verdict


def _of_saved(
    node: Node, graph: Graph, owners: Owners, k: int, saved: Tensor, sent: Sequence[AnyLayout | None]
) -> AnyLayout | None:
    """Where the samples lie in an input that was saved."""
    number, layout = next((nr, found) for nr in range(99) if (found := owners.owned.get((node, nr))) is not None)
    shape = shape_of(node, number)
    if kind(node) == "Embedding":
        return None if layout.occupies([len(shape) - 1]) else layout.moved(range(len(shape) - 1))
    if kind(node) == "Mul":
        return onto(layout, shape, saved.shape)
    return sent[k]


def _rows_of(tensor: Tensor, axis: int, like: Tensor) -> Tensor:
    """To which row of a tensor the entries of another one that shares its memory belong."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    table = torch.full((size,), -1)
    index = torch.arange(tensor.shape[axis]).reshape([-1 if a == axis else 1 for a in range(tensor.dim())])
    table.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(index.expand(tensor.shape))
    return table.as_strided(like.shape, like.stride(), like.storage_offset())


def _by_running(edge: Edge, layouts: Sequence[Layout], note: Note) -> Layout | None:
    """The layout whose axis shrinks when the module runs on one row less; ``None``: there is not one alone."""
    found: list[Layout] = []
    for layout in layouts:
        expected = list(shape_of(*edge))
        expected[layout.axis] -= layout.factor
        output = run_on_fewer(note, layout.n)
        leaves = [output] if isinstance(output, Tensor) else tree_leaves(output)
        if note.place < len(leaves) and list(getattr(leaves[note.place], "shape", ())) == expected:
            found.append(layout)
    return found[0] if len(found) == 1 else None


def run_on_fewer(note: Note, n: int, with_graph: bool = False) -> Any:
    """What a module returns for all of its ``n`` samples but the last; ``None``: it fails.

    State and random numbers stay as they are.
    """
    module = note.module()
    if module is None:
        return None

    def fewer(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        axis = note.axis if value.dim() > note.axis else 0
        own = value.dim() > 0 and value.shape[axis] == n
        return value.detach().narrow(axis, 0, n - 1) if own else value.detach()

    args, kwargs = tree_map(fewer, note.arguments)
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        with torch.random.fork_rng(), torch.set_grad_enabled(with_graph):
            return module.forward(*args, **kwargs)
    except Exception:  # whatever it may be that the module does not take
        return None
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
