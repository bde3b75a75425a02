"""Individual gradients that are made for a few samples at a time, where all together would take too much memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from backpack.memory import at_a_time
from backpack.samples import Rows
from backpack.uses.base import Individual, accumulate
from backpack.uses.complex_numbers import conjugated
from backpack.uses.dense_factors import DenseMap
from backpack.uses.dense_gradients import Dense
from backpack.uses.elementwise import Explicit
from backpack.uses.linear_map import LinearMap
from backpack.uses.use import Cotangents, Use


@dataclass(eq=False)
class InChunks(Individual):
    """Individual gradients of the samples from ``start`` to ``stop``, which ``make`` gives for any range of them.

    ``step``: how many are made at a time.
    """

    make: Callable[[int, int], Individual]
    shape: torch.Size
    seeds: int
    start: int
    stop: int
    step: int
    device: torch.device = torch.device("cpu")
    is_complex: bool = False

    @property
    def size(self) -> tuple[int, int]:
        return self.seeds, self.stop - self.start

    def _narrow(self, start: int, stop: int) -> Individual:
        first, last = self.start + start, self.start + stop
        part = replace(self, start=first, stop=last)
        return part if last - first > self.step else part.whole

    @cached_property
    def whole(self) -> Individual:
        """The same, of all samples together."""
        found = self.make(self.start, self.stop)
        return found if self.weights is None else found.weighted(self.weights)

    def parts(self) -> Iterator[Individual]:
        """Those of a few samples at a time."""
        samples = self.stop - self.start
        for start in range(0, samples, self.step):
            yield self.narrow(start, min(start + self.step, samples))

    def prepare(self, names: Any) -> None:
        missing = [name for name in dict.fromkeys(names) if name not in self._known]
        collected: dict[str, list[Tensor]] = {name: [] for name in missing}
        for part in self.parts() if missing else ():
            part.prepare(missing)
            for name in missing:
                value = getattr(part, name)()
                if name in ("total", "sum_squares"):
                    accumulate(collected[name], value)
                else:
                    collected[name].append(value)
        for name, values in collected.items():
            axis = int(name in ("dense", "norms"))
            self._known[name] = values[0] if len(values) == 1 else torch.cat(values, axis)

    def _dense(self) -> Tensor:
        return torch.cat([part.dense() for part in self.parts()], 1)

    def scaled(self, factor: Tensor) -> Individual:
        def make(start: int, stop: int) -> Individual:
            return self.make(start, stop).scaled(factor[start - self.start : stop - self.start])

        return replace(self, make=make)

    def projected(self, rows: Tensor | None, columns: Tensor | None, sizes: tuple[int, int]) -> Tensor:
        return torch.cat([part.projected(rows, columns, sizes) for part in self.parts()], 1)

    def dots(self, other: Individual) -> Tensor:
        if isinstance(other, Explicit):
            return torch.cat([part.dots(other) for part in self.parts()], 1)
        return super().dots(other)

    def maps(self) -> Sequence[LinearMap]:
        return self.whole.maps()


@dataclass(eq=False)
class RowsInChunks(InChunks):
    """Those of the matrix of a linear map. ``inputs`` has the map's inputs of all samples, without their cotangents."""

    inputs: Dense | None = None

    def maps(self) -> Sequence[LinearMap]:
        return [MapInChunks(self)]


@dataclass(eq=False)
class MapInChunks(LinearMap):
    """A linear map with the gradients of its matrix, of which the cotangents are made for a few samples at a time."""

    grads: RowsInChunks

    def __post_init__(self) -> None:
        start, stop, inputs = self.grads.start, self.grads.stop, self.grads.inputs
        assert inputs is not None
        part = inputs.narrow(start, stop)
        part.filled = None if inputs.filled is None else inputs.filled[start:stop]
        self.inputs = DenseMap(part)

    @property
    def matrix(self) -> tuple[int, int]:  # type: ignore[override]
        return self.grads.shape[0], self.grads.shape[1:].numel()

    @property
    def ranks(self) -> tuple[int, int]:  # type: ignore[override]
        rows = self.inputs.ranks[1]
        return self.grads.seeds * rows, rows

    def output_factor(self, approx: str | None) -> Tensor:
        terms: list[Tensor] = []
        for part in self.grads.parts():
            (own,) = part.maps()
            accumulate(terms, own.output_factor(approx))
        return terms[0]

    def input_factor(self, approx: str | None, scale: float = 1.0) -> Tensor:
        return self.inputs.input_factor(approx, scale)

    def rotated(self, rows: Tensor, columns: Tensor) -> InChunks:
        def make(start: int, stop: int) -> Individual:
            (own,) = self.grads.make(start, stop).maps()
            return own.rotated(rows, columns)

        own = self.grads
        shape = torch.Size((rows.shape[1], columns.shape[1]))
        return InChunks(make, shape, own.seeds, own.start, own.stop, own.step, own.device, own.is_complex)


@dataclass(eq=False)
class RowsUse(Use):
    """A linear map of rows whose outputs are not kept: their cotangents are computed again, for some rows at a time.

    ``inputs``: what the cotangents are computed from, first the map's input; the samples lie in all of them as in the
    rows of the input. ``grad`` takes the cotangents ``[v, r]`` of what is computed of each row, and some of the rows of
    each input, ``[r, ...]``, to the cotangents ``[v, r, o]`` of the map's outputs, linearly. Where a sum over all rows
    is returned, each row has the cotangent of the sum. ``is_shift``: the parameter is added to the outputs.
    """

    inputs: tuple[Tensor, ...]
    grad: Callable[..., Tensor]
    is_shift: bool = False

    def arrive(self, cotangents: Cotangents, rows: Rows, shape: torch.Size, dtype: torch.dtype) -> Individual:
        outer, leading = cotangents[0], self.inputs[0].shape[:-1]
        if outer.dim() == 1:
            outer = outer.reshape(-1, *[1] * len(leading)).expand(-1, *leading)
        rest = outer.shape[1 + len(leading) :]
        outer = rows.take(outer, leading=1)
        given = [rows.take(tensor).reshape(rows.count, -1, *tensor.shape[len(leading) :]) for tensor in self.inputs]
        seeds, (samples, positions) = len(outer), given[0].shape[:2]
        outer = outer.reshape(seeds, samples, positions, *rest)
        filled = rows.filled

        def make(start: int, stop: int) -> Individual:
            some = [tensor[start:stop].flatten(0, 1) for tensor in given]
            grad = self.grad(outer[:, start:stop].flatten(1, 2), *some).to(dtype)
            grad = grad.reshape(seeds, stop - start, 1, positions, -1)
            if self.is_shift:
                return Explicit(grad.sum((2, 3)).reshape(seeds, stop - start, *shape))
            x = conjugated(given[0][start:stop].to(dtype)).unsqueeze(1)
            found = Dense((x,), grad, shape)
            found.filled = None if filled is None else filled[start:stop].to(grad.device, dtype.to_real())
            return found

        outputs = shape[0] if shape else 1
        step = max(1, at_a_time("cotangents", outer.device) // max(1, seeds * positions * outputs))
        if self.is_shift:
            return InChunks(make, shape, seeds, 0, samples, step, outer.device, dtype.is_complex)
        none = torch.zeros((), dtype=dtype, device=outer.device).expand(1, samples, 1, positions, 1)
        inputs = Dense((conjugated(given[0].to(dtype)).unsqueeze(1),), none, shape)
        inputs.filled = filled if filled is None else filled.to(outer.device, dtype.to_real())
        return RowsInChunks(make, shape, seeds, 0, samples, step, outer.device, dtype.is_complex, inputs)
