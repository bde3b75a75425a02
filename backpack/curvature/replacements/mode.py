"""Forward passes that can be differentiated twice."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

from backpack.curvature.replacements.registry import EXPANDED, REPLACED, looked_into


class TwiceDifferentiable(TorchFunctionMode):
    """Context for forward passes: fused attention and recurrent layers are replaced by functions that compute the same.

    PyTorch's fused kernels have no second derivatives, so that products with the Hessian or the GGN would fail. Forward
    passes of extended models need no such context: the extensions see to it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in EXPANDED:
            with self:
                return looked_into(func)(*args, **kwargs)
        if func in REPLACED:
            out = REPLACED[func](*args, **kwargs)
            if out is not NotImplemented:
                return out
        return func(*args, **kwargs)
