"""The batches of a data set: how many there are, and which of them a process reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from backpack.dataset.contents import samples_of
from backpack.dataset.processes import Processes


def require_two_readings(loader: Any, why: str) -> None:
    """Raise where data that ``why`` needs more than once can be read once only."""
    if isinstance(loader, Iterator):
        raise ValueError(
            f"The data can be read once only, but {why}: pass a DataLoader or a list instead of an iterator."
        )


@dataclass(eq=False)
class Batch:
    """One batch: the number of its first sample in the data set, how many it has, and what it holds."""

    start: int
    samples: int
    content: Any
    counts: bool = True


@dataclass(eq=False)
class Batches:
    """The batches of a process: every ``count``-th of those of the data set, which all processes are given.

    Raises:
        ValueError: The data set is already divided between processes.
    """

    loader: Iterable[Any]
    axis: int
    processes: Processes

    def __post_init__(self) -> None:
        if self.processes.count > 1 and isinstance(getattr(self.loader, "sampler", None), DistributedSampler):
            raise ValueError(
                "accumulate() divides the data between processes itself: pass the DataLoader without its "
                "DistributedSampler, which repeats samples to make the shares equal."
            )

    @property
    def _sampled(self) -> bool:
        """Whether the samples of each batch are chosen beforehand."""
        loader = self.loader
        return (
            isinstance(loader, DataLoader)
            and loader.batch_sampler is not None
            and not isinstance(loader.dataset, IterableDataset)
        )

    def count(self) -> int | None:
        """The number of batches of the data set, where it is known."""
        return len(self.loader) if hasattr(self.loader, "__len__") else None  # type: ignore[arg-type]

    def samples(self) -> int | None:
        """The number of samples of the data set, where it is known without reading it."""
        if not self._sampled or self.loader.batch_size is None:  # type: ignore[attr-defined]
            return None
        n = len(self.loader.sampler)  # type: ignore[attr-defined]
        return n - n % self.loader.batch_size if self.loader.drop_last else n  # type: ignore[attr-defined]

    def rounds(self) -> int | None:
        """The number of batches of the process with most of them, where it is known."""
        count = self.count()
        return None if count is None else -(-count // self.processes.count)

    def read(self) -> Iterator[Batch]:
        """The process's own batches."""
        if self.processes.count > 1 and self._sampled:
            yield from self._own()
            return
        for number, batch in enumerate(self.read_all()):
            if number % self.processes.count == self.processes.rank:
                yield batch

    def read_all(self) -> Iterator[Batch]:
        """The batches of all processes."""
        start = 0
        for content in self.loader:
            samples = samples_of(content, self.axis)
            yield Batch(start, samples, content)
            start += samples

    def _own(self) -> Iterator[Batch]:
        """As ``read``, without reading the others' samples; all processes follow the order that the first one draws."""
        loader: Any = self.loader
        order = self.processes.same(lambda: [list(indices) for indices in loader.batch_sampler])
        rank, count = self.processes.rank, self.processes.count
        own = DataLoader(
            loader.dataset,
            batch_sampler=order[rank::count],
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
        )
        starts = [0]
        for indices in order:
            starts.append(starts[-1] + len(indices))
        for place, content in enumerate(own):
            yield Batch(starts[rank + place * count], samples_of(content, self.axis), content)
