"""What ``accumulate`` refuses or warns of before it reads the data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn import Module, RNNBase
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.loss import _Loss
from torch.utils.data import Dataset

from backpack.dataset.batches import Batches
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.merge_batches import Joined

CALL = "accumulate(model, lossfunc, dataloader, *extensions)"


def check_arguments(model: Any, lossfunc: Any, dataloader: Any) -> None:
    """Say which argument is not what it should be.

    Raises:
        TypeError: One is not.
    """
    if not isinstance(model, Module):
        raise TypeError(f"{CALL} takes a torch.nn.Module as the model, got {_name(model)}.")
    has_parameters = isinstance(lossfunc, Module) and _has_parameters(lossfunc)
    if isinstance(model, _Loss) or (has_parameters and not _has_parameters(model)):
        raise TypeError(f"{CALL} takes the model first, and then the loss; got {_name(model)} and {_name(lossfunc)}.")
    if lossfunc is not None and (not isinstance(lossfunc, Module) or isinstance(lossfunc, type)):
        raise TypeError(
            f"{CALL} takes a module as the loss, such as torch.nn.CrossEntropyLoss() in place of F.cross_entropy, or "
            f"None for the loss that the model returns; got {_name(lossfunc)}."
        )
    if isinstance(dataloader, (BackpropExtension, Tensor, Dataset)) or not isinstance(dataloader, Iterable):
        remedy = ""
        if isinstance(dataloader, Dataset):
            remedy = " Write DataLoader(dataset, batch_size=...)."
        elif isinstance(dataloader, Tensor):
            remedy = " Write [(inputs, targets)] for a single batch."
        raise TypeError(f"{CALL} takes an iterable of batches behind the loss, got {_name(dataloader)}.{remedy}")


def _has_parameters(module: Module) -> bool:
    return any(True for _ in module.parameters())


def _name(value: Any) -> str:
    return str(getattr(value, "__name__", type(value).__name__))


def warn_of_training_mode(model: Module) -> None:
    """Warn if layers make results depend on chance or on the batches."""
    active = [module for module in model.modules() if module.training]
    found = [type(m).__name__ for m in active if isinstance(m, _DropoutNd) and m.p > 0]
    found += [type(m).__name__ for m in active if isinstance(m, RNNBase) and m.dropout > 0]
    found += [type(m).__name__ for m in active if isinstance(m, _BatchNorm)]
    if found:
        warnings.warn(
            f"The model is in training mode and has {' and '.join(dict.fromkeys(found))}, so that the results depend "
            f"on chance or on how the data are divided into batches. Call model.eval() before accumulate().",
            stacklevel=3,
        )


def warn_of_loader(batches: Batches, extensions: Iterable[BackpropExtension]) -> None:
    """Warn if a loader leaves samples out, or draws an order in which users cannot find their samples again."""
    loader: Any = batches.loader
    samples = batches.samples()
    if samples is not None and samples < len(loader.sampler):
        warnings.warn(
            f"The loader leaves out {len(loader.sampler) - samples} of {len(loader.sampler)} samples: pass "
            f"drop_last=False to count them.",
            stacklevel=3,
        )
    if not batches.draws_an_order:
        return
    selected = [type(e).__name__ for e in extensions if e.get_subsampling() is not None]
    joined = [type(e).__name__ for e in extensions if isinstance(e.batches, Joined)]
    if selected or joined:
        parts = [f"subsampling of {', '.join(selected)} counts them in this order"] if selected else []
        parts += [f"row i of {', '.join(joined)} is sample found.places[savefield][i]"] if joined else []
        warnings.warn(
            f"The loader draws its samples in an order of its own (shuffle=True, or a sampler): {'; '.join(parts)}. "
            f"Pass a loader with shuffle=False for the order of the data set.",
            stacklevel=3,
        )
