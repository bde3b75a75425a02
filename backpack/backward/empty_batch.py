"""A pass for a batch without a sample, as Poisson sampling may draw it: results have no rows, and sums are zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack.backward.block import Block
from backpack.graph import Edge, shape_of, variable_of
from backpack.modules.calls import Note
from backpack.modules.loss_calls import LossCall
from backpack.uses import Explicit


def has_no_entries(notes: Mapping[Edge, Note]) -> bool:
    """Whether all outputs of extended modules are empty, apart from single numbers such as losses."""
    shapes = [shape for edge in notes if (shape := shape_of(*edge))]
    return bool(shapes) and all(0 in shape for shape in shapes)


def store_results(
    block: Block, notes: Mapping[Edge, Note], losses: Sequence[tuple[Node, int, LossCall]], leaves: Sequence[Node]
) -> None:
    """Store the results of all extensions of a block for a batch without a sample.

    Raises:
        RuntimeError: An extension averages over samples.
    """
    shape, axis = next((shape, note.axis) for edge, note in notes.items() if (shape := shape_of(*edge)))
    samples = shape[axis if axis < len(shape) else 0] if block.ids is None else block.ids.count
    parameters = [variable_of(leaf) for leaf in leaves]
    if parameters:
        block.check(samples, parameters)
    for extension in block.second_order:
        if extension.needs_samples_apart:
            raise RuntimeError(
                f"{type(extension).__name__} averages over samples, and the batch has none. Skip batches of size 0."
            )
        columns = extension.mc_samples if extension.seeds == "sampled" else prod(losses[0][2].input.shape[1:])
        for parameter in parameters:
            if extension.backprop == "products":
                block.store(parameter, extension.savefield, torch.zeros_like)
            else:
                found = _nothing(parameter, columns, samples)
                block.store(parameter, extension.savefield, extension.complete(extension.compute(found), found))
    for extension in block.first_order:
        found_of = [(parameter, _nothing(parameter, 1, samples)) for parameter in parameters]
        if extension.needs_all_parameters:
            joint = extension.combine({parameter: extension.measure(found) for parameter, found in found_of}, None)
            for parameter, found in found_of:
                value = joint if extension.is_of_model else extension.compute_jointly(found, joint)
                block.store(parameter, extension.savefield, value)
        elif not extension.has_rules_only:
            for parameter, found in found_of:
                block.store(parameter, extension.savefield, extension.compute(found))
    for parameter in parameters:
        block.parameter_done(parameter)


def _nothing(parameter: Tensor, columns: int, samples: int) -> Explicit:
    found = Explicit(parameter.new_zeros(columns, samples, *parameter.shape))
    found.parameter, found.others = parameter, found
    return found
