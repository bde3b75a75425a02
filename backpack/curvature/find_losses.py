"""Finds the extended losses that a backward pass runs through, and any other term that goes through the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch.autograd.graph import Node

from backpack.backward.collector import Prepared
from backpack.curvature.linearity import inputs_of, is_linear
from backpack.curvature.residuals.nodes import is_flat
from backpack.graph import Edge, Graph, kind, variable_of
from backpack.modules.calls import Note
from backpack.modules.loss_calls import LossCall, losses_in
from backpack.modules.parameters import name_of

SUMS = ("Add", "Sub", "Rsub")
"""Kinds of nodes that add terms."""


@dataclass(eq=False)
class FoundLosses:
    """The losses of one backward pass.

    ``calls``: the calls of extended losses that the pass comes to first, in the order of these calls, with the edges of
    their outputs; ``other_way``: a way from the root to a use of a parameter that leads through none of them, if there
    is one.
    """

    calls: list[tuple[Edge, LossCall]] = field(default_factory=list)
    other_way: list[Node] = field(default_factory=list)


def find_losses(graph: Graph, prepared: Prepared, executed: set[Node] | None, asked: Sequence[Edge]) -> FoundLosses:
    """Go down from the roots, as far as to the losses.

    ``executed``: the nodes that run in a pass with respect to the ``asked`` edges; ``None``: all. Below these edges, it
    is continued.
    """
    known = {node: ((node, number), call) for node, number, call in losses_in(graph)}
    must_be_linear = any(not call.is_certain for _, call in known.values())
    ends = set(asked)
    before: dict[Node, Node | None] = {root.node: None for root in graph.roots}
    curved: set[Node] = set()
    found = FoundLosses()
    for node in graph.order:
        if node not in before:
            continue
        if node in known and (known[node][1].is_certain or node not in curved):
            found.calls.append(known[node])
            continue
        if node in prepared.plan.uses:
            found.other_way = found.other_way or _way(node, before)
            continue
        following = [
            (other, number)
            for other, number in graph.edges[node]
            if other is not None
            and (executed is None or node not in executed or other in executed or (other, number) in ends)
        ]
        bends = must_be_linear and (node in curved or not _is_linear(node, graph))
        for other, _ in following:
            before.setdefault(other, node)
            if bends:
                curved.add(other)
    found.calls.sort(key=lambda call: call[0][0]._sequence_nr())
    return found


def _is_linear(node: Node, graph: Graph) -> bool:
    """Whether a node is linear, piece by piece, in all that it has got together."""
    inputs = inputs_of(node, graph)
    return is_flat(node, len(inputs)) or (len(inputs) == 1 and is_linear(node, inputs[0]))


def _way(node: Node | None, before: Mapping[Node, Node | None]) -> list[Node]:
    """The nodes from the root to one, if the pass came to each from the one ``before``."""
    way: list[Node] = []
    while node is not None:
        way.append(node)
        node = before[node]
    return way[::-1]


def refuse_other_terms(way: Sequence[Node], prepared: Prepared, notes: Mapping[Edge, Note], names: str) -> None:
    """Raise for a term that is not an extended loss.

    Raises:
        RuntimeError: Always.
    """
    outputs = {node: note for (node, _), note in notes.items()}
    words: list[str] = []
    end = _parameter_of(way[-1], prepared)
    for node in way:
        if node in outputs:
            module = outputs[node].module()
            end = "the output of " + ("a module" if module is None else type(module).__name__)
            break
        if words or kind(node) not in SUMS:
            words.append(kind(node))
    if len(words) > 6:
        words[3:-2] = ["..."]
    raise RuntimeError(
        f"{names}: the loss has a term that goes through the model and is not an extended loss: "
        f"{' of '.join([*words, end])}. Second-order extensions add up the curvatures of extended losses and know no "
        f"others. Write the term as a torch.nn.Module without parameters that takes the model's output, and extend() "
        f"it; or call backward() for the term outside of the backpack(...) block."
    )


def _parameter_of(node: Node, prepared: Prepared) -> str:
    """A node and a parameter that it uses, in words."""
    plan = prepared.plan
    for planned in plan.uses[node]:
        leaf = planned.leaf if planned.entry is None else plan.entries[planned.entry[0]][0]
        if leaf is not None:
            return f"{kind(node)} with the parameter {name_of(variable_of(leaf))}"
    return kind(node)
