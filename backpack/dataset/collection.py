"""What the batches of a process have given for each extension and parameter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_map

from backpack.dataset.stores import FileRows, Rows
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.curvature import CurvatureExtension
from backpack.extensions.merge_batches import Joined, Merging, Summed
from backpack.memory import LARGE
from backpack.modules.parameters import SHARDED

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
    ``final``: those of which what comes first of a batch is its whole result.

    Args:
        model: Whose parameters are looked at.
        extensions: As users gave them.
        device: Where results are kept; ``None``: where they are computed.
        one_pass: Whether each batch has one backward pass.
    """

    model: Module
    extensions: tuple[BackpropExtension, ...]
    device: torch.device | None = None
    one_pass: bool = False
    sums: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)
    rows: dict[tuple[str, str], Rows | FileRows] = field(default_factory=dict)
    selected: dict[str, int] = field(default_factory=dict)
    new: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What is to be summed of the batch at hand, by ``savefield`` and name."""
    added: set[tuple[str, str]] = field(default_factory=set)
    """What of the batch at hand was added when it came."""

    def __post_init__(self) -> None:
        self.merging: dict[str, Merging] = {GRAD: Summed(1)}
        self.joined: dict[str, Joined] = {}
        self.final: set[str] = set()
        for extension in self.extensions:
            part = extension.on_batch(None, 1.0)
            if extension.rules and part.rules is not extension.rules:
                raise ValueError(
                    f"{type(extension).__name__} has rules of users, which say nothing of what it needs to know of a "
                    f"batch for its result of several."
                )
            if part.batches is None:
                raise ValueError(
                    f"{type(extension).__name__} has no meaning for more than one batch: {extension.unmerged}."
                )
            store: dict[str, Any] = self.joined if isinstance(part.batches, Joined) else self.merging
            store[extension.savefield] = part.batches
            if self.one_pass and (not isinstance(part, CurvatureExtension) or part.backprop == "sqrt"):
                self.final.add(extension.savefield)
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

        Those of samples are kept at once, and sums for large parameters are added at once, which saves their memory.
        A pass that pulls columns back may begin anew: of these the first result counts then, of all others the last.
        """
        name, part = self.name_of(parameter), parts[savefield]
        if name is None or part.places is None:
            return
        if part.extension.is_deferred:
            result = part.extension.of_parameter(name, parameter, result)
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
        """Add the sums of a batch to those of the batches before."""
        for savefield, results in self.new.items():
            part = parts[savefield]
            self._add(savefield, results, part.factor, 0 if part.places is None else len(part.places))
        self.new.clear()
        self.added.clear()

    def add_gradients(self, grads: dict[str, Tensor], factor: float) -> None:
        """Add gradients of a batch to those of the batches before; they do not count if the factor is zero."""
        if factor:
            dense = {name: self._moved(grad.to_dense() if grad.is_sparse else grad) for name, grad in grads.items()}
            self._add(GRAD, dense, factor, 0)

    def gradients_are_finite(self) -> bool:
        """Whether those of all batches were."""
        norms = torch._foreach_norm([state[0] for (_, field), state in self.sums.items() if field == GRAD], torch.inf)
        return all(norm.isfinite().item() for norm in norms)

    def _add(self, savefield: str, results: dict[str, Any], factor: float, samples: int) -> None:
        """Add results of one extension for some parameters."""
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


def part_of(extension: BackpropExtension, chosen: Tensor | None, whole: Tensor, factor: float, scale: float) -> Part:
    """What to compute of a batch.

    Args:
        extension: As the user gave it.
        chosen: The numbers of the samples selected, of all data; ``None``: all.
        whole: Those of the batch's samples, in ascending order.
        factor: With which the loss of these samples enters that of all.
        scale: By which it is multiplied before ``backward()``, which second order does not see.
    """
    if extension.seeds is None:
        factor /= scale
    if chosen is None:
        return Part(extension.on_batch(None, factor), factor, whole)
    own = torch.searchsorted(whole, chosen).clamp(max=len(whole) - 1)
    places = (whole[own] == chosen).nonzero().flatten()
    if len(places) == 0:
        return Part(extension.on_batch([0], factor), factor, None)
    return Part(extension.on_batch(own[places].tolist(), factor), factor, places)
