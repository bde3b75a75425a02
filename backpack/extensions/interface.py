"""What passes need to know of an extension: they import nothing else of this folder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, TypeVar

from torch import Tensor
from torch.nn import Module

from backpack.modules.parameters import PARAMETERS
from backpack.samples import Subset
from backpack.uses import Individual


class HasRules(Protocol):
    """What is needed to know of an extension that may have rules of users."""

    savefield: str
    rules: dict[type[Module], Any]
    has_rules_only: bool
    """Whether nothing is computed but by rules."""

    def rule_for(self, module: Module) -> Any:
        """The user's rule for a module, if there is one."""

    def missing(self, name: str) -> None:
        """Say that there is none for the module of a parameter."""


class Quantity(HasRules, Protocol):
    """What is needed to know of an extension of first order."""

    subset: Subset
    reads: tuple[str, ...]
    needs_all_parameters: bool
    bounds_influence: bool
    """Whether it is used to bound what one sample changes, so that no sample may change what is computed of others."""
    seeds: str | None

    def compute(self, grads: Individual) -> Any:
        """The result for one parameter."""

    def measure(self, grads: Individual) -> Tensor:
        """What of one parameter the results of all depend on."""

    def combine(self, measures: list[Tensor]) -> Tensor:
        """What the result of each parameter needs to know of all."""

    def compute_jointly(self, grads: Individual, joint: Tensor) -> Any:
        """The result for one parameter, given what ``combine`` returned."""


class Curvature(HasRules, Protocol):
    """What is needed to know of a second-order extension."""

    subset: Subset
    reads: tuple[str, ...]
    seeds: str
    mc_samples: int
    chunk_size: int | None
    additive: bool
    whole: bool
    backprop: str
    semidefinite: bool
    needs_samples_apart: bool
    needs_real_parameters: bool

    def compute(self, grads: Individual) -> Any:
        """The result of some seeds for one parameter."""

    def merge(self, results: list[Any]) -> Any:
        """The result of all seeds, from those of some each."""

    def complete(self, result: Any, grads: Individual) -> Any:
        """Add to the result of all seeds what does not depend on them."""


R = TypeVar("R", bound=HasRules)


def by_rule(extension: HasRules, parameter: Tensor) -> bool:
    """Whether a user's rule computes the result of a parameter."""
    if not extension.rules or parameter not in PARAMETERS:
        return False
    for module in PARAMETERS[parameter].owners:
        rule = extension.rule_for(module)
        if rule is not None and any(module._parameters.get(name) is parameter for name in rule.params):
            return True
    return False


def without_rules(extensions: Iterable[R], parameter: Tensor, name: str, last: bool = True) -> list[R]:
    """Extensions that compute a parameter themselves, because no user's rule covers it.

    An extension that has nothing but rules says that this one is missing, if it is the ``last`` time that it is asked.
    """
    found = []
    for extension in extensions:
        if by_rule(extension, parameter):
            continue
        if not extension.has_rules_only:
            found.append(extension)
        elif last:
            extension.missing(name)
    return found
