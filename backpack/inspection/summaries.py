"""How a model uses its parameters, and how extensions will compute their results."""

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
from backpack.graph import kind, read, variable_of
from backpack.inspection.tables import aligned
from backpack.modules.calls import leaves_of, noted
from backpack.modules.parameters import name_of
from backpack.modules.thread_state import muted
from backpack.nodes import GeneralUse, PlacedUse
from backpack.samples.mixing import mixed_data
from backpack.uses import Cotangents, DenseUse, ElementwiseUse, LookupUse, StackedUse


@dataclass(frozen=True)
class Line:
    """One use of one parameter.

    ``function``: the kind of node that uses it in PyTorch's graph; ``kind``: the kind of use; ``positions``: those
    within a sample; ``how``: by extension, how its result is computed, and the measured cost; ``mixed``: what mixes
    samples, if this use is below it; ``refused``: by extension, why it will refuse this parameter.
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

    ``coded``: nodes whose effect on samples depends on values, so that each pass sends random numbers through them.
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
        return "\n".join([*aligned(table), *notes])


def summary(model: Module, inputs: Any, *extensions: BackpropExtension) -> Summary:
    """Tell how the model uses each parameter, and how extensions will compute their results; prints a table.

    A copy of the model runs once. Each extension then computes its result from what autograd saved, for one cotangent:
    in a *closed form*, from individual gradients *in chunks* that are never stored together, or from *stored* ones. The
    table has the milliseconds that this took, and the memory of the result. Extensions of second order do it once for
    each column of the loss Hessian's root::

        summary(model, X, BatchGrad(), DiagGGNMC())

    Args:
        model: Any model, extended or not; it is left as it is.
        inputs: A tensor, or all arguments of the model as a tuple or dictionary.
        extensions: The extensions to tell about.

    Returns:
        One line for each use of a parameter, and the nodes whose effect on samples is found out in each pass.
    """
    model = extend(unextend(copy.deepcopy(model)))
    inputs = tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, inputs)
    with torch.random.fork_rng(), torch.enable_grad():
        if isinstance(inputs, dict):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    lines, coded = _uses_below(output, extensions)
    used = {line.parameter for line in lines}
    order = {name: place for place, (name, _) in enumerate(model.named_parameters())}
    for name, parameter in model.named_parameters():
        if name not in used:
            reason = "no use seen" if parameter.requires_grad else "frozen"
            lines.append(Line(name, tuple(parameter.shape), "", reason, 0, {}, None, {}))
    lines.sort(key=lambda line: order.get(line.parameter, len(order)))
    result = Summary(lines, coded)
    print(result)
    return result


def _uses_below(output: Any, extensions: Sequence[BackpropExtension]) -> tuple[list[Line], list[str]]:
    """The uses of parameters in the graph of a model's output, and the kinds of its coded nodes."""
    roots = [get_gradient_edge(t) for t in leaves_of(output) if isinstance(t, Tensor) and t.grad_fn is not None]
    if not roots:
        return [], []
    graph = read(roots)
    notes, calls = noted(graph)
    prepared = prepare(graph, notes, calls)
    if prepared is None:
        return [], []
    plan = prepared.plan
    with muted():
        # Once more, since a pass does not ask what would mix a single sample with others.
        plan.mixed, _ = mixed_data(graph, prepared.owners, plan.entries, calls, prepared.n)
        tried = _TriedUses(prepared)
        planned = [(node, use) for node in reversed(graph.order) for use in plan.uses.get(node, ())]
        lines = [line for node, use in planned for line in tried.lines(node, use, extensions)]
    return lines, [kind(node) for node in prepared.owners.coded]


class _TriedUses(Collector):
    """Uses of parameters that receive cotangents of ones."""

    def completed(self, leaf: Node, contributions: Contributions) -> None:
        """Compute nothing."""

    def lines(self, node: Node, planned: PlannedUse, extensions: Sequence[BackpropExtension]) -> Iterator[Line]:
        """The line of each parameter that a use leads to."""
        metadata = node._input_metadata[planned.number]
        ones = torch.ones(metadata.shape, dtype=metadata.dtype, device=metadata.device)
        arrival = self.arrival(node, planned, Cotangents({planned.number: ones[None]}))
        use, mixed, positions = _kind_of_use(arrival), None, 1
        if isinstance(arrival.use, DenseUse):
            positions = max(1, ones.numel() // max(1, self.plan.n * metadata.shape[-1]))
        if planned.leaf is not None:
            leaves, target = [planned.leaf], self.contributions(planned.leaf)
        else:
            assert planned.entry is not None
            leaves, target = self.plan.entries[planned.entry[0]], self.contributions_at(planned.entry)
            mixed = self.plan.mixed.get(planned.entry[0])
            use = "below what mixes samples" if mixed else f"{use}, of a tensor computed from it"
        refused = {type(e).__name__: why for e in extensions if (why := _refusal(e, mixed)) is not None}
        for leaf in leaves:
            parameter = variable_of(leaf)
            how = {
                type(e).__name__: "each sample by itself" if mixed else _tried(e, arrival, target)
                for e in extensions
                if type(e).__name__ not in refused
            }
            yield Line(name_of(parameter), tuple(parameter.shape), kind(node), use, positions, how, mixed, refused)


def _kind_of_use(arrival: Arrival) -> str:
    use = arrival.use
    if isinstance(use, ElementwiseUse):
        return "shift" if use.x is None else "scale"
    if isinstance(use, (DenseUse, StackedUse)):
        return "linear map"
    if isinstance(use, LookupUse):
        return "look-up"
    return "the node itself, sample by sample" if isinstance(use, (GeneralUse, PlacedUse)) else "recurrent maps"


def _refusal(extension: BackpropExtension, mixed: str | None) -> str | None:
    """Why an extension will refuse a parameter below what mixes samples; ``None``: it will not."""
    if mixed is not None and extension.bounds_influence:
        return f"samples are mixed by {mixed}, so that clipping a sample's gradient does not bound its influence"
    if mixed is not None and extension.needs_samples_apart:
        return f"samples are mixed by {mixed}, below which there are no Kronecker factors"
    return None


def _tried(extension: BackpropExtension, arrival: Arrival, target: Contributions) -> str:
    """How an extension computes its result, tried with the cotangent that has arrived, and what that costs."""
    if extension.has_rules_only or not extension.reads:
        return "by rule" if extension.rules else "other"
    with torch.no_grad():
        start = time.perf_counter()
        grads = arrival.individual(extension.subset, target.shape, target.dtype)
        ways = [
            "stored" if name == "dense" else ("closed form" if grads.closed(name) is not None else "chunks")
            for name in extension.reads
        ]
        grads.prepare(extension.reads)
        spent = time.perf_counter() - start
    (cotangent,) = arrival.cotangents.values()
    size = sum(prod(getattr(grads, name)().shape) for name in extension.reads) * cotangent.element_size()
    return f"{' + '.join(dict.fromkeys(ways))}, {1000 * spent:.2g} ms, {size / 2**20:.2g} MiB"
