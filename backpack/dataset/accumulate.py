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

from backpack.context import backpack, disable, extend
from backpack.dataset.batches import Batch, Batches, apply, moved, samples_of
from backpack.dataset.checkpoint import Checkpoint, Randomness, identity
from backpack.dataset.processes import Processes
from backpack.dataset.stores import FileRows, Rows, Sums
from backpack.engine import trainable
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.merging import Joined, Summed
from backpack.hooks import EXTENDED
from backpack.losses.denominators import denominator as of_loss

GRAD = "grad"


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
    counts the samples of the data set. What is random (``*MC``) is drawn batch by batch. ``p.grad`` is not touched.

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
        for extension in extensions:
            if extension.on_batch(None, 1.0).batches is None:
                raise ValueError(f"{type(extension).__name__} has no meaning for a data set: its results do not merge.")
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        self.model, self.lossfunc = extend(model), extend(lossfunc)
        self.extensions = extensions
        self.forward, self.denominator, self.scaler = forward or apply, denominator, scaler
        self.processes = Processes(group)
        self.batches = Batches(dataloader, EXTENDED[model].batch_axis, self.processes)
        self.offload = None if offload is None else torch.device(offload)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names = {id(p): name for name, p in self.parameters.items()}
        if not self.parameters:
            raise ValueError("The model has no parameter that requires a gradient.")
        self.device = next(iter(self.parameters.values())).device
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.divided, self.seen, self.done = 0.0, 0, 0
        self.sums: dict[tuple[str, str], Sums] = {}
        self.rows: dict[tuple[str, str], Rows | FileRows] = {}
        self.selected: dict[str, int] = dict.fromkeys((e.savefield for e in extensions), 0)
        self.checkpoint: Checkpoint | None = None
        self.random = Randomness(dataloader)
        self.began = self.random.read()
        self.reference = 1.0
        self.folder = None if stream is None else Path(stream)
        self.chosen: dict[str, Tensor] = {}

    # -----------------------------------------------------------------------------------------------------------
    # Before the first batch

    def save_to(self, path: Path, seconds: float) -> None:
        """Go on from a file, if it is there, and save to it from now on."""
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
        found = self.checkpoint.load()
        if found is None:
            self._save()  # what cannot be written is an error now
            return
        tensors, header = found
        self.done, self.seen, self.divided = header["done"], header["seen"], header["divided"]
        self.selected = header["selected"]
        self.loss = tensors["loss"].to(self.device)
        self.began = self._randomness(tensors, "began"), header["began"]
        self.now = self._randomness(tensors, "now"), header["now"]
        for key in header["sums"]:
            merging = self._merging(key[1])
            assert not isinstance(merging, Joined)
            device = self.offload or self.device
            state = [tensors[f"sums {key[0]} {key[1]} {k}"].to(device) for k in range(key[2])]
            self.sums[key[0], key[1]] = Sums(merging, [part.cpu() if part.dim() == 0 else part for part in state])
        for name, field_ in header["rows"]:
            chunk = tensors[f"rows {name} {field_}"].to(self.offload or self.device)
            self.rows[name, field_] = Rows([chunk], [tensors[f"places {name} {field_}"]])

    @staticmethod
    def _randomness(tensors: dict[str, Tensor], when: str) -> dict[str, Tensor]:
        return {name.removeprefix(when + " "): value for name, value in tensors.items() if name.startswith(when)}

    def _merging(self, savefield: str) -> Any:
        if savefield == GRAD:
            return Summed(1)
        return next(e for e in self.extensions if e.savefield == savefield).on_batch(None, 1.0).batches

    def _save(self) -> None:
        assert self.checkpoint is not None
        now, text = self.random.read()
        tensors = {"loss": self.loss}
        tensors |= {f"began {name}": value for name, value in self.began[0].items()}
        tensors |= {f"now {name}": value for name, value in now.items()}
        rows = []
        for (name, savefield), sums in self.sums.items():
            tensors |= {f"sums {name} {savefield} {k}": part for k, part in enumerate(sums.state)}
        for (name, savefield), store in self.rows.items():
            if isinstance(store, FileRows):
                store.flush()
            else:
                tensors[f"rows {name} {savefield}"], tensors[f"places {name} {savefield}"] = store.pack()
                rows.append((name, savefield))
        header = {
            "done": self.done,
            "seen": self.seen,
            "divided": self.divided,
            "selected": self.selected,
            "began": self.began[1],
            "now": text,
            "sums": [(name, savefield, len(sums.state)) for (name, savefield), sums in self.sums.items()],
            "rows": rows,
        }
        self.checkpoint.save(tensors, header)

    def _survey(self) -> None:
        """What must be known of the whole before the first batch: its size, and what its loss divides by."""
        fixed = self.folder is not None or any(extension.fixes_scale for extension in self.extensions)
        chosen = any(extension.get_subsampling() is not None for extension in self.extensions)
        total = self.batches.samples()
        if fixed or (chosen and total is None):
            divided, total = 0.0, 0
            for batch in self.batches.read():
                total += batch.samples
                divided += self._divided(batch.content) if fixed else 0.0
            sums = self.processes.all_sum(torch.tensor([divided, total], dtype=torch.float64)).tolist()
            total = int(sums[1])
            if fixed and getattr(self.lossfunc, "reduction", None) != "sum":
                self.reference = sums[0]
        for extension in self.extensions:
            if extension.get_subsampling() is not None:
                assert total is not None
                rows = extension.subset.rows(total, torch.device("cpu"))
                assert rows is not None
                self.chosen[extension.savefield] = rows
        if self.folder is not None:
            self._prepare(self.folder, total or 0)

    def _divided(self, content: Any) -> float:
        """What the loss of a batch divides by, without its output where that can be."""
        if self.denominator is not None:
            return float(self.denominator(content))
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
                for name in self.parameters:
                    path = folder / f"{extension.savefield}.{name}.npy"
                    if self.done == 0 and self.processes.rank == 0:
                        path.unlink(missing_ok=True)
                    self.rows[name, extension.savefield] = FileRows(path, total if rows is None else len(rows))
        self.processes.all_objects(None)

    # -----------------------------------------------------------------------------------------------------------
    # Batch by batch

    def all_batches(self, progress: bool | None) -> None:
        """Compute, from the batch on at which an earlier run ended."""
        self._clear()
        if self.done:
            self.random.write(*self.began)
        self._survey()
        self.random.write(*self.began)  # the data come in the same order, whether surveyed or not
        batches = self.batches.read()
        deque(islice(batches, self.done), maxlen=0)
        if self.done:
            self.random.write(*self.now)
        with _bar(progress if self.processes.rank == 0 else False, self.batches.rounds(), self.done) as advance:
            for batch in batches:
                self._step(batch)
                self.done += 1
                if self.checkpoint is not None and self.checkpoint.due:
                    self._save()
                advance()
        if self.checkpoint is not None:
            self._save()

    def _clear(self) -> None:
        for parameter in self.parameters.values():
            for extension in self.extensions:
                vars(parameter).pop(extension.savefield, None)

    def _step(self, batch: Batch) -> None:
        content = moved(batch.content, self.device)
        counted: list[int] = []

        def count(module: Module, args: Any, kwargs: Any) -> None:
            counted.append(samples_of((args, kwargs), EXTENDED[module].batch_axis))

        with self.model.register_forward_pre_hook(count, with_kwargs=True):
            output, target = self.forward(self.model, content)
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
        parts: dict[str, tuple[BackpropExtension, Tensor]] = {}
        for extension in self.extensions:
            rows = None
            places = torch.arange(batch.start, batch.start + batch.samples)
            if extension.savefield in self.chosen:
                chosen = self.chosen[extension.savefield] - batch.start
                places = ((chosen >= 0) & (chosen < batch.samples)).nonzero().flatten()
                rows = chosen[places].tolist()
            if len(places):
                parts[extension.savefield] = (extension.on_batch(rows, factor), places)
                self.selected[extension.savefield] += len(places)

        def collect(parameters: Iterable[Tensor]) -> None:
            for parameter in parameters:
                for savefield, (part, places) in parts.items():
                    result = vars(parameter).pop(savefield, None)
                    if result is not None:
                        self._keep(self.names[id(parameter)], savefield, part.batches, result, factor, places)

        block = backpack(
            *(part for part, _ in parts.values()),
            extension_hook=lambda module: collect(p for p in trainable(module) if id(p) in self.names),
        )
        with torch.autocast(self.device.type, enabled=False), block:
            grads = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        collect(self.parameters.values())
        for name, grad in zip(self.parameters, grads, strict=True):
            if grad is not None:
                self._keep(name, GRAD, Summed(1), grad.to_dense(), factor, None)

    def _keep(self, name: str, savefield: str, merging: Any, result: Any, factor: float, places: Tensor | None) -> None:
        if isinstance(merging, Joined):
            assert places is not None
            store = self.rows.setdefault((name, savefield), Rows())
            store.add(merging.rows(result, factor), places, self.offload)
        else:
            sums = self.sums.setdefault((name, savefield), Sums(merging))
            sums.add(result, factor, 0 if places is None else len(places), self.offload)

    # -----------------------------------------------------------------------------------------------------------
    # After the last batch

    def results(self, gather: bool) -> Accumulated:
        """Merge what the processes have, and give it to the parameters."""
        processes = self.processes
        counts = processes.all_sum(
            torch.tensor([self.divided, self.seen, *self.selected.values()], dtype=torch.float64)
        ).tolist()
        if counts[1] == 0:
            raise ValueError("The data set is empty.")
        summed = getattr(self.lossfunc, "reduction", None) == "sum"
        factor = 1.0 if summed else self.reference / counts[0]
        selected = dict(zip(self.selected, map(int, counts[2:]), strict=True))
        found = Accumulated(processes.all_sum(self.loss) * factor, int(counts[1]))
        found.results = {extension.savefield: {} for extension in self.extensions}
        for name, savefield in sorted(set().union(*processes.all_objects([*self.sums]))):
            sums = self.sums.setdefault((name, savefield), Sums(self._merging(savefield)))
            if processes.count > 1:
                sums.reduce(processes)
            value = sums.merging.finish(sums.state, factor, selected.get(savefield, 0))
            (found.grad if savefield == GRAD else found.results[savefield])[name] = value
            del self.sums[name, savefield]
        for (_, savefield), store in self.rows.items():  # those of parameters that all batches use are complete
            if isinstance(store, Rows):
                own = torch.cat(store.places)
                if len(own) > len(found.places.get(savefield, ())):
                    found.places[savefield] = own
        whole = {e.savefield for e in self.extensions if type(e).of_whole is not BackpropExtension.of_whole}
        for name, savefield in sorted(set().union(*processes.all_objects([*self.rows]))):
            store = self.rows.pop((name, savefield), None) or Rows()
            if isinstance(store, FileRows):
                processes.all_objects(store.flush())  # type: ignore[func-returns-value]
                rows = store.finish()
            elif processes.count == 1 or gather or savefield in whole:
                if processes.count > 1:
                    store.gather(processes)
                rows = store.finish(torch.arange(selected[savefield]))
            elif store.chunks:
                rows = store.finish(found.places[savefield])
            else:
                continue
            found.results[savefield][name] = self._merging(savefield).finish(rows, factor)
        for extension in self.extensions:
            values = found.results[extension.savefield]
            for name in values:
                values[name] = extension.of_whole(values[name])
                setattr(self.parameters[name], extension.savefield, values[name])
        return found


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
