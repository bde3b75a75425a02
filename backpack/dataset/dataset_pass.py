"""One pass over a data set: all its batches, from a checkpoint on if there is one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch

from backpack.dataset.accumulated import Accumulated
from backpack.dataset.batch_pass import BatchPass
from backpack.dataset.batches import Batch, Batches
from backpack.dataset.checkpoint import Checkpoint, State
from backpack.dataset.collection import GRAD
from backpack.dataset.final_results import merged
from backpack.dataset.identity import identity
from backpack.dataset.interruption import Counts, Interruption
from backpack.dataset.processes import Processes
from backpack.dataset.randomness import Randomness
from backpack.dataset.survey import chosen_samples, numbers_selected, open_files, survey, write_index
from backpack.utils.progress_bar import bar


def own_path(path: Path, processes: Processes) -> Path:
    """The checkpoint of this process."""
    if processes.count == 1:
        return path
    return path.with_name(f"{path.name}.{processes.rank}-of-{processes.count}")


@dataclass(eq=False)
class DatasetPass:
    """One pass over a data set.

    ``reference``: what the loss of the data set divides its sum by, if it is known beforehand, otherwise 1; ``began``:
    the states of all generators before the first batch.
    """

    batch_pass: BatchPass
    batches: Batches
    random: Randomness
    reference: float = 1.0
    saved: Interruption | None = None
    began: State = field(init=False)
    folder: Path | None = None

    def __post_init__(self) -> None:
        self.collection, self.processes = self.batch_pass.collection, self.batches.processes
        self.counts = Counts(torch.zeros((), dtype=torch.float64, device=self.batch_pass.device))

    def save_to(self, path: Path, seconds: float, **further: object) -> None:
        """Save to a file, of each process its own, and go on from what an earlier run has saved there."""
        processes, batches = self.processes, self.batches
        own = identity(
            self.batch_pass.model,
            self.batch_pass.lossfunc,
            self.collection.extensions,
            number_of_batches=batches.count(),
            number_of_samples=batches.samples(),
            number_of_processes=processes.count,
            **further,
        )
        in_step = processes if self.batch_pass.sharded else None
        self.saved = Interruption(
            Checkpoint(own_path(path, processes), seconds, own), self.random, self.collection, self.counts, in_step
        )

    def prepare(self, folder: Path | None) -> None:
        """Find what must be known before the first batch, and open the files for results."""
        collection, goes_on = self.collection, self.saved is not None and self.saved.goes_on
        collection.clear()
        if self.saved is not None:
            self.random.write(self.saved.began)
        self.began = self.random.read()
        fixed = folder is not None or any(extension.fixes_scale for extension in collection.extensions)
        total, self.reference = survey(self.batches, self.batch_pass, collection.extensions, fixed, self.random)
        self.batch_pass.samples = total
        self.batch_pass.chosen = chosen_samples(collection.extensions, total)
        self.folder = folder
        if folder is not None:
            open_files(folder, collection, total or 0, self.batch_pass.chosen, self.processes, anew=not goes_on)

    def compute(self, progress: bool | None) -> None:
        """Run all batches; those that an earlier run has computed are skipped."""
        batches, counts, saved = self.batches.read(), self.counts, self.saved
        deque(islice(batches, counts.done), maxlen=0)
        if saved is not None and saved.goes_on:
            self.random.write(saved.now)
        shown = bar(progress if self.processes.rank == 0 else False, self.batches.rounds(), counts.done)
        with self.batch_pass.watching(), shown as advance:
            for batch in self._in_step(batches) if self.batch_pass.sharded else batches:
                loss, divided = self.batch_pass.run(batch, self.reference)
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

    def results(self, gather: bool, owners: Mapping[str, int] | None = None) -> Accumulated:
        """Merge the results of all processes, and store them on the parameters.

        ``owners``: by name, the only process that keeps the sums of a parameter; ``None``: all processes keep all.
        """
        processes = self.processes
        sums = torch.tensor([self.counts.divided, self.counts.seen], dtype=torch.float64)
        divided, samples = processes.all_sum(sums).tolist()
        if samples == 0:
            raise ValueError("The data set is empty.")
        factor = 1.0 if self.batch_pass.is_sum else self.reference / divided
        if self.reference != 1 and abs(factor - 1) > 1e-9:
            raise RuntimeError(
                f"What the loss of the data set divides by was {self.reference} when it was read first, and "
                f"{divided} at the second time: let all passes over the data give the same targets, of the shape of "
                f"the outputs."
            )
        total = int(samples) if self.batches.sample_ids is None else self.batches.total  # some numbers have no entry
        selected = numbers_selected(self.collection.extensions, total, self.batch_pass.chosen)
        found, places = merged(self.collection, processes, factor, selected, gather, owners)
        for savefield in self.collection.joined:
            rows = self.batch_pass.chosen.get(savefield, torch.arange(total))
            rows = rows if savefield not in places else rows[places[savefield]]
            rows = rows if self.batches.order is None else torch.tensor(self.batches.order)[rows]
            if self.batches.order is not None:
                places[savefield] = rows
            if self.folder is not None and processes.rank == 0:
                write_index(self.folder, savefield, rows)
        fields = [GRAD, *(extension.savefield for extension in self.collection.extensions)]
        names = self.collection.parameters
        results = {field: {name: found[field][name] for name in names if name in found[field]} for field in fields}
        return Accumulated(processes.all_sum(self.counts.loss) * factor, total, results.pop(GRAD), results, places)
