"""What must be known about a whole data set before its first batch is computed."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor

from backpack.dataset.batch_pass import BatchPass
from backpack.dataset.batches import Batches, require_two_readings
from backpack.dataset.collection import MODEL, Collection
from backpack.dataset.processes import Processes
from backpack.dataset.randomness import Randomness
from backpack.dataset.sample_rows import FileRows
from backpack.extensions.backprop_extension import BackpropExtension


def survey(
    batches: Batches, one: BatchPass, extensions: tuple[BackpropExtension, ...], fixed: bool, random: Randomness
) -> tuple[int | None, float]:
    """The number of samples (``None``: unknown), and what the loss of the data set divides its sum by.

    The data are read once if the latter must be ``fixed`` before the first batch, or if samples are selected and their
    number is unknown. If it is not fixed, it is given as 1.

    Raises:
        ValueError: The data must be read for this, and can be read once only.
    """
    total, reference = batches.samples(), 1.0
    chosen = any(extension.get_subsampling() is not None for extension in extensions)
    if not fixed and not (chosen and total is None):
        return total, reference
    require_two_readings(batches.loader, "stream=, subsampling and ClippedGrad need to know their size beforehand")
    divided, total, before = 0.0, 0, random.read()
    for batch in batches.read():
        total += batch.samples
        divided += one.divided(batch.content) if fixed else 0.0
    random.write(before)  # so that the data come in the same order again
    sums = batches.processes.all_sum(torch.tensor([divided, total], dtype=torch.float64)).tolist()
    if fixed and not one.is_sum:
        reference = sums[0]
    return int(sums[1]) if batches.sample_ids is None else batches.total, reference


def chosen_samples(extensions: tuple[BackpropExtension, ...], total: int | None) -> dict[str, Tensor]:
    """The numbers of the samples that extensions select, by ``savefield``, for those that do not select all."""
    cpu = torch.device("cpu")
    rows = {e.savefield: e.subset.rows(total or 0, cpu) for e in extensions if e.get_subsampling() is not None}
    return {savefield: chosen for savefield, chosen in rows.items() if chosen is not None}


def numbers_selected(
    extensions: tuple[BackpropExtension, ...], total: int, chosen: dict[str, Tensor]
) -> dict[str, int]:
    """How many of all samples each extension selects, by ``savefield``."""
    return {e.savefield: len(chosen.get(e.savefield, range(total))) for e in extensions}


def writable(folder: Path, argument: str) -> Path:
    """Create a folder for results if it does not exist.

    Raises:
        OSError: It cannot be created, or no file in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, f"{argument}={str(folder)!r} is no folder to write results to: {error}") from error
    return folder


def write_index(folder: Path, savefield: str, numbers: Tensor) -> None:
    """Say beside the results of single samples which samples of the data set their rows belong to."""
    import numpy

    numpy.save(folder / f"samples.{savefield}.npy", numbers.numpy())


def open_files(
    folder: Path, collection: Collection, total: int, chosen: dict[str, Tensor], processes: Processes, anew: bool
) -> None:
    """Send results of single samples to files in a folder, and delete those of another run first if ``anew``."""
    shared = {extension.savefield for extension in collection.extensions if extension.is_of_model}
    for savefield in collection.joined:
        for name in (MODEL,) if savefield in shared else collection.parameters:
            path = folder / (f"{savefield}.{name}.npy" if name else f"{savefield}.npy")
            if anew and processes.rank == 0:
                path.unlink(missing_ok=True)
            count = len(chosen[savefield]) if savefield in chosen else total
            collection.rows[name, savefield] = FileRows(path, count)
    processes.all_objects(None)
