"""The quantities of a whole data set, from those of its batches."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from backpack.compat import is_fully_sharded
from backpack.context import backpack, disable, extend
from backpack.dataset.batches import Batch, Batches, apply, moved, samples_of, split
from backpack.dataset.checkpoint import Checkpoint, Randomness, identity
from backpack.dataset.collection import GRAD, Collection, part_of
from backpack.dataset.processes import Processes
from backpack.dataset.stores import FileRows, Rows, Sums
from backpack.engine import HERE, SHARDED, trainable
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.merging import Joined, Summed
from backpack.hooks import EXTENDED
from backpack.losses.denominators import denominator as of_loss


@dataclass(eq=False)
class Accumulated:
    """Results for a data set; those of an extension are on the parameters as well.

    ``loss`` and ``grad`` (by parameter name) are those of the whole data set, ``results`` has for each ``savefield`` a
    dictionary by parameter name, ``samples`` counts the samples. ``places``, where results of single samples
    stay on their process: which of the (selected) samples they are of, by ``savefield``.
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
    scaler: Any = None,
    stream: str | os.PathLike[str] | None = None,
    offload: str | torch.device | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 60.0,
    gather: bool = False,
    group: Any = None,
    progress: bool | None = None,
) -> Accumulated:
    """Compute extensions for a whole data set: what one batch of all its samples would give.

    Sums and diagonals enter with the weight that their batch has in the loss of the whole (under ``mean`` too, with
    class weights, ignored targets and a smaller last batch), variances are merged by the formula of Chan, Golub &
    LeVeque (1979), results of single samples are joined in the order of the data. ``subsampling`` of an extension
    counts the samples of the data set. Of Kronecker factors, those from inputs are averaged over samples, those from
    cotangents summed. What is random (``*MC``) is drawn batch by batch. ``p.grad`` is not touched.

    Under ``torch.distributed``, each process passes the same data and takes its share of the batches in turn; results
    are those of all, except that results of single samples stay on their process unless ``gather``.

    Args:
        model: Extended, if it is not yet. ``DistributedDataParallel`` may be around it.
        lossfunc: Reduced by ``mean`` or ``sum`` (its attribute ``reduction`` says so).
        dataloader: Gives batches ``(inputs, targets)``, inputs being a tensor, a sequence or a mapping of arguments,
            or mappings with ``labels``.
        extensions: What to compute.
        forward: Returns the loss's two arguments for the model and a batch, for other forms of both.
        denominator: What the mean of a loss without a rule divides by, for a batch.
        scaler: ``torch.amp.GradScaler``, for ``float16``: the loss is scaled, results are not.
        stream: Folder for results of single samples: files ``savefield.parameter.npy``, read as memory maps.
        offload: Device that results are moved to as they come.
        checkpoint: File that the run is saved to, to be continued by the same call after it was killed; each process
            has its own. It stays when all is done.
        checkpoint_seconds: Time between two savings.
        gather: Bring results of single samples of all processes to all.
        group: Process group (default: all processes).
        progress: Whether to show a bar (default: on a terminal, if ``tqdm`` is installed).

    Raises:
        OverflowError: A scaled gradient is not finite.
        ValueError: An extension has no meaning for a data set, how the loss's mean is formed is not known, or the
            checkpoint is of another run.
        OSError: The checkpoint or the files for results cannot be written.
    """
    run = Run(model, lossfunc, dataloader, extensions, forward, denominator, scaler, stream, offload, group)
    if checkpoint is not None:
        run.save_to(Path(checkpoint), checkpoint_seconds)
    with torch.enable_grad():
        run.all_batches(progress)
    return run.results(gather)


class Run:
    """One call of ``accumulate``."""

    def __init__(
        self,
        model: Module,
        lossfunc: Module,
        dataloader: Iterable[Any],
        extensions: tuple[BackpropExtension, ...],
        forward: Callable[[Module, Any], tuple[Tensor, Any]] | None,
        denominator: Callable[[Any], float] | None,
        scaler: Any,
        stream: str | os.PathLike[str] | None,
        offload: str | torch.device | None,
        group: Any,
    ) -> None:
        backpack(*extensions)  # refuses what is no extension
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        self.model, self.lossfunc = extend(model), extend(lossfunc)
        self.sharded = [module for module in model.modules() if is_fully_sharded(module)]
        for module in self.sharded:
            module.reshard()  # type: ignore[operator]
        self.extensions = extensions
        self.forward, self.denominator, self.scaler = forward, denominator, scaler
        self.processes = Processes(group)
        self.batches = Batches(dataloader, EXTENDED[model].batch_axis, self.processes)
        self.collection = Collection(model, extensions, None if offload is None else torch.device(offload))
        self.device = next(iter(self.collection.parameters.values())).device
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.divided, self.seen, self.done = 0.0, 0, 0
        self.checkpoint: Checkpoint | None = None
        self.goes_on = False
        self.random = Randomness(dataloader)
        self.reference = 1.0
        self.folder = None if stream is None else Path(stream)
        self.chosen: dict[str, Tensor] = {}

    # -----------------------------------------------------------------------------------------------------------
    # Before the first batch

    def save_to(self, path: Path, seconds: float) -> None:
        """Go on from a file, if it is there, and save to it from now on."""
        if self.sharded:
            raise ValueError(
                "checkpoint= is not for models with fully_shard(): their processes could not go on in step."
            )
        processes = self.processes
        if processes.count > 1:
            path = path.with_name(f"{path.name}.{processes.rank}-of-{processes.count}")
        own = identity(
            self.model,
            self.lossfunc,
            self.extensions,
            number_of_batches=self.batches.count(),
            number_of_samples=self.batches.samples(),
            number_of_processes=processes.count,
            folder_for_results=self.folder,
        )
        self.checkpoint = Checkpoint(path, seconds, own)
        self.began = self.random.read()
        found = self.checkpoint.load()
        if found is None:
            self._save()  # what cannot be written is an error now
            return
        tensors, header = found
        self.goes_on = True
        collection = self.collection
        self.done, self.seen, self.divided = header["done"], header["seen"], header["divided"]
        collection.selected = header["selected"]
        self.loss = tensors["loss"].to(self.device)
        self.began = self._randomness(tensors, "began"), header["began"]
        self.now = self._randomness(tensors, "now"), header["now"]
        device = collection.device or self.device
        for name, savefield, count in header["sums"]:
            state = [tensors[f"sums {name} {savefield} {k}"].to(device) for k in range(count)]
            collection.sums[name, savefield] = Sums(collection.merging(savefield), state)
        for name, savefield in header["rows"]:
            chunk, places = tensors[f"rows {name} {savefield}"].to(device), tensors[f"places {name} {savefield}"]
            collection.rows[name, savefield] = Rows([chunk], [places])

    @staticmethod
    def _randomness(tensors: dict[str, Tensor], when: str) -> dict[str, Tensor]:
        return {name.removeprefix(when + " "): value for name, value in tensors.items() if name.startswith(when)}

    def _save(self) -> None:
        assert self.checkpoint is not None
        now, text = self.random.read()
        tensors = {"loss": self.loss}
        tensors |= {f"began {name}": value for name, value in self.began[0].items()}
        tensors |= {f"now {name}": value for name, value in now.items()}
        rows = []
        for (name, savefield), sums in self.collection.sums.items():
            tensors |= {f"sums {name} {savefield} {k}": part for k, part in enumerate(sums.state)}
        for (name, savefield), store in self.collection.rows.items():
            if isinstance(store, FileRows):
                store.flush()
            else:
                tensors[f"rows {name} {savefield}"], tensors[f"places {name} {savefield}"] = store.pack()
                rows.append((name, savefield))
        header = {
            "done": self.done,
            "seen": self.seen,
            "divided": self.divided,
            "selected": self.collection.selected,
            "began": self.began[1],
            "now": text,
            "sums": [(*key, len(sums.state)) for key, sums in self.collection.sums.items()],
            "rows": rows,
        }
        self.checkpoint.save(tensors, header)

    def _survey(self) -> None:
        """What must be known of the whole before the first batch: its size, and what its loss divides by."""
        fixed = self.folder is not None or any(extension.fixes_scale for extension in self.extensions)
        chosen = any(extension.get_subsampling() is not None for extension in self.extensions)
        total = self.batches.samples()
        if fixed or (chosen and total is None):
            if isinstance(self.batches.loader, Iterator):
                raise ValueError(
                    "The data can be read once only, but stream=, subsampling and ClippedGrad need to know their size "
                    "beforehand: pass a DataLoader or a list instead of an iterator."
                )
            divided, total, before = 0.0, 0, self.random.read()
            for batch in self.batches.read():
                total += batch.samples
                divided += self._divided(batch.content) if fixed else 0.0
            self.random.write(*before)  # the data come in the same order again
            sums = self.processes.all_sum(torch.tensor([divided, total], dtype=torch.float64)).tolist()
            total = int(sums[1])
            if fixed and not self._summed:
                self.reference = sums[0]
        for extension in self.extensions:
            if extension.get_subsampling() is not None:
                assert total is not None
                rows = extension.subset.rows(total, torch.device("cpu"))
                assert rows is not None
                self.chosen[extension.savefield] = rows
        if self.folder is not None:
            self._prepare(self.folder, total or 0)

    @property
    def _summed(self) -> bool:
        return getattr(self.lossfunc, "reduction", None) == "sum"

    def _divided(self, content: Any) -> float:
        """What the loss of a batch divides by, without its output where that can be."""
        if self.denominator is not None:
            return float(self.denominator(content))
        if self.forward is None:
            return of_loss(self.lossfunc, None, split(content)[1])
        if self.sharded:
            raise ValueError("With forward= and fully_shard(), pass denominator= as well: it must be known beforehand.")
        with torch.no_grad(), disable():
            output, target = self.forward(self.model, moved(content, self.device))
        return of_loss(self.lossfunc, output, target)

    def _prepare(self, folder: Path, total: int) -> None:
        if self.processes.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
        self.processes.all_objects(None)  # all wait until it is there
        for extension in self.extensions:
            if isinstance(extension.on_batch(None, 1.0).batches, Joined):
                rows = self.chosen.get(extension.savefield)
                for name in self.collection.parameters:
                    path = folder / f"{extension.savefield}.{name}.npy"
                    if self.done == 0 and self.processes.rank == 0:
                        path.unlink(missing_ok=True)
                    store = FileRows(path, total if rows is None else len(rows))
                    self.collection.rows[name, extension.savefield] = store
        self.processes.all_objects(None)

    # -----------------------------------------------------------------------------------------------------------
    # Batch by batch

    def all_batches(self, progress: bool | None) -> None:
        """Compute, from the batch on at which an earlier run ended."""
        self.collection.clear()
        if self.goes_on:
            self.random.write(*self.began)
        self._survey()
        batches = self.batches.read()
        deque(islice(batches, self.done), maxlen=0)
        if self.goes_on:
            self.random.write(*self.now)
        with _bar(progress if self.processes.rank == 0 else False, self.batches.rounds(), self.done) as advance:
            for batch in self._in_step(batches) if self.sharded else batches:
                self._step(batch)
                self.done += 1
                if self.checkpoint is not None and self.checkpoint.due:
                    self._save()
                advance()
        if self.checkpoint is not None:
            self._save()

    def _in_step(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """As many batches as any process has, for parameters are gathered together; further ones do not count."""
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

    def _step(self, batch: Batch) -> None:
        content = moved(batch.content, self.device)
        counted: list[int] = []

        def count(module: Module, args: Any, kwargs: Any) -> None:
            counted.append(samples_of((args, kwargs), EXTENDED[module].batch_axis))

        with self.model.register_forward_pre_hook(count, with_kwargs=True):
            output, target = (self.forward or apply)(self.model, content)
        if counted[:1] != [batch.samples]:
            raise ValueError(
                f"The first tensor of a batch has {batch.samples} samples, but the model was called with "
                f"{counted[:1]}: let the model's first tensor come first in the batch."
            )
        divided = float(self.denominator(content)) if self.denominator else of_loss(self.lossfunc, output, target)
        factor = (divided or 1.0) / self.reference
        with self._finite(divided):
            loss = self.lossfunc(output, target)
            if loss.dim():
                raise ValueError(f"The loss must be reduced to a number; it has shape {list(loss.shape)}.")
            self._differentiate(loss, factor, batch)
        if batch.counts:
            self.loss += loss.detach().double() * factor
            self.divided += divided
            self.seen += batch.samples

    @contextmanager
    def _finite(self, divided: float) -> Iterator[None]:
        """Where no entry of a batch counts, its mean is not defined; its sum is zero."""
        if divided:
            yield
            return
        lossfunc: Any = self.lossfunc
        reduction, lossfunc.reduction = lossfunc.reduction, "sum"
        try:
            yield
        finally:
            lossfunc.reduction = reduction

    def _differentiate(self, loss: Tensor, factor: float, batch: Batch) -> None:
        collection = self.collection
        scale = 1.0
        if self.scaler is not None:
            loss, scale = self.scaler.scale(loss), self.scaler.get_scale()
        parts = [
            part_of(extension, self.chosen.get(extension.savefield), batch.start, batch.samples, factor, scale)
            for extension in self.extensions
        ]
        for part in parts:
            if not batch.counts:
                part.places = None
            if part.places is not None:
                collection.selected[part.extension.savefield] += len(part.places)
        if not self.sharded:  # else all processes pull back the same columns
            parts = [part for part in parts if part.places is not None]
        block = backpack(
            *(part.extension for part in parts), extension_hook=lambda module: collection.take(trainable(module), parts)
        )
        with torch.autocast(self.device.type, enabled=False), block:
            HERE.blocks[-1].loss_factor = scale
            grads = self._gradients(loss)
        if self.scaler is not None and not all(bool(grad.isfinite().all()) for _, grad in grads):
            raise OverflowError(
                f"A gradient, scaled by {scale:g}, is not finite: give the scaler a smaller init_scale."
            )
        collection.take(collection.parameters.values(), parts)
        for name, grad in grads if batch.counts else ():
            collection.keep(name, GRAD, Summed(1), grad.to_dense(), factor / scale)

    def _gradients(self, loss: Tensor) -> list[tuple[str, Tensor]]:
        """Those of one batch, without a trace on the parameters."""
        parameters = self.collection.parameters
        if not self.sharded:
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            return [(name, grad) for name, grad in zip(parameters, grads, strict=True) if grad is not None]
        # The backward pass of a sharded model has its effects when gradients are accumulated.
        found: dict[str, Tensor] = {}
        before = {name: parameter.grad for name, parameter in parameters.items()}
        handles = []
        for whole in SHARDED:
            name = self.collection.name_of(whole)
            if name is not None:
                handles.append(whole.register_hook(lambda grad, name=name: found.__setitem__(name, grad.clone())))
        try:
            for parameter in parameters.values():
                parameter.grad = None
            loss.backward()
            for name, parameter in parameters.items():
                if name not in found and parameter.grad is not None:
                    found[name] = parameter.grad
        finally:
            for handle in handles:
                handle.remove()
            for name, parameter in parameters.items():
                parameter.grad = before[name]
        return list(found.items())

    # -----------------------------------------------------------------------------------------------------------
    # After the last batch

    def results(self, gather: bool) -> Accumulated:
        """Merge what the processes have, and give it to the parameters."""
        processes, selected = self.processes, self.collection.selected
        counts = processes.all_sum(
            torch.tensor([self.divided, self.seen, *selected.values()], dtype=torch.float64)
        ).tolist()
        if counts[1] == 0:
            raise ValueError("The data set is empty.")
        factor = 1.0 if self._summed else self.reference / counts[0]
        if self.reference != 1 and abs(factor - 1) > 1e-9:
            raise RuntimeError(
                f"What the loss of the data set divides by was {self.reference} when it was read first, and "
                f"{counts[0]} at the second time: let all passes over the data give the same targets, of the shape of "
                f"the outputs."
            )
        everything = dict(zip(selected, map(int, counts[2:]), strict=True))
        found, places = self.collection.finish(processes, factor, everything, gather)
        return Accumulated(processes.all_sum(self.loss) * factor, int(counts[1]), found.pop(GRAD), found, places)


@contextmanager
def _bar(wanted: bool | None, total: int | None, done: int) -> Iterator[Callable[[], object]]:
    """A progress bar, on a terminal unless ``wanted`` says otherwise; yields what advances it."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    disabled = None if wanted is None else not wanted
    with tqdm(total=total, initial=done, unit="batch", disable=disabled, leave=False) as bar:
        yield bar.update
