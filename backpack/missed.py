"""Backward passes that end before parameters, as ``inputs=`` can have it: which these are, and what becomes of them.

A pass that ends at outputs of extended modules is continued to their parameters, without the parameters' gradients.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.bystanders import undisturbed
from backpack.compat import pull_back
from backpack.delivery import Delivery
from backpack.landmarks import MARK, Found, bystanders, count_uses, landmarks, sum_uses
from backpack.looped import edges_from
from backpack.quantities import Quantity
from backpack.recorder import call_at
from backpack.watched import SHARDED, WATCHED


def pull_on(stopped: Sequence[tuple[GradientEdge, Tensor]], delivery: Delivery, uses: Counter[int]) -> None:
    """Send cotangents on to the first uses of parameters, from edges at which a pass has ended.

    ``delivery``: what the pass has delivered; ``uses``: how often each parameter is used on the way, filled in here.
    """
    found: Found = []
    ends: dict[GradientEdge, None] = {}
    for edge, _ in stopped:
        if (call := call_at(edge)) is not None:
            delivery.forget(call)  # its cotangent comes again, and perhaps more of it
        outputs, firsts = landmarks(edge)
        found += outputs
        ends |= dict.fromkeys(firsts)
    uses.update(count_uses(found))
    if uses:
        edges, grads = zip(*stopped, strict=True)
        with undisturbed(bystanders(found)):
            pull_back(edges, list(ends), grads, torch.is_grad_enabled())


def find_missed(
    delivery: Delivery, starts: list[tuple[Node, dict[int, int]]], seen: set[int], asked: bool
) -> tuple[dict[int, Tensor], set[int]]:
    """Parameters of which the pass did not reach all uses, and which of them it did reach some of.

    The arguments are those of a ``Block``.
    """
    arrivals = delivery.arrivals
    missed: dict[int, Tensor] = {}
    partial: set[int] = set()
    if asked and not arrivals and all(own.keys() <= seen for _, own in starts):
        return missed, partial
    left = [source for source in delivery.sources.values() if source.tensor not in SHARDED]
    delivered = Counter(id(p) for s in left for p in s.parameters for _ in arrivals.get(id(s.tensor), ()))
    for node, own in starts:
        if not (delivered or not asked or own.keys() - seen):
            continue
        used = {id(own): own}
        ends: list[Any] = []
        for edge in edges_from(GradientEdge(node, 0)):
            metadata: Any = edge.node.metadata
            if (origin := metadata.get((MARK, edge.output_nr))) is not None:
                used[id(origin.uses)] = origin.uses
            ends.append(getattr(edge.node, "variable", None))
        total = sum_uses(used.values())
        partial |= {key for key, number in delivered.items() if number < total[key]}
        missed |= {id(p): p for p in ends if p in WATCHED and (id(p) in partial or id(p) not in seen)}
    return missed, partial


def leave_out(missed: dict[int, Tensor], extensions: Sequence[Quantity], asked: bool) -> None:
    """Leave no result on parameters, and no old one; say so where users do not know.

    ``asked``: whether they have asked for the gradients of some.

    Raises:
        RuntimeError: An extension needs all parameters.
    """
    for parameter in missed.values():
        for extension in extensions:
            vars(parameter).pop(extension.savefield, None)
    names = [WATCHED[parameter].name for parameter in missed.values()]
    found = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
    for extension in extensions:
        if extension.needs_all_parameters:
            raise RuntimeError(
                f"{type(extension).__name__} depends on all parameters of the model, and the backward pass ended "
                f"before it reached all uses of {found}. Call backward(), or freeze with requires_grad_(False) "
                f"what is to be left out."
            )
    if not asked:
        warnings.warn(
            f"The backward pass ended before it reached all uses of {found}: there are no results of "
            f"{', '.join(type(extension).__name__ for extension in extensions)} for these parameters. Call "
            f"backward(), or autograd.grad with respect to the parameters whose results are wanted.",
            stacklevel=3,
        )
