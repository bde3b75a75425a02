"""What a batch holds: how many samples, which inputs and targets, in any containers that models take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves


def moved(value: Any, device: torch.device) -> Any:
    """All tensors in nested containers on this device; mappings become dictionaries."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: moved(entry, device) for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(entry, device) for entry in value))
    if isinstance(value, (list, tuple)):
        return type(value)(moved(entry, device) for entry in value)
    return value


def samples_of(batch: Any, axis: int) -> int:
    """The size of an axis of the first tensor."""
    first = batch
    while isinstance(first, (tuple, list)) and first:
        first = first[0]
    if isinstance(first, Tensor) and first.dim() > axis:
        return first.shape[axis]  # of most batches, without the time that the rest takes
    if isinstance(batch, Mapping):
        batch = dict(batch)
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Mapping):
            return samples_of(leaf, axis)
        if isinstance(leaf, Tensor) and leaf.dim() > axis:
            return leaf.shape[axis]
    raise TypeError(f"The batches of the data set hold no tensor: got {type(batch).__name__}.")


def split(batch: Any) -> tuple[Any, Any]:
    """The inputs and the targets of a batch ``(inputs, targets)`` or a mapping with ``labels``."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise TypeError(
        f"A batch must be a pair (inputs, targets) or a mapping with 'labels'; got {type(batch).__name__}. Pass "
        f"forward=function to accumulate(), a function of the model and a batch that returns the two arguments of the "
        f"loss."
    )


def apply(model: Module, batch: Any) -> tuple[Tensor, Any]:
    """The model's output for a batch, and the targets."""
    inputs, target = split(batch)
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    elif isinstance(inputs, (tuple, list)):
        output = model(*inputs)
    else:
        output = model(inputs)
    if not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
        output = found if found is not None else next(t for t in tree_leaves(output) if isinstance(t, Tensor))
    return output, target
