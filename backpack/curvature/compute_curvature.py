"""Where second order begins: it finds the losses of a backward pass, and sends columns from there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.autograd.graph import Node

from backpack.backward.block import Block
from backpack.backward.call import Call, executed_for
from backpack.backward.collector import Prepared
from backpack.backward.preparation import refuse_other_losses
from backpack.curvature.find_losses import find_losses, refuse_other_terms
from backpack.curvature.loss_inputs import origin_of
from backpack.curvature.loss_term import PASSES
from backpack.curvature.losses.with_heads import without_head
from backpack.graph import Edge, forget_recomputed
from backpack.graph.users_hooks import observed, undisturbed
from backpack.modules.calls import Note
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
        found = [
            (without_head(own), outer)
            for (_, own), outer in zip(losses.calls, outers, strict=True)
            if outer is not None
        ]
        try:
            if found:
                origin_of(found, prepared, notes, module_io).run(block)
        finally:
            forget_recomputed()
