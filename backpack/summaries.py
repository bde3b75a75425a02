"""How a model uses its parameters, and what extensions will do with them."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, RNNBase
from torch.utils._pytree import tree_map

from backpack.context import unextend
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.recorder import Call, Parameters, Recording, Source
from backpack.samples import Subset
from backpack.uses import Cotangents, DenseUse, ElementwiseUse, Individual, LookupUse, PullbackUse, Use

KINDS: dict[type[Use], str] = {
    DenseUse: "linear map",
    LookupUse: "look-up",
    PullbackUse: "own vector-Jacobian product",
}


@dataclass(frozen=True)
class Line:
    """One use of one parameter; ``how``: by extension, the way that is taken and its measured cost."""

    parameter: str
    shape: tuple[int, ...]
    function: str
    kind: str
    positions: int
    how: dict[str, str]
    refused: str | None


@dataclass(frozen=True)
class Summary:
    """The outcome of ``summary``; prints as a table."""

    lines: list[Line]

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for line in self.lines for name in line.how))
        table = [["parameter", "shape", "function", "kind of use", "positions", *names]]
        for line in self.lines:
            shape = " x ".join(map(str, line.shape)) or "scalar"
            how = [line.how.get(name, "") for name in names]
            table.append([line.parameter, shape, line.function, line.kind, str(line.positions), *how])
        widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
        rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
        refusals = dict.fromkeys(line.refused for line in self.lines if line.refused is not None)
        return "\n".join([*rows, *(f"Will be refused: {reason}." for reason in refusals)])


def summary(model: Module, inputs: Any, *extensions: BackpropExtension) -> Summary:
    """Say for each parameter how it is used, and what extensions will do with it; prints a table.

    The model, a copy of it, runs once. Each way of computing is tried on the recorded inputs and measured: a *closed
    form*, individual gradients *in chunks* that are never stored together, or *stored*; with its milliseconds and the
    memory of its result, for one cotangent (extensions of second order read one for each column of the loss's root).

    Args:
        model: Any model; it need not be extended, and is left as it is.
        inputs: A tensor, or all that the model is called with as a tuple or dictionary.
        extensions: What to tell about.

    Returns:
        A line for each use of a parameter: path, shape, PyTorch's function, kind of use, positions within a sample,
        ways, and why it would be refused.
    """
    args, kwargs = (
        ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    model = unextend(copy.deepcopy(model))
    args, kwargs = tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, (args, kwargs))
    calls: dict[int, tuple[Call, Tensor]] = {}

    def note(call: Call, place: int, out: Tensor, shape: torch.Size) -> None:
        if place == 0:
            calls[id(call)] = (call, out.detach())

    axis = int(isinstance(model, RNNBase) and not model.batch_first)
    named = list(model.named_parameters())
    with torch.random.fork_rng(), torch.enable_grad():
        sources = [Source(p, (p,), name) for name, p in named if p.requires_grad]
        recording = Recording(Parameters(sources), (args, kwargs), axis, note, {})
        with recording:
            output = model(*args, **kwargs)
        tensors = [t for t in (output if isinstance(output, (tuple, list)) else [output]) if isinstance(t, Tensor)]
        found = [(t, recording.layout_of(t, place, axis)) for place, t in enumerate(tensors) if t.grad_fn is not None]
        recording.settle([(t, layout) for t, layout in found if layout is not None])
    lines = [line for call, out in calls.values() for line in _lines(call, out, extensions)]
    unused = {name for name, p in named if p.requires_grad} - {
        n for line in lines for n in line.parameter.split(" and ")
    }
    frozen = {name for name, p in named if not p.requires_grad}
    for name, parameter in named:
        if name in unused | frozen:
            kind = "frozen" if name in frozen else "no use seen"
            lines.append(Line(name, tuple(parameter.shape), "", kind, 0, {}, None))
    result = Summary(lines)
    print(result)
    return result


def _lines(call: Call, out: Tensor, extensions: Sequence[BackpropExtension]) -> list[Line]:
    lines = []
    function = getattr(call.function, "__name__", str(call.function)).strip("_")
    for source, use in call.uses:
        if source.void:
            continue
        positions = max(1, out.numel() // max(1, call.n * out.shape[-1])) if isinstance(use, DenseUse) else 1
        refused = None if call.problem is None else f"{call.name} {call.problem}"
        by_sample = "each sample by itself" if refused is not None else None
        if not any(extension.seeds is not None or extension.bounds_influence for extension in extensions):
            refused = None  # first order reads the graph, and needs nothing of a call
        kind = KINDS.get(type(use), "recurrent maps")
        if isinstance(use, ElementwiseUse):
            kind = "shift" if use.x is None else "scale"
        how = {
            type(e).__name__: by_sample or _way(call, use, out, e, source.tensor)
            for e in extensions
            if refused is None or not (e.seeds is not None or e.bounds_influence)
        }
        lines.append(Line(source.name, tuple(source.tensor.shape), function, kind, positions, how, refused))
    return lines


def _way(call: Call, use: Use, out: Tensor, extension: BackpropExtension, parameter: Tensor) -> str:
    """What is done for one extension, tried with a cotangent of ones."""
    if extension.has_rules_only or not extension.reads:
        return "by rule" if extension.rules else "other"
    subset: Subset = extension.subset
    cotangents = Cotangents({0: torch.ones_like(out)[None]})
    with torch.no_grad():
        start = time.perf_counter()
        grads: Individual = use.arrive(
            cotangents, call.rows(subset.rows(call.n, out.device)), parameter.shape, parameter.dtype
        )
        ways = []
        for name in extension.reads:
            ways.append(
                "stored" if name == "dense" else ("closed form" if grads.closed(name) is not None else "chunks")
            )
        grads.prepare(extension.reads)
        spent = time.perf_counter() - start
    size = sum(prod(getattr(grads, name)().shape) for name in extension.reads) * out.element_size()
    return f"{' + '.join(dict.fromkeys(ways))}, {1000 * spent:.2g} ms, {size / 2**20:.2g} MiB"
