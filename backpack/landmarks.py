"""Landmarks of a graph: what a forward pass leaves at the outputs of extended modules, and how it is found there.

A pull-back of seeds starts at the input of a loss, and meets the extended modules that it comes from at their outputs.
There it learns where their samples lie, what uses their parameters, and where it may stop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import Module

from backpack.looped import Instead, edges_from
from backpack.recorder import Call, is_start
from backpack.samples import Layout

MARK = "backpack"
"""At the node of an output of an extended module: what its forward pass left there."""


@dataclass(eq=False)
class Origin:
    """What a forward pass of an extended module leaves at the node of each of its outputs.

    ``place``: of this output among the leaves of all; ``uses``: how often each source was used; ``calls``: all that
    were recorded; ``tensors``: parameters, and what was computed; ``widest``: entries of the largest output of one;
    ``arguments``: of the call, ``None`` if one was overwritten; ``grouped``: whether samples are no rows of them;
    ``output``: its values, where the module may have to run again, and ``random``: what was drawn from then. No node is
    held: what one of them holds would live forever if it held that node in turn.
    """

    n: int
    layout: Layout | None
    place: int
    uses: dict[int, int]
    calls: list[ref[Call]]
    tensors: list[ref[Tensor]]
    widest: int
    root: ref[Module]
    arguments: tuple[Any, Any] | None
    input_axis: int
    grouped: bool
    output: Tensor | None
    random: list[Tensor] | None

    def alive(self) -> list[Call]:
        """The calls that are still there."""
        return [call for found in self.calls if (call := found()) is not None]


Found = list[tuple[GradientEdge, Origin]]
"""Outputs of extended modules."""


def landmarks(edge: GradientEdge, instead: Instead | None = None) -> tuple[Found, list[GradientEdge]]:
    """Where a graph passes outputs of extended modules; and where a pull-back may stop.

    It may at the first uses of parameters, and at inputs of extended modules.
    """
    found, ends = [], []
    for at in edges_from(edge, instead):
        metadata: Any = at.node.metadata
        origin = metadata.get((MARK, at.output_nr))
        if origin is not None:
            found.append((at, origin))
        if is_start(at):
            ends.append(at)
    return found, ends


def bystanders(found: Found) -> Iterator[ref[Tensor]]:
    """Parameters, and what was computed on the way to these outputs."""
    for tensors in {id(origin.tensors): origin.tensors for _, origin in found}.values():
        yield from tensors


def count_uses(found: Found) -> Counter[int]:
    """How often each parameter is used on the way to these outputs."""
    return sum_uses({id(origin.uses): origin.uses for _, origin in found}.values())


def sum_uses(counts: Iterable[dict[int, int]]) -> Counter[int]:
    """How often each parameter is used in all of these forward passes."""
    uses: Counter[int] = Counter()
    for own in counts:
        uses.update(own)
    return uses
