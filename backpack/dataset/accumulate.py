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
from backpack.dataset.batch_pass import BatchPass
from backpack.dataset.batches import Batches, require_two_readings
from backpack.dataset.caveats import check_arguments, warn_of_loader, warn_of_training_mode
from backpack.dataset.collection import Collection
from backpack.dataset.dataset_pass import DatasetPass
from backpack.dataset.model_loss import ModelLoss, own_loss
from backpack.dataset.processes import Processes
from backpack.dataset.randomness import Randomness
from backpack.dataset.survey import writable
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.modules.forward_hooks import EXTENDED
from backpack.modules.parameters import name_of

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
        group: Process group (default: all processes).
        progress: Whether to show a progress bar (default: on a terminal, if ``tqdm`` is installed).

    Raises:
        TypeError: An argument is of a wrong kind.
        OverflowError: A scaled gradient is not finite.
        ValueError: An extension has no meaning for a data set, it is not known what the loss divides by, a sample is in
            several batches, or the checkpoint is of another run.
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
    warn_of_training_mode(model)
    warn_of_loader(Batches(dataloader, 0, Processes(group), sample_ids), extensions)
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model = model.module
    folder = None if stream is None else writable(Path(stream))
    path = None if checkpoint is None else Path(checkpoint)

    def one_pass(extensions: tuple[BackpropExtension, ...], folder: Path | None, path: Path | None) -> DatasetPass:
        collection = Collection(model, extensions, None if offload is None else torch.device(offload), True)
        batch_pass = BatchPass(model, lossfunc, collection, forward, denominator, scaler)
        batches = Batches(dataloader, EXTENDED[model].batch_axis, Processes(group), sample_ids)
        run = DatasetPass(batch_pass, batches, Randomness(dataloader))
        if path is not None:
            run.save_to(path, checkpoint_seconds, folder_for_results=folder)
        with torch.enable_grad():
            run.prepare(folder)
            run.compute(progress)
        return run

    ahead = {extension: needed for extension in extensions if (needed := extension.beforehand()) is not None}
    if ahead:
        Collection(model, tuple(e for e in extensions if e not in ahead))  # refuses what cannot be, before a long pass
        require_two_readings(dataloader, f"{' and '.join(type(e).__name__ for e in ahead)} takes two passes")
        first = one_pass(tuple(ahead.values()), None, path and path.with_name(f"{path.name}.beforehand"))
        found = first.results(gather=True).results
        first.collection.clear()
        first.random.write(first.began)
        names = {name: name_of(parameter) for name, parameter in first.collection.parameters.items()}
        by_name = {e: {names[name]: value for name, value in found[e.savefield].items()} for e in ahead}
        extensions = tuple(e.given(by_name[e]) if e in ahead else e for e in extensions)
    return one_pass(extensions, folder, path).results(gather)
