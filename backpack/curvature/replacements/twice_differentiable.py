"""Forward passes that can be differentiated twice, and which of PyTorch's functions are replaced in them."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

EXPANDED: set[Any] = {F.multi_head_attention_forward}
"""Python functions that are looked into: what counts is the functions that they call."""

REPLACED: dict[Any, Callable[..., Any]] = {}
"""Fused functions without second derivatives by samples to what computes the same of functions that have them; it may
return ``NotImplemented``."""

WRONG: set[Any] = set()
"""Those of them that have second derivatives in PyTorch, but wrong ones."""


@cache
def looked_into(func: Any) -> Callable[..., Any]:
    """A Python function of PyTorch that does not hand itself to a mode as a whole."""
    scope = {**func.__globals__, "has_torch_function": lambda tensors: False}
    inner = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    inner.__kwdefaults__ = func.__kwdefaults__
    return inner


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


class RightTwice(TorchFunctionMode):
    """Context for forward passes: functions whose second derivatives PyTorch gets wrong are written out."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (REPLACED[func] if func in WRONG else func)(*args, **(kwargs or {}))
