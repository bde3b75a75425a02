"""What passes know of an extension: they import nothing else of this folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor
from torch.nn import Module

from backpack.extensions.module_extension import ModuleExtension
from backpack.modules.parameters import PARAMETERS
from backpack.samples import Subset
from backpack.uses import Individual
from backpack.uses.base import accumulate

FAIL_ERROR, FAIL_WARN, FAIL_SILENT = "ERROR", "WARNING", "SILENT"
"""What an extension that consists of rules does with a parameter that none of them covers."""


class Quantity:
    """What passes know of any extension."""

    savefield: str = ""
    subset: Subset
    fail_mode: str
    rules: dict[type[Module], ModuleExtension]
    has_rules_only: bool
    """Whether the extension consists of rules, and computes nothing by itself."""
    seeds: str | None = None
    """``None``: of first order. Otherwise which columns of the loss Hessian's root are pulled back."""
    reads: tuple[str, ...] = ()
    """The reductions of ``Individual`` that ``compute`` reads: those of all extensions are computed together."""
    needs_all_parameters = False
    """Whether the result for a parameter depends on all of them: ``compute_jointly`` takes the place of ``compute``."""
    is_of_model = False
    """Whether the result is one for all parameters: what ``combine`` returns."""
    needs_own_losses = False
    """Whether it must be known if the loss is a mean over samples or a sum."""
    against: Subset | None = None
    """Samples whose gradients ``compute`` finds as ``grads.others``."""
    bounds_influence = False
    """Whether it is used to bound what one sample changes, so that no sample may change what is computed of others."""
    needs_samples_apart = False
    """Whether it is not defined for parameters below what mixes samples."""
    needs_real_parameters = False
    """Whether it is not defined for complex parameters."""

    def rule_for(self, module: Module) -> ModuleExtension | None:
        """The rule of the nearest base class that has one, and the same ``forward``."""
        for cls in type(module).__mro__ if self.rules else ():
            if cls in self.rules and cls.forward is type(module).forward:
                return self.rules[cls]
        return None

    def missing(self, name: str) -> None:
        """Raise an error or a warning, as ``fail_mode`` says, since no rule covers a parameter."""
        message = (
            f"{type(self).__name__} has no rule for the module of parameter {name}: register one with "
            f"set_module_extension(), or let the extension define compute()."
        )
        if self.fail_mode == FAIL_ERROR:
            raise NotImplementedError(message)
        if self.fail_mode == FAIL_WARN:
            warnings.warn(message, stacklevel=2)

    def compute(self, grads: Individual) -> Any:
        """The result for one parameter, from its individual gradients."""
        raise NotImplementedError(f"{type(self).__name__} does not define compute().")

    def check(self, parameters: Sequence[Tensor], samples: int) -> None:
        """Raise if the extension does not fit the parameters and the number of samples of a batch."""

    def measure(self, grads: Individual) -> Tensor:
        """The measure of one parameter; ``combine`` receives those of all (where ``needs_all_parameters``)."""
        raise NotImplementedError(f"{type(self).__name__} does not define measure().")

    def combine(self, measures: dict[Tensor, Tensor], samples: int | None) -> Any:
        """What the results of all parameters need, from the measures of all.

        ``samples``: those that the loss is a mean over, ``None`` for a sum; known where ``needs_own_losses``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define combine().")

    def compute_jointly(self, grads: Individual, joint: Any) -> Any:
        """The result for one parameter, given what ``combine`` returned."""
        raise NotImplementedError(f"{type(self).__name__} does not define compute_jointly().")


class Curvature(Quantity):
    """What passes know of a second-order extension."""

    seeds: str = "exact"
    mc_samples: int
    chunk_size: int | None
    additive = True
    """Whether the result of all columns is the sum of those of some each."""
    whole = False
    """Whether all columns are needed at a time."""
    backprop = "sqrt"
    """How they are pulled back: by themselves, or their mean over the batch, module by module (``"average"``)."""
    semidefinite = True
    """Whether the loss must have a positive semidefinite Hessian."""

    def merge(self, results: list[Any]) -> Any:
        """The result of all columns, from those of some each; the first one may be overwritten."""
        terms = results[:1]
        for result in results[1:]:
            accumulate(terms, result)
        return terms[0]

    def complete(self, result: Any, grads: Individual) -> Any:
        """Add to the result of all columns what does not depend on them; ``grads``: of the last ones."""
        return result


R = TypeVar("R", bound=Quantity)


def by_rule(extension: Quantity, parameter: Tensor) -> bool:
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

    An extension that consists of rules reports a missing one if this is the ``last`` time that it is asked.
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
