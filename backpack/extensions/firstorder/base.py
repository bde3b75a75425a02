"""What rules and extensions of first order, written by users, derive from."""

from __future__ import annotations

from typing import Any

from torch.nn import Module

from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.module_extension import ModuleExtension


class FirstOrderModuleExtension(ModuleExtension):
    """A rule whose ``bpQuantities`` are ``None``."""


class FirstOrderBackpropExtension(BackpropExtension):
    """An extension that is made of rules. Parameters whose module has none are left out, with a warning."""

    def __init__(
        self,
        savefield: str,
        module_exts: dict[type[Module], ModuleExtension],
        fail_mode: str = "WARNING",
        subsampling: Any = None,
    ) -> None:
        super().__init__(savefield, module_exts, fail_mode, subsampling)
