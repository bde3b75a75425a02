"""How the results of batches become that of all their samples as one batch.

The loss of the whole is the sum over batches of ``factor`` times the batch's own loss, and a result of ``degree``
``d`` is ``c^d`` times as large for ``c`` times the loss. States are lists of tensors, so that they can be stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backpack.uses.complex_numbers import squared

Reduction = Generator[list[Tensor], list[Tensor], list[Tensor]]
"""Yields tensors, is sent their sums over all processes, and returns a state."""


def wide(tensor: Tensor) -> Tensor:
    """The tensor in a data type in which many terms can be added."""
    return tensor.float() if tensor.element_size() < 4 else tensor


class Merging(ABC):
    """One way to merge; the state of a part of the data is a list of tensors."""

    is_one_sum = True
    """Whether the state of all processes is the sum of theirs."""

    @abstractmethod
    def state(self, result: Any, factor: float, samples: int) -> list[Tensor]:
        """The state of one batch. Its loss enters with ``factor``, and so many ``samples`` of it contribute."""

    @abstractmethod
    def add(self, states: list[list[Tensor]], results: list[Any], factor: float, samples: int) -> None:
        """Add a further batch to the states of some parameters, in place: few calls, each of them for all."""

    def reduce(self, state: list[Tensor]) -> Reduction:
        """The state of all processes' data, from that of one."""
        return (yield state)

    @abstractmethod
    def finish(self, state: list[Tensor], factor: float, samples: int) -> Any:
        """The result, in the memory of the state, with a last factor of the loss.

        ``samples`` counts those of parts without a result as well.
        """

    @abstractmethod
    def scale(self, result: Any, factor: float) -> Any:
        """The result for ``factor`` times the loss."""


@dataclass(frozen=True)
class BatchShare:
    """The share of one batch in a data set, as an extension selects samples.

    ``rows``: the selected samples of the batch, ``None`` for all; ``factor``: with which the batch's loss enters that
    of the data set; ``places``: those of the selected samples among all that are selected; ``samples``: how many
    samples the data set has, where that is known.
    """

    rows: list[int] | None
    factor: float
    places: Tensor
    samples: int | None = None


@dataclass(frozen=True)
class Summed(Merging):
    """A sum over samples."""

    degree: float

    def state(self, result: Tensor, factor: float, samples: int) -> list[Tensor]:
        return [wide(result.detach()) * self.weight(factor, samples)]

    def add(self, states: list[list[Tensor]], results: list[Tensor], factor: float, samples: int) -> None:
        torch._foreach_add_([total for (total,) in states], results, alpha=self.weight(factor, samples))

    def weight(self, factor: float, samples: int) -> float:
        """The factor with which a batch's result enters the sum."""
        return factor**self.degree

    def finish(self, state: list[Tensor], factor: float, samples: int) -> Tensor:
        return state[0] if factor == 1 else state[0].mul_(factor**self.degree)

    def scale(self, result: Tensor, factor: float) -> Tensor:
        return result if factor == 1 else result * factor**self.degree


@dataclass(frozen=True)
class Averaged(Summed):
    """A mean over samples, which stays the same if the loss is multiplied by a factor."""

    degree: float = 0.0

    def weight(self, factor: float, samples: int) -> float:
        return samples

    def finish(self, state: list[Tensor], factor: float, samples: int) -> Tensor:
        return state[0].div_(samples)


@dataclass(frozen=True)
class Listed(Merging):
    """A list of results, each with its own way (or of fewer results)."""

    parts: tuple[Summed, ...]

    def state(self, result: list[Tensor], factor: float, samples: int) -> list[Tensor]:
        return [part.state(own, factor, samples)[0] for part, own in zip(self.parts, result, strict=False)]

    def add(self, states: list[list[Tensor]], results: list[list[Tensor]], factor: float, samples: int) -> None:
        for place, part in enumerate(self.parts):
            own = [[state[place]] for state in states if len(state) > place]
            if own:
                part.add(own, [result[place] for result in results if len(result) > place], factor, samples)

    def finish(self, state: list[Tensor], factor: float, samples: int) -> list[Tensor]:
        return [part.finish([own], factor, samples) for part, own in zip(self.parts, state, strict=False)]

    def scale(self, result: list[Tensor], factor: float) -> list[Tensor]:
        return [part.scale(own, factor) for part, own in zip(self.parts, result, strict=False)]


@dataclass(frozen=True)
class Moments(Merging):
    """A population variance, from pairs ``(sum, sum of squares)`` (Chan, Golub & LeVeque, 1979, eq. 2.1).

    The state is the number of samples, their mean, and the sum of their squared deviations.
    """

    is_one_sum = False

    def state(self, result: tuple[Tensor, Tensor], factor: float, samples: int) -> list[Tensor]:
        total, squares = (wide(moment.detach()) for moment in result)
        n = torch.tensor(samples, dtype=torch.float64)
        deviation = (squares * factor**2).sub_(squared(total), alpha=factor**2 / samples)
        return [n, total * (factor / samples), deviation]

    def add(
        self, states: list[list[Tensor]], results: list[tuple[Tensor, Tensor]], factor: float, samples: int
    ) -> None:
        groups: dict[float, list[int]] = {}  # parameters that as many samples have used
        for place, state in enumerate(states):
            groups.setdefault(state[0].item(), []).append(place)
        for before, places in groups.items():
            n, mean, deviation = zip(*(states[place] for place in places), strict=True)
            total, squares = zip(*(results[place] for place in places), strict=True)
            difference = torch._foreach_sub(mean, total, alpha=factor / samples)
            torch._foreach_add_(deviation, squares, alpha=factor**2)
            torch._foreach_sub_(deviation, _all_squared(total), alpha=factor**2 / samples)
            torch._foreach_add_(deviation, _all_squared(difference), alpha=before * samples / (before + samples))
            torch._foreach_sub_(mean, difference, alpha=samples / (before + samples))
            torch._foreach_add_(n, samples)

    def reduce(self, state: list[Tensor]) -> Reduction:
        n, mean, deviation = state
        total, common = yield [n, mean * n.item()]
        common = common / max(1.0, total.item())
        (deviation,) = yield [deviation + squared(mean - common) * n.item()]
        return [total, common, deviation]

    def finish(self, state: list[Tensor], factor: float, samples: int) -> Tensor:
        n = state[0].item()
        if n < samples:  # of the others, the gradient is zero
            zeros = torch.zeros_like(state[1]), torch.zeros_like(state[2])
            self.add([state], [zeros], 1.0, int(samples - n))
        return state[2].mul_(factor**2 / samples).clamp_(min=0)

    def scale(self, result: Tensor, factor: float) -> Tensor:
        return result if factor == 1 else result * factor**2


def _all_squared(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The squares of all tensors, in one call unless some are complex."""
    if any(tensor.is_complex() for tensor in tensors):
        return [squared(tensor) for tensor in tensors]
    return list(torch._foreach_mul(tuple(tensors), tuple(tensors)))


@dataclass(frozen=True)
class Joined:
    """Results of single samples, along ``axis``."""

    degree: float
    axis: int = 0

    def weight(self, factor: float) -> float:
        """What a result is multiplied by for ``factor`` times the loss."""
        return factor**self.degree

    def finish(self, rows: Tensor, factor: float) -> Tensor:
        """The result, from the rows of all samples and a last factor of the loss."""
        return self.scale(rows, factor).movedim(0, self.axis)

    def scale(self, result: Tensor, factor: float) -> Tensor:
        """The result for ``factor`` times the loss."""
        return result if factor == 1 else result * self.weight(factor)
