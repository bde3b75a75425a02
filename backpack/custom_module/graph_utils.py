"""Import paths of the original: a tracer of ``torch.fx``, and the conversion that is not needed here."""

from __future__ import annotations

from torch.fx import Tracer
from torch.nn import Module

from backpack.context import convert_module_to_backpack
from backpack.custom_module.branching import Parallel

__all__ = ["BackpackTracer", "convert_module_to_backpack"]


class BackpackTracer(Tracer):
    """Traces a model down to the modules of PyTorch and of ``backpack.custom_module``, which stay whole."""

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        """Whether a module becomes a single node; containers do not."""
        own = type(m).__module__.startswith("backpack.custom_module.") and not isinstance(m, Parallel)
        return own or super().is_leaf_module(m, module_qualified_name)
