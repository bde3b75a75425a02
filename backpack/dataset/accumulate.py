"""Quantities of a whole data set, computed batch by batch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from backpack.context import backpack
from backpack.dataset.batch_pass import BatchPass
from backpack.dataset.batches import Batch, Batches, require_two_readings
from backpack.dataset.checkpoint import Checkpoint, State
from backpack.dataset.collection import GRAD, Collection
from backpack.dataset.final_results import merged
from backpack.dataset.identity import identity
from backpack.dataset.interruption import Counts, Interruption
from backpack.dataset.processes import Processes
from backpack.dataset.randomness import Randomness
from backpack.dataset.survey import chosen_samples, numbers_selected, open_files, survey, writable
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.modules.forward_hooks import EXTENDED
from backpack.utils.progress_bar import bar


@dataclass(eq=False)
class Accumulated:
    """Results for a data set; those of an extension are on the parameters as well.

    ``loss`` and ``grad`` (by parameter name) are those of the whole data set, which has this many ``samples``.
    ``results`` holds a dictionary by parameter name for each ``savefield``; ``found[savefield]`` is short for
    ``found.results[savefield]``. If results of single samples stay on their process, ``places`` says by ``savefield``
    which of the selected samples they belong to.
    """

    loss: Tensor
    samples: int
    grad: dict[str, Tensor] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    places: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, savefield: str) -> dict[str, Any]:
        return self.results[savefield]


def accumulate(
    model: Module,
    lossfunc: Module,
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
        lossfunc: A loss whose attribute ``reduction`` is ``"mean"`` or ``"sum"``.
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
        OverflowError: A scaled gradient is not finite.
        ValueError: An extension has no meaning for a data set, it is not known what the loss divides by, a sample is in
            several batches, or the checkpoint is of another run.
        OSError: The checkpoint or the files for results cannot be written.
    """
    backpack(*extensions)  # refuses what is no extension
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model = model.module
    folder = None if stream is None else writable(Path(stream))
    path = None if checkpoint is None else Path(checkpoint)

    def one_pass(extensions: tuple[BackpropExtension, ...], folder: Path | None, path: Path | None) -> Run:
        collection = Collection(model, extensions, None if offload is None else torch.device(offload), True)
        one = BatchPass(model, lossfunc, collection, forward, denominator, scaler)
        batches = Batches(dataloader, EXTENDED[model].batch_axis, Processes(group), sample_ids)
        loss = torch.zeros((), dtype=torch.float64, device=one.device)
        run = Run(one, batches, Counts(loss), Randomness(dataloader))
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
        found = first.results(False).results
        first.collection.clear()
        first.random.write(first.began)
        extensions = tuple(e.given(found[e.savefield]) if e in ahead else e for e in extensions)
    return one_pass(extensions, folder, path).results(gather)


@dataclass(eq=False)
class Run:
    """One pass over a data set.

    ``reference``: what the loss of the data set divides its sum by, if it is known beforehand, otherwise 1; ``began``:
    the states of all generators before the first batch.
    """

    one: BatchPass
    batches: Batches
    counts: Counts
    random: Randomness
    reference: float = 1.0
    saved: Interruption | None = None
    began: State = field(init=False)

    def __post_init__(self) -> None:
        self.collection, self.processes = self.one.collection, self.batches.processes

    def save_to(self, path: Path, seconds: float, **further: object) -> None:
        """Save to a file, of each process its own, and go on from what an earlier run has saved there."""
        processes, batches = self.processes, self.batches
        if processes.count > 1:
            path = path.with_name(f"{path.name}.{processes.rank}-of-{processes.count}")
        own = identity(
            self.one.model,
            self.one.lossfunc,
            self.collection.extensions,
            number_of_batches=batches.count(),
            number_of_samples=batches.samples(),
            number_of_processes=processes.count,
            **further,
        )
        in_step = processes if self.one.sharded else None
        self.saved = Interruption(Checkpoint(path, seconds, own), self.random, self.collection, self.counts, in_step)

    def prepare(self, folder: Path | None) -> None:
        """Find what must be known before the first batch, and open the files for results."""
        collection, goes_on = self.collection, self.saved is not None and self.saved.goes_on
        collection.clear()
        if self.saved is not None:
            self.random.write(self.saved.began)
        self.began = self.random.read()
        fixed = folder is not None or any(extension.fixes_scale for extension in collection.extensions)
        total, self.reference = survey(self.batches, self.one, collection.extensions, fixed, self.random)
        self.one.chosen = chosen_samples(collection.extensions, total)
        if folder is not None:
            open_files(folder, collection, total or 0, self.one.chosen, self.processes, anew=not goes_on)

    def compute(self, progress: bool | None) -> None:
        """Run all batches; those that an earlier run has computed are skipped."""
        batches, counts, saved = self.batches.read(), self.counts, self.saved
        deque(islice(batches, counts.done), maxlen=0)
        if saved is not None and saved.goes_on:
            self.random.write(saved.now)
        shown = bar(progress if self.processes.rank == 0 else False, self.batches.rounds(), counts.done)
        with self.one.watching(), shown as advance:
            for batch in self._in_step(batches) if self.one.sharded else batches:
                loss, divided = self.one.run(batch, self.reference)
                if batch.counts:
                    counts.loss.add_(loss, alpha=(divided or 1.0) / self.reference)
                    counts.divided += divided
                    counts.seen += batch.samples
                counts.done += 1
                if saved is not None:
                    saved.save_if_due()
                advance()
        if saved is not None:
            saved.save()

    def _in_step(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """As many batches as the process with most of them has, since parameters are gathered together.

        Those beyond its own share do not count.
        """
        last: Batch | None = None
        while True:
            batch = next(batches, None)
            if not self.processes.all_sum(torch.tensor(batch is not None, dtype=torch.int64)).item():
                return
            if batch is None:
                batch = last or next(self.batches.read_all())
                batch.counts = False
            last = batch
            yield batch

    def results(self, gather: bool) -> Accumulated:
        """Merge the results of all processes, and store them on the parameters."""
        processes = self.processes
        sums = torch.tensor([self.counts.divided, self.counts.seen], dtype=torch.float64)
        divided, samples = processes.all_sum(sums).tolist()
        if samples == 0:
            raise ValueError("The data set is empty.")
        factor = 1.0 if self.one.is_sum else self.reference / divided
        if self.reference != 1 and abs(factor - 1) > 1e-9:
            raise RuntimeError(
                f"What the loss of the data set divides by was {self.reference} when it was read first, and "
                f"{divided} at the second time: let all passes over the data give the same targets, of the shape of "
                f"the outputs."
            )
        total = int(samples) if self.batches.sample_ids is None else self.batches.total  # some numbers have no entry
        selected = numbers_selected(self.collection.extensions, total, self.one.chosen)
        found, places = merged(self.collection, processes, factor, selected, gather)
        return Accumulated(processes.all_sum(self.counts.loss) * factor, total, found.pop(GRAD), found, places)
