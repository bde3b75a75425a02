"""The samples, inputs and targets of a batch, in any containers that models take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from backpack.modules.calls import leaves_of


def moved(value: Any, device: torch.device) -> Any:
    """Move all tensors in nested containers to a device; mappings become dictionaries."""
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
    """The size of an axis of the first tensor in a batch.

    Raises:
        TypeError: No tensor has this axis.
    """
    first = batch
    while isinstance(first, (tuple, list)) and first:
        first = first[0]
    if isinstance(first, Tensor) and first.dim() > axis:
        return first.shape[axis]  # enough for most batches, and faster than what follows
    if isinstance(batch, Mapping):
        batch = dict(batch)
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Mapping):
            return samples_of(leaf, axis)
        if isinstance(leaf, Tensor) and leaf.dim() > axis:
            return leaf.shape[axis]
    raise TypeError(f"The inputs hold no tensor that could count the samples: got {type(batch).__name__}.")


def split(batch: Any) -> tuple[Any, Any]:
    """The inputs and the targets of a batch, which is a pair of them or a mapping with ``labels``.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(batch, Mapping) and "labels" in batch:
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise TypeError(
        f"A batch must be a pair (inputs, targets) or a mapping with 'labels'; got {type(batch).__name__}. For a "
        f"single batch, pass [(inputs, targets)]; for batches of other forms, forward=function, a function of the "
        f"model and a batch that returns the two arguments of the loss."
    )


def entry(output: Any, name: str) -> Any:
    """The entry or attribute of a model's output that has this name; ``None``: there is none."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def apply(model: Module, batch: Any) -> tuple[Tensor, Any]:
    """The model's output for a batch, and the targets.

    If the output is no tensor, its ``logits`` are taken, or else its first tensor of floating-point numbers.

    Raises:
        TypeError: The output holds no such tensor.
    """
    inputs, target = split(batch)
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    elif isinstance(inputs, (tuple, list)):
        output = model(*inputs)
    else:
        output = model(inputs)
    if not isinstance(output, Tensor):
        named = entry(output, "logits")
        tensors = [t for t in leaves_of(output) if isinstance(t, Tensor) and t.is_floating_point()]
        if named is None and not tensors:
            raise TypeError(
                f"The output of {type(model).__name__}, a {type(output).__name__}, holds no tensor that a loss could "
                f"take. Let the model return it in a tuple, a dictionary or a dataclass; or pass forward=function, a "
                f"function that calls the model so that it returns a tensor, and returns the two arguments of the loss."
            )
        output = tensors[0] if named is None else named
    return output, target
