"""Memory and files that keep the results of single samples until all have come."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Rows:
    """Results of single samples in memory.

    ``chunks`` are those of one batch each; ``places``: of which samples; ``weights``: what to multiply them by.
    """

    chunks: list[Tensor] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, rows: Tensor, places: Tensor, weight: float, device: torch.device | None) -> None:
        """Keep the rows of one batch; if they come twice since its pass began anew, the last ones."""
        if self.places and self.places[-1] is places:
            self.chunks.pop(), self.places.pop(), self.weights.pop()
        if self.chunks and self.chunks[0].shape[1:] != rows.shape[1:]:
            raise ValueError(
                f"Results of samples have shape {list(self.chunks[0].shape[1:])} in one batch and "
                f"{list(rows.shape[1:])} in another, so that they do not join: a root has as many columns as the "
                f"sample with most positions needs. Give the samples of all batches the same number of positions, or "
                f"use BatchDiagGGNExact."
            )
        self.chunks.append(rows if device is None else rows.to(device))
        self.places.append(places)
        self.weights.append(weight)

    def pack(self) -> tuple[Tensor, Tensor]:
        """Join the chunks, multiplied by their weights, and their places."""
        if len(self.chunks) > 1:
            joined, start = torch.cat(self.chunks), 0
            for weight, own in groupby(zip(self.weights, self.chunks, strict=True), itemgetter(0)):
                stop = start + sum(len(chunk) for _, chunk in own)
                if weight != 1:
                    joined[start:stop].mul_(weight)
                start = stop
            self.chunks, self.places, self.weights = [joined], [torch.cat(self.places)], [1.0]
        elif self.weights[0] != 1:
            self.chunks, self.weights = [self.chunks[0] * self.weights[0]], [1.0]
        return self.chunks[0], self.places[0]

    def finish(self, order: Tensor) -> Tensor:
        """The results of the samples with the places ``order``; zeros for those that have none."""
        rows, places = self.pack()
        self.chunks.clear()
        if torch.equal(places, order):
            return rows
        where = torch.full((int(order.max()) + 1,), -1)
        where[order] = torch.arange(len(order))
        result = rows.new_zeros(len(order), *rows.shape[1:])
        result[where[places].to(rows.device)] = rows
        return result


@dataclass(eq=False)
class FileRows:
    """Results of single samples in a file of NumPy's format, which are written at their places as they come."""

    path: Path
    count: int
    file: Any = None

    def add(self, rows: Tensor, places: Tensor, weight: float, device: torch.device | None) -> None:
        """Write the rows of one batch."""
        import numpy

        rows = rows.to("cpu", torch.float32 if rows.dtype == torch.bfloat16 else rows.dtype)
        values = (rows if weight == 1 else rows * weight).numpy()
        if self.file is None:
            self.file = self._open(numpy, values)
        self.file[places.numpy()] = values

    def _open(self, numpy: Any, values: Any) -> Any:
        """Open the file; several processes may do so at a time, as all write the same header, and none shortens it."""
        shape = (self.count, *values.shape[1:])
        header = {"descr": numpy.lib.format.dtype_to_descr(values.dtype), "fortran_order": False, "shape": shape}
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            numpy.lib.format.write_array_header_1_0(file, header)
            start = file.tell()
            size = max(1, values[:1].nbytes * self.count)
            try:
                os.posix_fallocate(file.fileno(), 0, start + size)  # a full disk is an error now, not a crash later
            except OSError as error:
                raise OSError(
                    error.errno, f"There is no room for the {size:,} bytes of {self.path}: {error.strerror}"
                ) from error
        return numpy.memmap(self.path, values.dtype, "r+", start, shape)

    def flush(self) -> None:
        """Write what is still in memory to the file."""
        if self.file is not None:
            self.file.flush()

    def finish(self) -> Tensor:
        """The file, as a tensor."""
        import numpy

        return torch.from_numpy(numpy.load(self.path, mmap_mode="r+"))
