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
    """As ``backpack(...)``, with results for the samples of all processes of ``torch.distributed`` when it ends.

    For a training loop with ``DistributedDataParallel`` or ``fully_shard``. The loss of all is the mean of the losses
    of the processes, as it is for the gradients there: with a loss that averages over samples, and batches of one
    size, that of one batch with all samples. All processes enter and leave the block together, after one backward
    pass. Results of single samples stay on their process (with the scale of the loss of all) unless ``gather``;
    ``subsampling`` counts the samples of all processes, in the order of the processes.

    Args:
        model: Extended; its parameters receive the results.
        extensions: What to compute.
        samples: Number of samples in the batch of this process.
        gather: Bring results of single samples to all processes.
        group: Process group (default: all processes).
        scaler: ``torch.amp.GradScaler`` that the loss is scaled by: results are not. Of use in one process, too.

    Raises:
        ValueError: An extension's results of several batches do not merge.
    """
    processes = Processes(group)
    collection = Collection(model, extensions)
    counts = processes.all_objects(samples)
    start, total, factor = sum(counts[: processes.rank]), sum(counts), 1 / processes.count
    whole = torch.arange(start, start + samples)
    scale = 1.0 if scaler is None else scaler.get_scale()
    parts, selected = {}, {}
    for extension in extensions:
        chosen = extension.subset.rows(total, torch.device("cpu"))
        parts[extension.savefield] = part_of(extension, chosen, whole, factor, scale)
        selected[extension.savefield] = total if chosen is None else len(chosen)
    collection.clear()
    with backpack(*(part.extension for part in parts.values())):
        HERE.blocks[-1].loss_factor = scale
        HERE.blocks[-1].taker = partial(collection.take, parts)
        yield
    collection.merge(parts)
    merged(collection, processes, 1.0, selected, gather)
