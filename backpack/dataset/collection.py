"""The results of the batches of one process, merged for each extension and parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_map

from backpack.dataset.sample_rows import FileRows, Rows
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.curvature import CurvatureExtension
from backpack.extensions.merge_batches import BatchShare, Joined, Merging, Summed
from backpack.memory import LARGE
from backpack.modules.parameters import SHARDED

GRAD = "grad"

MODEL = ""
"""The name under which results are kept that all parameters share."""


@dataclass(eq=False)
class Part:
    """What an extension computes of one batch.

    ``factor``: with which the loss of the batch enters that of the whole data set; ``places``: those of the batch's
    samples among all that the extension selects, ``None`` if it selects none of them.
    """

    extension: BackpropExtension
    factor: float
    places: Tensor | None


@dataclass(eq=False)
class Collection:
    """Results by parameter name and ``savefield``, merged as they come.

    ``sums`` holds what is summed, ``rows`` results of single samples; ``merging`` and ``joined`` say by ``savefield``
    how they merge. The results of ``final`` extensions are complete when they first come.

    Args:
        model: The model whose parameters receive results.
        extensions: The extensions, as the user gave them.
        device: Device that results are moved to; ``None``: they stay where they are computed.
        one_pass: Whether there is one backward pass for each batch.
        only: The names of the parameters that receive results; ``None``: all do.

    Raises:
        ValueError: An extension has no meaning for several batches, or no parameter requires a gradient.
    """

    model: Module
    extensions: tuple[BackpropExtension, ...]
    device: torch.device | None = None
    one_pass: bool = False
    only: Sequence[str] | None = None
    sums: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)
    rows: dict[tuple[str, str], Rows | FileRows] = field(default_factory=dict)
    new: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Results of the current batch that wait for their sum, by ``savefield`` and name."""
    added: set[tuple[str, str]] = field(default_factory=set)
    """Keys of the results of the current batch that were added when they came, or that have come for all parameters."""

    def __post_init__(self) -> None:
        self.merging: dict[str, Merging] = {GRAD: Summed(1)}
        self.joined: dict[str, Joined] = {}
        self.final: set[str] = set()
        for extension in self.extensions:
            part = extension.on_batch(BatchShare(None, 1.0, torch.arange(0)))
            if extension.rules and part.rules is not extension.rules:
                raise ValueError(
                    f"{type(extension).__name__} has custom rules, but for several batches it needs other results of "
                    f"each batch than these rules compute. Use it without custom rules."
                )
            if part.batches is None:
                raise ValueError(
                    f"{type(extension).__name__} has no meaning for more than one batch: {extension.unmerged}."
                )
            store: dict[str, Any] = self.joined if isinstance(part.batches, Joined) else self.merging
            store[extension.savefield] = part.batches
            if self.one_pass and (not isinstance(part, CurvatureExtension) or part.backprop == "sqrt"):
                self.final.add(extension.savefield)
        trainable = parameters_of(self.model)
        self.parameters = trainable if self.only is None else {name: trainable[name] for name in self.only}
        self.large = {name for name, p in self.parameters.items() if p.numel() * p.element_size() >= LARGE}
        self.names = {id(p): name for name, p in self.parameters.items()}

    def clear(self) -> None:
        """Delete results of earlier backward passes from the parameters."""
        for parameter in self.parameters.values():
            for extension in self.extensions:
                vars(parameter).pop(extension.savefield, None)

    def name_of(self, parameter: Tensor) -> str | None:
        """The name of a parameter of the model, or of the sharded one that it was gathered from."""
        reference = SHARDED.get(parameter) if SHARDED else None
        return self.names.get(id(parameter if reference is None else reference()))

    def wants(self, parameter: Tensor) -> bool:
        """Whether a parameter receives results."""
        return self.name_of(parameter) is not None

    def take(self, parts: dict[str, Part], parameter: Tensor, savefield: str, result: Any) -> None:
        """Take one result of a batch.

        Results of single samples are kept at once, and those of large parameters added at once, which saves memory.
        Others wait for ``merge``: a pass that pulls columns back may begin anew, and then the last result counts.
        """
        name, part = self.name_of(parameter), parts[savefield]
        if name is None or part.places is None:
            return
        if part.extension.is_of_model:
            if (MODEL, savefield) in self.added:
                return
            name = MODEL
            self.added.add((name, savefield))
        if savefield in self.joined:
            joined = self.joined[savefield]
            rows = result.detach()
            rows = rows.movedim(joined.axis, 0) if joined.axis else rows
            store = self.rows.get((name, savefield))
            if store is None:
                store = self.rows[name, savefield] = Rows()
            store.add(rows, part.places, joined.weight(part.factor), self.device)
        elif name in self.large and savefield in self.final:
            if (name, savefield) not in self.added:
                self.added.add((name, savefield))
                self._add(savefield, {name: self._moved(result)}, part.factor, len(part.places))
        else:
            self.new.setdefault(savefield, {})[name] = self._moved(result)

    def _moved(self, result: Any) -> Any:
        return result if self.device is None else tree_map(lambda tensor: tensor.to(self.device), result)

    def merge(self, parts: dict[str, Part]) -> None:
        """Add the results of a batch that wait to those of the batches before."""
        for savefield, results in self.new.items():
            part = parts[savefield]
            self._add(savefield, results, part.factor, 0 if part.places is None else len(part.places))
        self.new.clear()
        self.added.clear()

    def add_gradients(self, grads: dict[str, Tensor], factor: float) -> None:
        """Add gradients of a batch to those of the batches before, unless the factor is zero."""
        if factor:
            dense = {name: self._moved(grad.to_dense() if grad.is_sparse else grad) for name, grad in grads.items()}
            self._add(GRAD, dense, factor, 0)

    def gradients_are_finite(self) -> bool:
        """Whether the gradients of all batches are finite."""
        grads = [state[0] for (_, field), state in self.sums.items() if field == GRAD]
        return not grads or all(norm.isfinite().item() for norm in torch._foreach_norm(grads, torch.inf))

    def _add(self, savefield: str, results: dict[str, Any], factor: float, samples: int) -> None:
        """Add results of one extension, by name of the parameters."""
        merging, states, further = self.merging[savefield], [], []
        for name, result in results.items():
            state = self.sums.get((name, savefield))
            if state is None:
                self.sums[name, savefield] = merging.state(result, factor, samples)
            else:
                states.append(state)
                further.append(result)
        if states:
            with torch.no_grad():
                merging.add(states, further, factor, samples)


def parameters_of(model: Module) -> dict[str, Tensor]:
    """The parameters of a model that require a gradient, by name.

    Raises:
        ValueError: There are none.
    """
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("The model has no parameter that requires a gradient.")
    return found


def part_of(
    extension: BackpropExtension,
    chosen: Tensor | None,
    numbers: Tensor,
    factor: float,
    scale: float,
    samples: int | None,
) -> Part:
    """What an extension computes of a batch.

    Args:
        extension: The extension, as the user gave it.
        chosen: The numbers of the selected samples in the data set; ``None``: all are.
        numbers: The numbers of the batch's samples, in ascending order.
        factor: The factor with which the loss of the batch enters that of the data set.
        scale: What the loss is multiplied by before ``backward()``; second order does not see it.
        samples: The number of samples of the data set, where it is known.
    """
    if extension.seeds is None:
        factor /= scale
    if chosen is None:
        return Part(extension.on_batch(BatchShare(None, factor, numbers, samples)), factor, numbers)
    own = torch.searchsorted(numbers, chosen).clamp(max=len(numbers) - 1)
    places = (numbers[own] == chosen).nonzero().flatten()
    if len(places) == 0:
        return Part(
            extension.on_batch(BatchShare([0], factor, torch.zeros(1, dtype=torch.int64), samples)), factor, None
        )
    return Part(extension.on_batch(BatchShare(own[places].tolist(), factor, places, samples)), factor, places)
