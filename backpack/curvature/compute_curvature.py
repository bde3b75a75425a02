"""Where second order begins: it finds the losses of a backward pass, and sends columns from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack.backward.block import Block
from backpack.backward.call import Call, executed_for
from backpack.backward.collector import Prepared
from backpack.backward.preparation import refuse_other_losses
from backpack.curvature.find_losses import find_losses, refuse_other_terms
from backpack.curvature.loss_inputs import origin_of
from backpack.curvature.loss_term import PASSES
from backpack.curvature.losses.with_heads import has_codes, without_head
from backpack.graph import Edge, forget_recomputed
from backpack.graph.users_hooks import observed, undisturbed
from backpack.modules.calls import Note
from backpack.modules.loss_calls import LossCall
from backpack.modules.module_io import ModuleIO


def may_rerun_model(block: Block) -> bool:
    """Whether an extension of a block may have to run the model again, with functions that have second derivatives."""
    return any(PASSES[extension.backprop].double_backward for extension in block.second_order)


def compute_curvature(
    block: Block, call: Call, prepared: Prepared, notes: Mapping[Edge, Note], module_io: dict[Node, list[ModuleIO]]
) -> None:
    """Compute the second-order extensions, for the losses that a call runs through, before its pass begins."""
    graph, asked = prepared.graph, call.asked
    losses = find_losses(graph, prepared, executed_for(graph, asked) if asked else None, asked)
    if losses.other_way:
        if not losses.calls:
            refuse_other_losses(block)
        names = ", ".join(type(extension).__name__ for extension in block.second_order)
        refuse_other_terms(losses.other_way, prepared, notes, names)
    if not losses.calls:
        return
    with torch.set_grad_enabled(call.creates_graph), undisturbed(observed(graph)):
        outers = call.cotangents([edge for edge, _ in losses.calls])
        found = [(own, outer) for (_, own), outer in zip(losses.calls, outers, strict=True) if outer is not None]
        try:
            ways = _ways(block, found, call.creates_graph) if found else {}
            for left, (in_codes, extensions) in zip(reversed(range(len(ways))), ways.items(), strict=True):
                begun = [(without_head(*own), outer) for own, (_, outer) in zip(in_codes, found, strict=True)]
                origin_of(begun, prepared, notes, module_io).run(block, extensions, last=not left)
        finally:
            forget_recomputed()


def _ways(
    block: Block, found: Sequence[tuple[LossCall, Tensor]], create_graph: bool
) -> dict[tuple[tuple[LossCall, bool], ...], list[Any]]:
    """The extensions of a block, by the calls of losses whose curvature begins at codes for them instead of logits."""
    ways: dict[Any, list[Any]] = {}
    for extension in block.second_order:
        seeds = extension.seeds if extension.backprop == "sqrt" and not create_graph else ""
        ways.setdefault(tuple((call, has_codes(call, seeds)) for call, _ in found), []).append(extension)
    return ways
