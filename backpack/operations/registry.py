"""Rules: for a PyTorch function, how it uses the tensors that are given to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from backpack.uses import Use


@dataclass(eq=False)
class Operation:
    """What one call of a function does with its parameters.

    ``axes``: those of the output along which samples may lie. ``uses``: for each tensor that may be a parameter,
    its use; the same tensor may occur twice. What is not listed is handled by the function's own
    vector-Jacobian product. ``refused``: why the parameters of this call have no individual gradients.
    ``broadcast``: the parameters are aligned with the last axes of the output. ``grouped``: arguments whose entries
    the call puts together along the first axis of its output; where the samples would be counted by one of these
    arguments, they are counted by the output instead.
    """

    axes: tuple[int, ...]
    uses: Sequence[tuple[Tensor | None, Use]]
    refused: str | None = None
    broadcast: bool = False
    grouped: tuple[Tensor, ...] = ()


Rule = Callable[..., "Operation | None"]

RULES: dict[Any, Rule] = {}
"""Function to rule. A rule takes the output and the arguments of the call; ``None``: it does not apply."""

EXPANDED: set[Any] = set()
"""Python functions that are looked into: what counts is the functions that they call."""

REPLACED: dict[Any, Callable[..., Any]] = {}
"""Fused functions without second derivatives by samples to what computes the same of functions that have them; it may
return ``NotImplemented``."""


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register the rule that follows for these functions."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, function))
        return function

    return register
