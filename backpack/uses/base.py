"""Individual gradients of one parameter, as a use and a cotangent define them.

Axes: ``v`` seeds, ``n`` samples, ``s`` positions within a sample, ``o`` outputs, ``i`` inputs, ``*p`` the
parameter's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from backpack.memory import at_a_time
from backpack.uses.complex_numbers import as_real, squared

if TYPE_CHECKING:
    from backpack.uses.linear_map import LinearMap
I = TypeVar("I", bound="Individual")


class Individual(ABC):
    """Individual gradients ``[v, n, *p]`` of one parameter, held as factors. Quantities are computed from these.

    Each reduction has a generic definition through ``_dense``, in bounded chunks. A subclass gives closed forms
    where it knows a cheaper way. Results are kept, so that the next quantity reads them for free.
    """

    shape: torch.Size
    """The shape of the parameter, ``p``."""
    parameter: Tensor
    """The parameter itself; known where an extension computes its result."""
    others: Individual | None = None
    """Those of the samples that an extension names as ``against``."""
    shared: dict[Any, Tensor] | None = None
    """Results for other parameters of the same call, from the same cotangents of all samples."""
    room: Tensor | None = None
    """Contiguous memory of the shape of the individual gradients, into which they may be written."""
    filled: Tensor | None = None
    """The share of the positions that each sample fills, ``[n]``; at the rest, it is zero. ``None``: all of them."""
    weights: Tensor | None = None
    """Factors ``[v, n]`` of the squares in ``sum_squares`` and ``sample_squares``."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Number of seeds and of samples, ``(v, n)``."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where they are."""

    @property
    @abstractmethod
    def is_complex(self) -> bool:
        """Whether they are complex numbers. Reductions to squares and dot products are real in any case."""

    @property
    def is_small(self) -> bool:
        """Whether to keep the individual gradients takes little memory, beside what they are computed from."""
        return False

    @abstractmethod
    def _dense(self) -> Tensor:
        """The individual gradients themselves, ``[v, n, *p]``."""

    @abstractmethod
    def _narrow(self, start: int, stop: int) -> Individual:
        """As ``narrow``, without the weights."""

    @abstractmethod
    def scaled(self, factor: Tensor) -> Individual:
        """Sample ``n`` multiplied by ``factor[n]``."""

    def narrow(self: I, start: int, stop: int) -> I:
        """Those of the samples from ``start`` to ``stop``, with their weights."""
        part = self._narrow(start, stop)
        if self.weights is not None:
            part.weights = self.weights[:, start:stop]
        return part  # type: ignore[return-value]

    def weighted(self, weights: Tensor) -> Individual:
        """The same, with squares that are multiplied by ``weights[v, n]``, of any sign, before they are summed."""
        found = copy(self)
        vars(found).pop("_known", None)
        found.weights = weights
        return found

    def dense(self) -> Tensor:
        """The individual gradients themselves, ``[v, n, *p]``."""
        return self._read("dense")

    def total(self) -> Tensor:
        """Sum over seeds and samples, ``[*p]``."""
        return self._read("total")

    def weighted_total(self, factor: Tensor) -> Tensor:
        """Sum over seeds and samples, ``[*p]``, sample ``n`` multiplied by ``factor[n]``."""
        return self.scaled(factor).total()

    def sum_squares(self) -> Tensor:
        """Sum of squared absolute values over seeds and samples, ``[*p]``."""
        return self._read("sum_squares")

    def sample_squares(self) -> Tensor:
        """Sum of squared absolute values over seeds, ``[n, *p]``."""
        return self._read("sample_squares")

    def norms(self) -> Tensor:
        """Squared Euclidean norms, ``[v, n]``."""
        return self._read("norms")

    def prepare(self, names: Iterable[str]) -> None:
        """Compute several of the reductions above together, which costs less than one by one."""
        known = self._known
        missing = [name for name in dict.fromkeys(names) if name not in known]
        if "dense" in missing:
            known["dense"] = self._dense()
        swept: list[str] = []
        for name in sorted(missing, key=("norms", "total").__contains__):  # what a sweep for others gives for free
            if name != "dense":
                value = self.closed(name, bool(swept) or "dense" in known)
                if value is None:
                    swept.append(name)
                else:
                    known[name] = value
        if swept:
            known.update(self._sweep(swept))

    def closed(self, name: str, swept: bool = False) -> Tensor | None:
        """This reduction by a closed form; ``None`` where to form a few individual gradients at a time is as fast.

        ``swept``: the individual gradients are known already, or other reductions need them anyway.
        """
        return None

    def know(self, **results: Tensor) -> None:
        """Note the results of reductions that were computed elsewhere."""
        self._known.update(results)

    @cached_property
    def _known(self) -> dict[str, Tensor]:
        return {}

    def _read(self, name: str) -> Tensor:
        known = self._known
        if name not in known:
            self.prepare([name])
        return known[name]

    def _sweep(self, names: list[str]) -> dict[str, Tensor]:
        """Compute reductions in one pass over the individual gradients."""
        collected: dict[str, list[Tensor]] = {name: [] for name in names}
        for piece in self.chunks():
            dense = piece.dense()
            if "total" in collected:
                accumulate(collected["total"], dense.sum((0, 1)))
            squares = squared(dense) if names != ["total"] else dense
            if "norms" in collected:
                collected["norms"].append(flat(squares).sum(2))
            if piece.weights is not None:
                squares = squares * piece.weights.reshape(*piece.weights.shape, *[1] * (squares.dim() - 2))
            if "sum_squares" in collected:
                accumulate(collected["sum_squares"], squares.sum((0, 1)))
            if "sample_squares" in collected:
                collected["sample_squares"].append(squares.sum(0))
        return {
            name: torch.cat(parts, int(name == "norms")) if len(parts) > 1 else parts[0]
            for name, parts in collected.items()
        }

    def chunks(self) -> Iterator[Individual]:
        """Pieces of a few samples each, whose individual gradients fit into the scratch."""
        if "dense" in self._known:
            yield self
            return
        seeds, samples = self.size
        step = max(1, at_a_time("scratch", self.device) // max(1, seeds * self.shape.numel()))
        for start in range(0, samples, step):
            yield self.narrow(start, min(start + step, samples))

    def share(self, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        """The result of ``compute``, which runs once for all parameters of the call that share this key."""
        known = {} if self.shared is None else self.shared
        if key not in known:
            known[key] = compute()
        return known[key]

    def maps(self) -> Sequence[LinearMap]:
        """The linear maps that the parameter is the matrix of; empty if it is the matrix of none."""
        return []

    def dots(self, other: Individual) -> Tensor:
        """Dot products with other individual gradients of the same parameter, ``[v, n, w, m]``.

        Complex numbers count as pairs of real ones: these are the real parts of their inner products.
        """
        rows = []
        for a in self.chunks():
            left = flat(a.dense())
            columns = [torch.einsum("vnp,wmp->vnwm", left, flat(b.dense())) for b in other.chunks()]
            rows.append(torch.cat(columns, 3))
        return torch.cat(rows, 1)

    def projected(self, rows: Tensor | None, columns: Tensor | None, sizes: tuple[int, int]) -> Tensor:
        """``rows^T G columns``, ``[v, n, a, b]``, with the gradients as matrices ``G`` of these ``sizes``.

        ``None`` stands for the identity. Complex numbers count as pairs of real ones, side by side along the columns.
        """
        pieces = []
        for piece in self.chunks():
            matrices = flat(piece.dense()).reshape(*piece.size, *sizes)
            matrices = matrices if columns is None else matrices @ columns
            pieces.append(matrices if rows is None else rows.T @ matrices)
        return torch.cat(pieces, 1)

    def sample_dots(self, other: Individual) -> Tensor:
        """Dot products with another's gradients of the same sample and seed, ``[v, n]``."""
        pieces: list[Tensor] = []
        for a in self.chunks():
            start = sum(p.shape[1] for p in pieces)
            b = other.narrow(start, start + a.size[1])
            pieces.append((flat(a.dense()) * flat(b.dense())).sum(2))
        return torch.cat(pieces, 1)


def flat(gradients: Tensor) -> Tensor:
    """``[v, n, *p]`` to ``[v, n, p]``, also of a parameter without axes; of complex numbers to pairs of real ones."""
    return as_real(gradients.flatten(2) if gradients.dim() > 2 else gradients.unsqueeze(2))


def sum_of(terms: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    return reduce(torch.add, terms)


def accumulate(terms: list[Tensor], term: Tensor) -> None:
    """Add to the only entry of ``terms``, in place where no gradient is tracked."""
    if not terms:
        terms.append(term)
    elif torch.is_grad_enabled():
        terms[0] = terms[0] + term
    else:
        terms[0].add_(term)
