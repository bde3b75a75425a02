"""What the batches of a process have given for each extension and parameter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_map

from backpack.dataset.stores import FileRows, Rows, Sums
from backpack.engine import SHARDED
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.merging import Joined, Merging, Summed
from backpack.memory import LARGE

GRAD = "grad"


@dataclass(eq=False)
class Part:
    """An extension for one batch: the factor of the batch in the loss of all, and its samples among the selected.

    ``places`` is ``None`` where nothing of the batch is wanted.
    """

    extension: BackpropExtension
    factor: float
    places: Tensor | None


@dataclass(eq=False)
class Collection:
    """Results by parameter name and ``savefield``, merged as they come.

    ``merging`` and ``joined`` say by ``savefield`` how results merge: those that are summed, those of single samples.

    Args:
        model: Whose parameters are looked at.
        extensions: As users gave them.
        device: Where results are kept; ``None``: where they are computed.
        one_pass: Whether each batch has one backward pass, so that results of first order come once.
    """

    model: Module
    extensions: tuple[BackpropExtension, ...]
    device: torch.device | None = None
    one_pass: bool = False
    sums: dict[tuple[str, str], Sums] = field(default_factory=dict)
    rows: dict[tuple[str, str], Rows | FileRows] = field(default_factory=dict)
    selected: dict[str, int] = field(default_factory=dict)
    new: dict[tuple[str, str], Any] = field(default_factory=dict)
    """What is to be summed of the batch at hand."""

    def __post_init__(self) -> None:
        self.merging: dict[str, Merging] = {GRAD: Summed(1)}
        self.joined: dict[str, Joined] = {}
        for extension in self.extensions:
            part = extension.on_batch(None, 1.0)
            if extension.rules and part.rules is not extension.rules:
                raise ValueError(
                    f"{type(extension).__name__} has rules of users, which say nothing of what it needs to know of a "
                    f"batch for its result of several."
                )
            if part.batches is None:
                raise ValueError(
                    f"{type(extension).__name__} has no meaning for more than one batch: its results do not merge. "
                    f"(For EKFAC, docs/scale.md shows a second pass over the data.)"
                )
            store: dict[str, Any] = self.joined if isinstance(part.batches, Joined) else self.merging
            store[extension.savefield] = part.batches
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("The model has no parameter that requires a gradient.")
        self.large = {name for name, p in self.parameters.items() if p.numel() * p.element_size() >= LARGE}
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.selected = {extension.savefield: 0 for extension in self.extensions}

    def clear(self) -> None:
        """Take results of earlier backward passes off the parameters."""
        for parameter in self.parameters.values():
            for extension in self.extensions:
                vars(parameter).pop(extension.savefield, None)

    def name_of(self, parameter: Tensor) -> str | None:
        """The name of a parameter of the model, or of the sharded one that it was gathered from."""
        reference = SHARDED.get(parameter) if SHARDED else None
        return self.names.get(id(parameter if reference is None else reference()))

    def take(self, parts: dict[str, Part], parameter: Tensor, savefield: str, result: Any) -> None:
        """Take one result of a batch.

        Those of samples are kept at once, and those that come once are added while they are in the cache. Of other
        sums the last one counts, since what pulls columns back may begin anew.
        """
        name, part = self.name_of(parameter), parts[savefield]
        if name is None or part.places is None:
            return
        if savefield in self.joined:
            joined = self.joined[savefield]
            rows, weight = result.detach().movedim(joined.axis, 0), joined.weight(part.factor)
            self.rows.setdefault((name, savefield), Rows()).add(rows, part.places, weight, self.device)
        elif self.one_pass and part.extension.seeds is None and name in self.large:
            self._add(name, savefield, self._moved(result), part.factor, len(part.places))
        else:
            self.new[name, savefield] = self._moved(result)

    def _moved(self, result: Any) -> Any:
        return result if self.device is None else tree_map(lambda tensor: tensor.to(self.device), result)

    def merge(self, parts: dict[str, Part]) -> None:
        """Add the sums of a batch to those of the batches before."""
        for (name, savefield), result in self.new.items():
            factor, places = parts[savefield].factor, parts[savefield].places
            self._add(name, savefield, result, factor, 0 if places is None else len(places))
        self.new.clear()

    def add_gradient(self, name: str, grad: Tensor, factor: float) -> None:
        """Add the gradient of a batch to those of the batches before; it does not count if the factor is zero."""
        if factor:
            self._add(name, GRAD, self._moved(grad.to_dense() if grad.is_sparse else grad), factor, 0)

    def gradients_are_finite(self) -> bool:
        """Whether those of all batches were."""
        return all(bool(sums.state[0].isfinite().all()) for (_, field), sums in self.sums.items() if field == GRAD)

    def _add(self, name: str, savefield: str, result: Any, factor: float, samples: int) -> None:
        known = self.sums.get((name, savefield))
        if known is None:
            known = self.sums[name, savefield] = Sums(self.merging[savefield])
        known.add(result, factor, samples)


def part_of(extension: BackpropExtension, chosen: Tensor | None, whole: Tensor, factor: float, scale: float) -> Part:
    """What to compute of a batch.

    Args:
        extension: As the user gave it.
        chosen: The numbers of the samples selected, of all data; ``None``: all.
        whole: Those of the batch's samples, in order.
        factor: With which the loss of these samples enters that of all.
        scale: By which it is multiplied before ``backward()``, which second order does not see.
    """
    if extension.seeds is None:
        factor /= scale
    if chosen is None:
        return Part(extension.on_batch(None, factor), factor, whole)
    own = chosen - whole[0]
    places = ((own >= 0) & (own < len(whole))).nonzero().flatten()
    if len(places) == 0:
        return Part(extension.on_batch([0], factor), factor, None)
    return Part(extension.on_batch(own[places].tolist(), factor), factor, places)
