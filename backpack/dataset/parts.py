"""The parameters of a model in parts, of which one at a time has results; and which process keeps which results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate as running_sums
from typing import Any

from torch import Tensor

from backpack.extensions.backprop_extension import BackpropExtension
from backpack.modules.parameters import listed

Parts = int | Sequence[Collection[str]] | None
"""How many parts there are, or the names of the parameters of each; ``None``: all are one."""


def divided(parameters: Mapping[str, Tensor], extensions: Iterable[BackpropExtension], parts: Parts) -> list[list[str]]:
    """The names of the parameters of each part, in the order of the model.

    A number of parts need about equal memory for their results.

    Raises:
        TypeError: ``parts`` is neither a number nor a sequence of collections of names.
        ValueError: The parts do not have each parameter once.
    """
    if parts is None:
        return [list(parameters)]
    if isinstance(parts, int):
        return _equal(parameters, extensions, parts)
    if isinstance(parts, str) or not isinstance(parts, Sequence) or any(isinstance(part, str) for part in parts):
        raise TypeError(
            f"parts takes a number, or for each part a list of the names of its parameters, as "
            f"[['0.weight', '0.bias'], ['2.weight']]; got {parts!r}."
        )
    counts = Counter(name for part in parts for name in part)
    wrong = {
        "names what is no parameter that requires a gradient": [name for name in counts if name not in parameters],
        "has several times": [name for name, count in counts.items() if count > 1],
        "leaves out": [name for name in parameters if name not in counts],
    }
    for what, names in wrong.items():
        if names:
            raise ValueError(
                f"parts {what}: {listed(names)}. Name each parameter that requires a gradient in one part, and freeze "
                f"with requires_grad_(False) what is to be left out."
            )
    return [[name for name in parameters if name in part] for part in map(set, parts) if part]


def _equal(parameters: Mapping[str, Tensor], extensions: Iterable[BackpropExtension], count: int) -> list[list[str]]:
    """So many parts at most, each of which has about the same share of the memory."""
    if count < 1:
        raise ValueError(f"parts must be positive, got {count}.")
    sizes = sizes_of(parameters, extensions)
    total = max(1, sum(sizes.values()))
    found: dict[int, list[str]] = {}
    for (name, size), end in zip(sizes.items(), running_sums(sizes.values()), strict=True):
        found.setdefault((2 * end - size) * count // (2 * total), []).append(name)  # by the middle of its share
    return list(found.values())


def sizes_of(parameters: Mapping[str, Tensor], extensions: Iterable[BackpropExtension]) -> dict[str, int]:
    """About how many entries the results of each parameter have."""
    extensions = list(extensions)
    return {name: sum(extension.entries(p) for extension in extensions) for name, p in parameters.items()}


def owners_of(parts: Sequence[Sequence[str]], sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Which of ``count`` processes keeps the results of each parameter.

    In each part, those that take longest come first, and each goes to the process with the least to do so far. Time
    goes with the cube of the sides of a matrix, which is its size to the power of 1.5.
    """
    loads = [0.0] * count
    found: dict[str, int] = {}
    for part in parts:
        for name in sorted(part, key=lambda name: (-sizes[name], name)):
            found[name] = loads.index(min(loads))
            loads[found[name]] += float(sizes[name]) ** 1.5
    return found


def refuse_joint(extensions: Iterable[BackpropExtension[Any]]) -> None:
    """Refuse extensions that depend on all parameters.

    Raises:
        ValueError: There is one.
    """
    for extension in extensions:
        if extension.needs_all_parameters:
            raise ValueError(
                f"{extension!r} depends on all parameters, and cannot be computed for some at a time: leave parts out."
            )
