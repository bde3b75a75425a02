"""The batches of a data set: where they come from, what is done with one, which of them are a process's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from backpack.dataset.processes import Processes


def moved(value: Any, device: torch.device) -> Any:
    """All tensors in nested containers on this device; mappings become dictionaries."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: moved(entry, device) for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(entry, device) for entry in value))
    if isinstance(value, (list, tuple)):
        return type(value)(moved(entry, device) for entry in value)
    return value


def samples_of(batch: Any, axis: int) -> int:
    """The size of an axis of the first tensor."""
    first = batch
    while isinstance(first, (tuple, list)) and first:
        first = first[0]
    if isinstance(first, Tensor) and first.dim() > axis:
        return first.shape[axis]  # of most batches, without the time that the rest takes
    if isinstance(batch, Mapping):
        batch = dict(batch)
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Mapping):
            return samples_of(leaf, axis)
        if isinstance(leaf, Tensor) and leaf.dim() > axis:
            return leaf.shape[axis]
    raise TypeError(f"The batches of the data set hold no tensor: got {type(batch).__name__}.")


def require_two_readings(loader: Any, why: str) -> None:
    """Raise where data that ``why`` needs more than once can be read once only."""
    if isinstance(loader, Iterator):
        raise ValueError(
            f"The data can be read once only, but {why}: pass a DataLoader or a list instead of an iterator."
        )


def split(batch: Any) -> tuple[Any, Any]:
    """The inputs and the targets of a batch ``(inputs, targets)`` or a mapping with ``labels``."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise TypeError(
        f"A batch must be a pair (inputs, targets) or a mapping with 'labels'; got {type(batch).__name__}. Pass "
        f"forward=function to accumulate(), a function of the model and a batch that returns the two arguments of the "
        f"loss."
    )


def apply(model: Module, batch: Any) -> tuple[Tensor, Any]:
    """The model's output for a batch, and the targets."""
    inputs, target = split(batch)
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    elif isinstance(inputs, (tuple, list)):
        output = model(*inputs)
    else:
        output = model(inputs)
    if not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
        output = found if found is not None else next(t for t in tree_leaves(output) if isinstance(t, Tensor))
    return output, target


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
