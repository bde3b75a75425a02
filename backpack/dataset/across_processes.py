"""Training on several processes: the quantities of all their samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import Module

from backpack.context import backpack
from backpack.dataset.collection import Collection, part_of
from backpack.dataset.final_results import merged
from backpack.dataset.processes import Processes
from backpack.dataset.survey import chosen_samples, numbers_selected
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.modules.thread_state import HERE


@contextmanager
def across_processes(
    model: Module,
    *extensions: BackpropExtension,
    samples: int,
    gather: bool = False,
    group: Any = None,
    scaler: Any = None,
) -> Iterator[None]:
    """As ``backpack(...)``; when the block ends, results are those for the samples of all processes.

    This is for training loops with ``DistributedDataParallel`` or ``fully_shard``. As for the gradients there, the loss
    of all is the mean of the losses of the processes. If losses average over samples, and all batches have one size,
    this is the loss of one batch with all samples. All processes enter the block together, run one backward pass, and
    leave together. Results of single samples have the scale of the loss of all, and stay on their process unless
    ``gather``. ``subsampling`` counts the samples of all processes, in the order of the processes::

        with across_processes(model, Variance(), samples=len(X)):
            lossfunc(parallel(X), y).backward()

    Args:
        model: The extended model, whose parameters receive the results.
        extensions: The extensions to compute.
        samples: Number of samples in the batch of this process.
        gather: Whether to bring results of single samples to all processes.
        group: Process group (default: all processes).
        scaler: ``torch.amp.GradScaler`` that the loss is scaled by; results are not. Useful in one process, too.

    Raises:
        ValueError: An extension's results of several batches do not merge.
    """
    processes = Processes(group)
    collection = Collection(model, extensions)
    counts = processes.all_objects(samples)
    start, total, factor = sum(counts[: processes.rank]), sum(counts), 1 / processes.count
    numbers = torch.arange(start, start + samples)
    scale = 1.0 if scaler is None else scaler.get_scale()
    chosen = chosen_samples(extensions, total)
    parts = {e.savefield: part_of(e, chosen.get(e.savefield), numbers, factor, scale, total) for e in extensions}
    collection.clear()
    with backpack(*(part.extension for part in parts.values())):
        HERE.blocks[-1].loss_factor = scale
        HERE.blocks[-1].taker = partial(collection.take, parts)
        yield
    collection.merge(parts)
    merged(collection, processes, 1.0, numbers_selected(extensions, total, chosen), gather)
