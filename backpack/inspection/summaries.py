"""How a model uses its parameters, and what extensions will do with them."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn import Module
from torch.utils._pytree import tree_map

from backpack.backward.arrivals import Arrival, Contributions
from backpack.backward.collector import Collector
from backpack.backward.plan import PlannedUse
from backpack.backward.preparation import prepare
from backpack.context import extend, unextend
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.graph import kind as node_kind
from backpack.graph import read, variable_of
from backpack.modules.calls import leaves_of, noted
from backpack.modules.parameters import name_of
from backpack.modules.thread_state import muted
from backpack.nodes import GeneralUse, PlacedUse
from backpack.samples.mixing import mixed_data
from backpack.uses import Cotangents, DenseUse, ElementwiseUse, Individual, LookupUse, StackedUse


@dataclass(frozen=True)
class Line:
    """One use of one parameter.

    ``function``: the kind of node in PyTorch's graph that uses it; ``how``: by extension, the way that is taken and its
    measured cost; ``mixed``: what mixes samples below this use; ``refused``: by extension, why.
    """

    parameter: str
    shape: tuple[int, ...]
    function: str
    kind: str
    positions: int
    how: dict[str, str]
    mixed: str | None
    refused: dict[str, str]


@dataclass(frozen=True)
class Summary:
    """The outcome of ``summary``; prints as a table.

    ``coded``: nodes of which the graph does not tell what they do to samples: random numbers are sent through them.
    """

    lines: list[Line]
    coded: list[str]

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for line in self.lines for name in line.how))
        table = [["parameter", "shape", "function", "kind of use", "positions", *names]]
        for line in self.lines:
            shape = " x ".join(map(str, line.shape)) or "scalar"
            how = [line.how.get(name, "") for name in names]
            table.append([line.parameter, shape, line.function, line.kind, str(line.positions), *how])
        widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
        rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
        mixers = dict.fromkeys(line.mixed for line in self.lines if line.mixed is not None)
        refusals = dict.fromkeys(f"{name}: {why}" for line in self.lines for name, why in line.refused.items())
        notes = [
            *(f"Samples are mixed by {mixer}: gradients below are pulled back sample by sample." for mixer in mixers),
            *(f"Will be refused: {refusal}." for refusal in refusals),
        ]
        if self.coded:
            counts = Counter(self.coded)
            named = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())
            notes.append(f"What these do to samples depends on values, and is found out in each pass: {named}.")
        return "\n".join([*rows, *notes])


def summary(model: Module, inputs: Any, *extensions: BackpropExtension) -> Summary:
    """Say for each parameter how it is used, and what extensions will do with it; prints a table.

    The model, a copy of it, runs once. Each way of computing is tried on what autograd saved and measured: a *closed
    form*, individual gradients *in chunks* that are never stored together, or *stored*; with its milliseconds and the
    memory of its result, for one cotangent (extensions of second order read one for each column of the loss's root).

    Args:
        model: Any model; it need not be extended, and is left as it is.
        inputs: A tensor, or all that the model is called with as a tuple or dictionary.
        extensions: What to tell about.

    Returns:
        A line for each use of a parameter: path, shape, kind of node, kind of use, positions within a sample, ways,
        what mixes samples there, and why extensions would refuse it; and which nodes need a coded pass.
    """
    args, kwargs = (
        ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    model = extend(unextend(copy.deepcopy(model)))
    args, kwargs = tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, (args, kwargs))
    with torch.random.fork_rng(), torch.enable_grad():
        output = model(*args, **kwargs)
    roots = [get_gradient_edge(t) for t in leaves_of(output) if isinstance(t, Tensor) and t.grad_fn is not None]
    prepared = None
    if roots:
        graph = read(roots)
        notes, calls = noted(graph)
        prepared = prepare(graph, notes, calls)
    lines: list[Line] = []
    if prepared is not None:
        with muted():
            prepared.plan.mixed, _ = mixed_data(
                prepared.graph, prepared.owners, prepared.plan.entries, calls, prepared.n
            )
            collector = _Uses(prepared)
            uses = reversed(prepared.graph.order)
            lines = [line for node in uses for line in collector.lines(node, extensions)]
    order = {name: place for place, (name, _) in enumerate(model.named_parameters())}
    used = {line.parameter for line in lines}
    for name, parameter in model.named_parameters():
        if name not in used:
            kind = "no use seen" if parameter.requires_grad else "frozen"
            lines.append(Line(name, tuple(parameter.shape), "", kind, 0, {}, None, {}))
    lines.sort(key=lambda line: order.get(line.parameter, len(order)))
    result = Summary(lines, [] if prepared is None else [node_kind(node) for node in prepared.owners.coded])
    print(result)
    return result


class _Uses(Collector):
    """Tries the uses of a graph with cotangents of ones."""

    def completed(self, leaf: Node, contributions: Contributions) -> None:
        """Nothing is computed."""

    def lines(self, node: Node, extensions: Sequence[BackpropExtension]) -> Iterator[Line]:
        """Those of the uses of a node."""
        for planned in self.plan.uses.get(node, ()):
            leaves = [planned.leaf] if planned.leaf is not None else self.plan.entries[planned.entry[0]]  # type: ignore[index]
            metadata = node._input_metadata[planned.number]
            ones = torch.ones(metadata.shape, dtype=metadata.dtype, device=metadata.device)
            arrival = self.arrival(node, planned, Cotangents({planned.number: ones[None]}))
            mixed = self.plan.mixed.get(planned.entry[0]) if planned.entry is not None else None
            kind, positions = _kind(arrival), 1
            if isinstance(arrival.use, DenseUse):
                positions = max(1, ones.numel() // max(1, self.plan.n * metadata.shape[-1]))
            if planned.entry is not None:
                kind = "below what mixes samples" if mixed else f"{kind}, of a tensor computed from it"
            for leaf in leaves:
                parameter = variable_of(leaf)
                refused = {type(e).__name__: why for e in extensions if (why := _refused(e, mixed)) is not None}
                how = {
                    type(e).__name__: "each sample by itself" if mixed else _way(arrival, e, self._shape(planned), ones)
                    for e in extensions
                    if type(e).__name__ not in refused
                }
                yield Line(
                    name_of(parameter), tuple(parameter.shape), node_kind(node), kind, positions, how, mixed, refused
                )

    def _shape(self, planned: PlannedUse) -> tuple[torch.Size, torch.dtype]:
        if planned.leaf is not None:
            parameter = variable_of(planned.leaf)
            return parameter.shape, parameter.dtype
        assert planned.entry is not None
        metadata = planned.entry[0]._input_metadata[planned.entry[1]]
        return torch.Size(metadata.shape), metadata.dtype


def _kind(arrival: Arrival) -> str:
    use = arrival.use
    if isinstance(use, ElementwiseUse):
        return "shift" if use.x is None else "scale"
    if isinstance(use, (DenseUse, StackedUse)):
        return "linear map"
    if isinstance(use, LookupUse):
        return "look-up"
    return "the node itself, sample by sample" if isinstance(use, (GeneralUse, PlacedUse)) else "recurrent maps"


def _refused(extension: BackpropExtension, mixed: str | None) -> str | None:
    if mixed is None:
        return None
    if extension.bounds_influence:
        return f"samples are mixed by {mixed}, so that clipping a sample's gradient does not bound its influence"
    if extension.needs_samples_apart:
        return f"samples are mixed by {mixed}, below which there are no Kronecker factors"
    return None


def _way(arrival: Arrival, extension: BackpropExtension, form: tuple[torch.Size, torch.dtype], out: Tensor) -> str:
    """What is done for one extension, tried with a cotangent of ones."""
    if extension.has_rules_only or not extension.reads:
        return "by rule" if extension.rules else "other"
    with torch.no_grad():
        start = time.perf_counter()
        grads: Individual = arrival.individual(extension.subset, *form)
        ways = []
        for name in extension.reads:
            ways.append(
                "stored" if name == "dense" else ("closed form" if grads.closed(name) is not None else "chunks")
            )
        grads.prepare(extension.reads)
        spent = time.perf_counter() - start
    size = sum(prod(getattr(grads, name)().shape) for name in extension.reads) * out.element_size()
    return f"{' + '.join(dict.fromkeys(ways))}, {1000 * spent:.2g} ms, {size / 2**20:.2g} MiB"
