"""The base class of all extensions."""

from __future__ import annotations

import copy
from inspect import signature
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.nn import Module

from backpack.extensions.interface import FAIL_ERROR as FAIL_ERROR
from backpack.extensions.interface import FAIL_SILENT as FAIL_SILENT
from backpack.extensions.interface import FAIL_WARN as FAIL_WARN
from backpack.extensions.interface import Quantity
from backpack.extensions.merge_batches import BatchShare, Joined, Merging
from backpack.extensions.module_extension import ModuleExtension
from backpack.modules.module_io import RULED
from backpack.samples import Subset

FIELDS: set[str] = set()
"""All savefields that extensions have had."""

BUILT_IN = (
    *(nn.Linear, nn.Embedding, nn.RNN, nn.LSTM, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
"""Modules whose results a user's rule replaces only on request: those that the original documents as supported. It does
not know any others, so that scripts for it register rules for them."""


E = TypeVar("E", bound="BackpropExtension[Any]")
Result = TypeVar("Result")
"""The type of a parameter's result."""


class BackpropExtension(Quantity, Generic[Result]):
    """A quantity that a backward pass inside ``backpack(...)`` stores on each parameter.

    Args:
        savefield: Name of the attribute that receives the result (default: that of the class).
        module_exts: Class of modules to the rule that computes the results of its parameters.
        fail_mode: Of an extension that has rules only, and meets a parameter without one: ``"ERROR"``, ``"WARNING"``
            or ``"SILENT"`` (``FAIL_ERROR``, ``FAIL_WARN``, ``FAIL_SILENT``).
        subsampling: The samples that contribute, as integers (negative ones count from the end), a boolean mask, a
            slice or a range; ``None``: all. The result is what it would be if only these samples contributed to the
            loss, with the normalization of the full batch unchanged.

    Raises:
        TypeError: ``subsampling`` holds something else, or ``module_exts`` is no such mapping.
        ValueError: ``subsampling`` is empty or not one-dimensional; ``fail_mode`` is none of the three; PyTorch
            stores something else under ``savefield``, as ``"grad"``.
    """

    batches: Merging | Joined | None = None
    """How results of batches become that of a data set; ``None``: they can't."""
    unmerged = "its results do not merge"
    """Why there are no ``batches``, and what to do instead."""
    fixes_scale = False
    """Whether what is computed of a batch depends on the scale of the whole data set's loss."""

    def __init__(
        self,
        savefield: str | None = None,
        module_exts: dict[type[Module], ModuleExtension] | None = None,
        fail_mode: str = "ERROR",
        subsampling: Any = None,
    ) -> None:
        if savefield is not None:
            self.savefield = savefield
        if not self.savefield:
            raise ValueError(f"{type(self).__name__} needs a savefield, the attribute that receives its results.")
        if hasattr(getattr(Tensor, self.savefield, None), "__set__"):
            raise ValueError(
                f"{type(self).__name__}(savefield={self.savefield!r}): PyTorch stores something else under this name. "
                f"Choose another one."
            )
        if fail_mode not in (FAIL_ERROR, FAIL_WARN, FAIL_SILENT):
            raise ValueError(f"fail_mode must be 'ERROR', 'WARNING' or 'SILENT', got {fail_mode!r}.")
        if not isinstance(module_exts or {}, dict):
            raise TypeError(f"module_exts must map classes of modules to rules, got {module_exts!r}.")
        expects = getattr(self, "expects_backpropagation_quantities", None)
        if self.seeds is None and expects is not None and expects():
            raise TypeError(
                f"{type(self).__name__} expects backpropagated quantities: derive it from "
                f"backpack.extensions.secondorder.base.SecondOrderBackpropExtension."
            )
        FIELDS.add(self.savefield)
        self.fail_mode = fail_mode
        self.subset = Subset(subsampling)
        self.has_rules_only = type(self).compute is Quantity.compute and not self.needs_all_parameters
        self.rules = {}
        for module, rule in (module_exts or {}).items():
            self.set_module_extension(module, rule, overwrite=True)

    def __repr__(self) -> str:
        """The call that makes one like this; arguments that have their default are left out."""
        given = []
        for name, parameter in signature(type(self)).parameters.items():
            value = self.subset.given if name == "subsampling" else vars(self).get(name, parameter.default)
            if name == "savefield" and value == type(self).savefield:
                continue
            if repr(value) != repr(parameter.default):
                given.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(given)})"

    def result(self, parameter: Tensor) -> Result:
        """The result on a parameter: ``getattr(parameter, savefield)``, with its type.

        Raises:
            AttributeError: The parameter has none.
        """
        try:
            found: Result = vars(parameter)[self.savefield]
        except KeyError:
            raise AttributeError(
                f"The parameter of shape {list(parameter.shape)} has no .{self.savefield}: call backward() inside of "
                f"backpack({self!r}), on a loss that depends on the parameter."
            ) from None
        return found

    def get_subsampling(self) -> Any:
        """The samples that contribute, as they were given; ``None`` for all."""
        return self.subset.given

    def with_subset(self: E, subset: Subset) -> E:
        """The same extension, of other samples."""
        part = copy.copy(self)
        part.subset = subset
        return part

    def among(self, samples: int) -> BackpropExtension:
        """The same extension, for passes in which entries that belong to no sample count as one sample more."""
        part = self.with_subset(Subset(self.subset.given, samples))
        part.against = None if self.against is None else Subset(self.against.given, samples)
        return part

    def on_batch(self, share: BatchShare) -> BackpropExtension:
        """What to compute of one batch of a data set, whose results are merged as its ``batches`` says."""
        return self.with_subset(Subset(share.rows))

    def beforehand(self) -> BackpropExtension | None:
        """The extension of a pass over the whole data set that must come first, if there is one."""
        return None

    def between(self, found: dict[str, Any]) -> dict[str, Any]:
        """What the second pass needs of the results of ``beforehand``, by parameter, taken out of ``found``.

        Tensors, in lists and dictionaries.
        """
        return found

    def given(self, found: dict[str, Any]) -> BackpropExtension:
        """What to compute of the data set, from what ``between`` returned, by name of the parameter.

        With nothing found yet, it tells how results merge.
        """
        return self

    def entries(self, parameter: Tensor) -> int:
        """About how many entries the result for a parameter has; where it has some for each sample, for one."""
        return parameter.numel()

    @property
    def reads_all_rows(self) -> bool:
        """Whether ``of_whole`` needs the results of the samples of all processes."""
        return type(self).of_whole is not BackpropExtension.of_whole

    def of_whole(self, name: str, merged: Any) -> Any:
        """The result for a data set and a parameter, from what its batches' results were merged to."""
        return merged

    def set_module_extension(self, module: type[Module], extension: ModuleExtension, overwrite: bool = False) -> None:
        """Let a rule compute the results of the parameters of a class of modules, for this extension.

        It holds for subclasses too, as long as they have the same ``forward``.

        Raises:
            TypeError: ``module`` is no class of modules, or ``extension`` no rule.
            ValueError: ``overwrite`` is not set, and there is a rule for the class already, or the extension computes
                the results of this layer of PyTorch's by itself (``BUILT_IN``).
        """
        if not (isinstance(module, type) and issubclass(module, Module)):
            raise TypeError(f"A rule is for a class of modules, such as torch.nn.Linear; got {module!r}.")
        if not isinstance(extension, ModuleExtension):
            raise TypeError(
                f"The rule for {module.__name__} must be an instance of ModuleExtension, got {extension!r}."
            )
        known = self.rules.get(module, "its own" if module in BUILT_IN and not self.has_rules_only else None)
        if known is not None and not overwrite:
            raise ValueError(
                f"{type(self).__name__} has a rule for {module.__name__} already, {known}: pass overwrite=True to "
                f"replace it."
            )
        self.rules[module] = extension
        RULED.add(module)


class BuiltInExtension(BackpropExtension[Result]):
    """An extension of this package without options of its own."""

    def __init__(self, subsampling: Any = None, savefield: str | None = None) -> None:
        super().__init__(savefield, subsampling=subsampling)
