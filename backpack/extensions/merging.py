"""How the results of batches become that of all their samples as one batch.

The loss of the whole is the sum over batches of ``factor`` times the batch's own loss, and a result of ``degree``
``d`` is ``c^d`` times as large for ``c`` times the loss. States are lists of tensors, so that they can be stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Reduction = Generator[list[Tensor], list[Tensor], list[Tensor]]
"""Yields tensors, is sent their sums over all processes, and returns a state."""


def wide(tensor: Tensor) -> Tensor:
    """In a data type in which many terms can be added."""
    return tensor.float() if tensor.element_size() < 4 else tensor


class Merging(ABC):
    """One way to merge; the state of a part of the data is a list of tensors."""

    @abstractmethod
    def state(self, result: Any, factor: float, samples: int) -> list[Tensor]:
        """That of a batch whose loss enters with ``factor`` and whose ``samples`` contribute."""

    @abstractmethod
    def add(self, state: list[Tensor], result: Any, factor: float, samples: int) -> None:
        """Add a further batch to a state, in place: one pass over the memory of each tensor, where that can be."""

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
class Summed(Merging):
    """A sum over samples."""

    degree: float

    def state(self, result: Tensor, factor: float, samples: int) -> list[Tensor]:
        return [wide(result.detach()) * self.weight(factor, samples)]

    def add(self, state: list[Tensor], result: Tensor, factor: float, samples: int) -> None:
        state[0].add_(result.detach().to(state[0].device), alpha=self.weight(factor, samples))

    def weight(self, factor: float, samples: int) -> float:
        """With which a batch's result enters the sum."""
        return factor**self.degree

    def finish(self, state: list[Tensor], factor: float, samples: int) -> Tensor:
        return state[0] if factor == 1 else state[0].mul_(factor**self.degree)

    def scale(self, result: Tensor, factor: float) -> Tensor:
        return result if factor == 1 else result * factor**self.degree


@dataclass(frozen=True)
class Averaged(Summed):
    """A mean over samples, without the scale of the loss."""

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

    def add(self, state: list[Tensor], result: list[Tensor], factor: float, samples: int) -> None:
        for part, own, more in zip(self.parts, state, result, strict=False):
            part.add([own], more, factor, samples)

    def finish(self, state: list[Tensor], factor: float, samples: int) -> list[Tensor]:
        return [part.finish([own], factor, samples) for part, own in zip(self.parts, state, strict=False)]

    def scale(self, result: list[Tensor], factor: float) -> list[Tensor]:
        return [part.scale(own, factor) for part, own in zip(self.parts, result, strict=False)]


@dataclass(frozen=True)
class Moments(Merging):
    """A population variance, from pairs ``(sum, variance)`` (Chan, Golub & LeVeque, 1979, eq. 2.1).

    The state is the number of samples, their mean, and the sum of their squared deviations.
    """

    def state(self, result: tuple[Tensor, Tensor], factor: float, samples: int) -> list[Tensor]:
        total, variance = (wide(moment.detach()) for moment in result)
        n = torch.tensor(samples, dtype=torch.float64)
        return [n, total * (factor / samples), variance * (factor**2 * samples)]

    def add(self, state: list[Tensor], result: tuple[Tensor, Tensor], factor: float, samples: int) -> None:
        n, mean, deviation = state
        before = n.item()
        difference = mean.sub(result[0].detach().to(mean.device), alpha=factor / samples)
        deviation.add_(result[1].detach().to(mean.device), alpha=factor**2 * samples)
        deviation.addcmul_(difference, difference, value=before * samples / (before + samples))
        mean.sub_(difference, alpha=samples / (before + samples))
        n += samples

    def reduce(self, state: list[Tensor]) -> Reduction:
        n, mean, deviation = state
        total, common = yield [n, mean * n.item()]
        common = common / max(1.0, total.item())
        (deviation,) = yield [deviation + (mean - common).square() * n.item()]
        return [total, common, deviation]

    def finish(self, state: list[Tensor], factor: float, samples: int) -> Tensor:
        n = state[0].item()
        if n < samples:  # of the others, the gradient is zero
            zero = torch.zeros_like(state[1])
            self.add(state, (zero, zero), 1.0, int(samples - n))
        return state[2].mul_(factor**2 / samples)

    def scale(self, result: Tensor, factor: float) -> Tensor:
        return result if factor == 1 else result * factor**2


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
