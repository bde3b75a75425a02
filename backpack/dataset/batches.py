"""The batches of a data set: how many there are, and which of them a process reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate as running_sums
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from backpack.dataset.batch_contents import samples_of
from backpack.dataset.processes import Processes
from backpack.samples import SampleIds


def require_two_readings(loader: Any, why: str) -> None:
    """Raise if data that must be read twice can be read once only; ``why``: the reason for the message."""
    if isinstance(loader, Iterator):
        raise ValueError(
            f"The data can be read once only, but {why}: pass a DataLoader or a list instead of an iterator."
        )


@dataclass(eq=False)
class Batch:
    """One batch of a data set.

    ``numbers``: those of its samples in the data set, in ascending order; ``rows``: the size of its first tensor, if
    its rows are the samples; otherwise ``ids``, for each leading entry of the output its sample, and the number of
    samples; ``counts``: whether its results are added to those of the other batches.
    """

    numbers: Tensor
    rows: int | None
    content: Any
    ids: tuple[Tensor, int] | None = None
    counts: bool = True

    @property
    def samples(self) -> int:
        """How many samples it has."""
        return len(self.numbers)


@dataclass(eq=False)
class Batches:
    """The batches of a data set, of which ``count`` processes take every ``count``-th.

    ``sample_ids``: a user's function of a batch; ``order``: the samples' numbers in the data set, as they were drawn
    last, if a sampler draws them in an order of its own; ``total``: one more than the largest number of a sample in the
    batches read so far; ``absent``: numbers of samples that have no entry in any batch, known after the first reading.
    In later readings, these samples are in the first batch, so that their results are zeros.

    Raises:
        ValueError: The data set is already divided between processes.
    """

    loader: Iterable[Any]
    axis: int
    processes: Processes
    sample_ids: Callable[[Any], Any] | None = None
    total: int = 0
    absent: tuple[int, ...] = ()
    order: list[int] | None = None

    def __post_init__(self) -> None:
        if self.processes.count > 1 and isinstance(getattr(self.loader, "sampler", None), DistributedSampler):
            raise ValueError(
                "accumulate() divides the data between processes itself: pass the DataLoader without its "
                "DistributedSampler, which repeats samples to make the shares equal."
            )

    @property
    def _has_sampler(self) -> bool:
        """Whether a sampler chooses the samples of each batch, so that other batches need not be read."""
        loader = self.loader
        return self.sample_ids is None and (
            isinstance(loader, DataLoader)
            and loader.batch_sampler is not None
            and not isinstance(loader.dataset, IterableDataset)
        )

    @property
    def draws_an_order(self) -> bool:
        """Whether a sampler gives the samples in an order of its own, perhaps some of them several times or never."""
        loader: Any = self.loader
        sequential = type(getattr(loader, "batch_sampler", None)) is BatchSampler and (
            type(loader.batch_sampler.sampler) is SequentialSampler
        )
        return self._has_sampler and type(loader) is DataLoader and not sequential

    def count(self) -> int | None:
        """The number of batches of the data set; ``None`` if it is unknown."""
        return len(self.loader) if hasattr(self.loader, "__len__") else None  # type: ignore[arg-type]

    def samples(self) -> int | None:
        """The number of samples of the data set; ``None`` if it must be read for this."""
        if not self._has_sampler or self.loader.batch_size is None:  # type: ignore[attr-defined]
            return None
        n = len(self.loader.sampler)  # type: ignore[attr-defined]
        return n - n % self.loader.batch_size if self.loader.drop_last else n  # type: ignore[attr-defined]

    def rounds(self) -> int | None:
        """The largest number of batches that a process has; ``None`` if it is unknown."""
        count = self.count()
        return None if count is None else -(-count // self.processes.count)

    def read(self) -> Iterator[Batch]:
        """The batches of this process."""
        if self.processes.count > 1 and self._has_sampler:
            yield from self._own()
            return
        for number, batch in enumerate(self.read_all()):
            if number % self.processes.count == self.processes.rank:
                yield batch

    def read_all(self) -> Iterator[Batch]:
        """The batches of all processes."""
        self.total = 0
        seen: set[int] = set()
        further = self.absent
        loader = self.loader
        if self.draws_an_order:
            self.order = []
            loader = self._with_sampler(_Noted(self.loader.batch_sampler, self.order))  # type: ignore[attr-defined]
        for content in loader:
            if self.sample_ids is None:
                batch = self._of_rows(content, self.total)
            else:
                batch = self._of_ids(self.sample_ids(content), content, further)
                further = ()
                numbers = batch.numbers.tolist()
                if not seen.isdisjoint(numbers):
                    raise ValueError(
                        f"Sample {min(seen.intersection(numbers))} is in several batches. Put all that belongs to one "
                        f"sample into one batch; or, if samples are numbered in each batch anew, let sample_ids return "
                        f"(ids, count)."
                    )
                seen.update(numbers)
            self.total = max(self.total, int(batch.numbers.max()) + 1) if batch.samples else self.total
            yield batch
        if self.sample_ids is not None and not self.absent:
            self.absent = tuple(sorted(set(range(self.total)) - seen))

    def _of_rows(self, content: Any, start: int) -> Batch:
        """A batch whose rows are the samples with the numbers from ``start`` on."""
        rows = samples_of(content, self.axis)
        return Batch(torch.arange(start, start + rows), rows, content)

    def _of_ids(self, given: Any, content: Any, further: tuple[int, ...]) -> Batch:
        """A batch with numbers of the data set, and ``further`` samples without entries; or with its own numbers."""
        known = SampleIds(given)
        ids = known.numbers
        if isinstance(given, tuple):
            numbers = torch.arange(self.total, self.total + known.count)
        else:
            numbers = torch.cat([ids[ids >= 0], ids.new_tensor(further)]).unique()
            ids = torch.where(ids >= 0, torch.searchsorted(numbers, ids.clamp(min=0)), ids)
        return Batch(numbers, None, content, (ids, len(numbers)))

    def _own(self) -> Iterator[Batch]:
        """As ``read``, without reading the samples of other processes; the first process draws the order for all."""
        loader: Any = self.loader
        order = self.processes.same(lambda: [list(indices) for indices in loader.batch_sampler])
        if self.draws_an_order:
            self.order = [index for indices in order for index in indices]
        rank, count = self.processes.rank, self.processes.count
        starts = running_sums(map(len, order), initial=0)
        for content, start in zip(
            self._with_sampler(order[rank::count]), islice(starts, rank, None, count), strict=False
        ):
            yield self._of_rows(content, start)

    def _with_sampler(self, batch_sampler: Any) -> DataLoader[Any]:
        """The same loader with other batches."""
        loader: Any = self.loader
        return DataLoader(
            loader.dataset,
            batch_sampler=batch_sampler,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
        )


class _Noted:
    """A batch sampler that notes what it yields."""

    def __init__(self, inner: Iterable[Iterable[int]], order: list[int]) -> None:
        self.inner, self.order = inner, order

    def __iter__(self) -> Iterator[list[int]]:
        for indices in self.inner:
            batch = list(indices)
            self.order += batch
            yield batch
