"""What extensions of second order, written by users, derive from."""

from __future__ import annotations

import warnings
from typing import Any

from torch.nn import Module

from backpack.extensions.curvature import CurvatureExtension
from backpack.extensions.module_extension import ModuleExtension


class SecondOrderBackpropExtension(CurvatureExtension):
    """An extension that is made of rules, whose ``bpQuantities`` are columns of the loss Hessian's root.

    One column per output, as documented for ``SqrtGGNExact``.
    """

    seeds = "documented"

    def __init__(
        self,
        savefield: str,
        module_exts: dict[type[Module], ModuleExtension],
        fail_mode: str = "ERROR",
        subsampling: Any = None,
    ) -> None:
        super().__init__(savefield, subsampling)
        self.fail_mode = fail_mode
        for module, rule in module_exts.items():
            self.set_module_extension(module, rule, overwrite=True)
        for rule in {id(rule): rule for rule in module_exts.values() if hasattr(rule, "backpropagate")}.values():
            warnings.warn(
                f"{type(rule).__name__}.backpropagate is not called: the bpQuantities of {type(self).__name__} are "
                f"columns of a root of the loss's Hessian, which autograd pulls back to each module's output.",
                stacklevel=3,
            )
