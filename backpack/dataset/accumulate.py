"""Quantities of a whole data set, computed batch by batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from backpack.context import backpack
from backpack.dataset.accumulated import Accumulated
from backpack.dataset.batches import Batches
from backpack.dataset.caveats import check_arguments, warn_of_loader, warn_of_training_mode
from backpack.dataset.model_loss import ModelLoss, own_loss
from backpack.dataset.part_passes import PartPasses
from backpack.dataset.parts import Parts
from backpack.dataset.processes import Processes
from backpack.dataset.survey import writable
from backpack.extensions.backprop_extension import BackpropExtension

__all__ = ["Accumulated", "accumulate"]


def accumulate(
    model: Module,
    lossfunc: Module | None,
    dataloader: Iterable[Any],
    *extensions: BackpropExtension,
    forward: Callable[[Module, Any], tuple[Tensor, Any]] | None = None,
    denominator: Callable[[Any], float] | None = None,
    sample_ids: Callable[[Any], Any] | None = None,
    scaler: Any = None,
    stream: str | os.PathLike[str] | None = None,
    offload: str | torch.device | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 60.0,
    gather: bool = False,
    parts: Parts = None,
    store: str | os.PathLike[str] | None = None,
    sharded: bool = False,
    group: Any = None,
    progress: bool | None = None,
) -> Accumulated:
    """Compute for a whole data set what one batch of all its samples would give.

    Sums and diagonals of a batch enter with the weight that the batch has in the loss of the data set; for ``mean``,
    class weights, ignored targets and a smaller last batch count. Variances are merged by the formula of Chan, Golub &
    LeVeque (1979). Results of single samples are joined in the order of the data. Kronecker factors from inputs are
    averaged over samples, those from cotangents summed; the eigenvalues of ``EKFAC`` take a second pass. Random
    quantities (``*MC``) are drawn batch by batch. ``subsampling`` of an extension counts the samples of the data set.
    ``p.grad`` is not touched::

        found = accumulate(model, torch.nn.CrossEntropyLoss(), loader, DiagGGNExact())
        found["diag_ggn_exact"]["0.weight"]

    Under ``torch.distributed``, each process passes the same data and takes its share of the batches in turn. Results
    are those of all processes, except that results of single samples stay on their process unless ``gather``.

    Args:
        model: The model, which is extended if it is not yet. ``DistributedDataParallel`` may wrap it.
        lossfunc: A loss whose attribute ``reduction`` is ``"mean"`` or ``"sum"``. ``None``: the loss that the model
            returns for batches with ``labels`` (its output's ``loss``); for extensions of first order.
        dataloader: Yields batches: pairs of inputs (a tensor, or a sequence or mapping of arguments) and targets, or
            mappings with ``labels``.
        extensions: The extensions to compute.
        forward: A function of the model and a batch that returns the two arguments of the loss, for other batches.
        denominator: A function of a batch that returns what the mean divides by, for losses without a known rule.
        sample_ids: A function of a batch that tells which sample each leading entry of the output belongs to, as
            ``backpack`` takes it. It returns the samples' numbers in the data set; or ``(ids, count)`` with numbers in
            the batch, whose ``count`` samples follow those of earlier batches. No sample may be in several batches.
        scaler: ``torch.amp.GradScaler`` for ``float16``: the loss is scaled, results are not.
        stream: Folder for results of single samples: files ``savefield.parameter.npy``, read as memory maps.
        offload: Device that results are moved to as they come.
        checkpoint: File that the run is saved to. After the run was killed, the same call continues it. Each process
            has a file of its own, and so has the first pass for ``EKFAC``, with the ending ``.beforehand``. The file
            stays when the run has ended.
        checkpoint_seconds: Least time between two savings.
        gather: Whether to bring results of single samples to all processes.
        parts: Into how many parts the parameters are divided, in the order of the model and with about equal memory for
            results; or the names of the parameters of each part. The data are read for one part after the other, and
            the results are those without parts: generators begin each time in the same state.
        store: Folder that results go to instead of memory, as soon as their part is complete: for each parameter a
            safetensors file, read by ``CurvatureStore``. The same call does not compute complete parts again.
        sharded: Whether the sums of each parameter stay on one of the processes, which alone decomposes its factors.
            ``found`` has those of this process; with ``store``, files of all are in one folder.
        group: Process group (default: all processes).
        progress: Whether to show a progress bar (default: on a terminal, if ``tqdm`` is installed).

    Raises:
        TypeError: An argument is of a wrong kind.
        OverflowError: A scaled gradient is not finite.
        ValueError: An extension has no meaning for a data set, or for parts of the parameters; it is not known what the
            loss divides by; a sample is in several batches; or the checkpoint or the files are of another run.
        OSError: The checkpoint or the files for results cannot be written.

    Warns:
        UserWarning: The model is in training mode and has layers for which that makes a difference; the loader leaves
            samples out, or draws an order of its own that rows of results then have.
    """
    check_arguments(model, lossfunc, dataloader)
    backpack(*extensions)  # refuses what is no extension
    if lossfunc is None:
        if second := [type(e).__name__ for e in extensions if e.seeds is not None]:
            raise ValueError(
                f"{' and '.join(second)} starts from an extended loss, which a model's own loss cannot be: pass "
                f"lossfunc, and forward= if the model is called in another way than lossfunc(model(inputs), targets)."
            )
        lossfunc, forward = ModelLoss(), forward or own_loss
    processes = Processes(group)
    warn_of_training_mode(model)
    warn_of_loader(Batches(dataloader, 0, processes, sample_ids), extensions)
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model = model.module
    run = PartPasses(
        model, lossfunc, dataloader, extensions, forward, denominator, sample_ids, scaler, processes,
        folder=None if stream is None else writable(Path(stream), "stream"),
        device=None if offload is None else torch.device(offload),
        checkpoint=None if checkpoint is None else Path(checkpoint),
        seconds=checkpoint_seconds, gather=gather, progress=progress,
    )  # fmt: skip
    return run.all_parts(parts, None if store is None else writable(Path(store), "store"), sharded)
