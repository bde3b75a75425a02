"""Rules that users write: what an extension computes for the parameters of one class of modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import Module


class ModuleExtension:
    """A rule for one class of modules, in place of what the extension itself would compute.

    For each name in ``params`` a subclass has a method of that name, which returns the parameter's result::

        def weight(self, ext, module, g_inp, g_out, bpQuantities): ...

    ``ext`` is the extension, ``g_out`` holds the gradient of each output of the module, ``g_inp`` that of each input
    (``None`` where there is none; computed when it is read). While the method runs, ``module.input0``, ...,
    ``module.output`` are those of the forward pass. ``bpQuantities`` is ``None`` for extensions of first order. For
    those that read columns of the loss Hessian's root, it is these columns, pulled back to the module's output:
    ``[V, N, *out]``, reduction of the loss included, of the selected samples only where the extension sub-samples.

    A ``backpropagate`` method, which rules for the original may have, is not called: autograd propagates.

    Raises:
        NotImplementedError: There is no method for one of ``params``.
    """

    def __init__(self, params: Sequence[str] | None = None) -> None:
        self.params = tuple(params or ())
        for name in self.params:
            if not callable(getattr(self, name, None)):
                raise NotImplementedError(
                    f"{type(self).__name__} has no rule for the parameter {name}: give it a method "
                    f"{name}(self, ext, module, g_inp, g_out, bpQuantities) that returns the result."
                )

    def check_hyperparameters_module_extension(
        self, ext: Any, module: Module, g_inp: Sequence[Tensor | None], g_out: tuple[Tensor | None, ...]
    ) -> None:
        """Raise an error where the rule does not hold for this module; called before it is applied."""
