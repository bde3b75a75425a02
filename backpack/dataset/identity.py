"""The identity of a run: what a later run must have in common with it to go on where it ended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from backpack.extensions.backprop_extension import BackpropExtension


def identity(
    model: Module, lossfunc: Module, extensions: Iterable[BackpropExtension], **further: object
) -> dict[str, str]:
    """What two runs must have in common for one to go on where the other ended."""
    shapes = {name: [*value.shape, str(value.dtype)] for name, value in model.state_dict().items()}
    reduction = getattr(lossfunc, "reduction", None)
    return {
        "model": f"{type(model).__name__}, state {digest_of(shapes)}",
        "weights of the model": _digest_of_weights(model),
        "training mode": str(sorted(name for name, module in model.named_modules() if module.training)),
        "loss": f"{lossfunc!r}, reduction {reduction}, weights {_digest_of_weights(lossfunc)}",
        "extensions": "; ".join(map(describe, extensions)),
        **{name.replace("_", " "): str(value) for name, value in further.items()},
    }


def digest_of(value: object) -> str:
    """A few digits that stand for numbers and names in lists and dictionaries."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _digest_of_weights(module: Module) -> str:
    return _digest(sorted((*module.named_parameters(), *module.named_buffers())))


def describe(extension: BackpropExtension) -> str:
    """An extension with all its options, as text."""
    options = {k: _shown(v) for k, v in sorted(vars(extension).items()) if not k.startswith("_")}
    rules = {module.__name__: type(rule).__name__ for module, rule in extension.rules.items()}
    return f"{type(extension).__name__}({options}, rules={rules}, subsampling={extension.subset.key})"


def _shown(option: Any) -> Any:
    """The value of an option, or a digest of the tensors in it."""
    tensors = [leaf for leaf in tree_leaves(option) if isinstance(leaf, Tensor)]
    return _digest((str(place), tensor) for place, tensor in enumerate(tensors)) if tensors else option


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, value in tensors:
        local = value.to_local() if hasattr(value, "to_local") else value
        digest.update(name.encode())
        digest.update(local.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
