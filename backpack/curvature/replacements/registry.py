"""Which of PyTorch's functions are replaced where a forward pass is to be differentiated twice."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch.nn.functional as F

EXPANDED: set[Any] = {F.multi_head_attention_forward}
"""Python functions that are looked into: what counts is the functions that they call."""

REPLACED: dict[Any, Callable[..., Any]] = {}
"""Fused functions without second derivatives by samples to what computes the same of functions that have them; it may
return ``NotImplemented``."""


@cache
def looked_into(func: Any) -> Callable[..., Any]:
    """A Python function of PyTorch that does not hand itself to a mode as a whole."""
    scope = {**func.__globals__, "has_torch_function": lambda tensors: False}
    inner = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    inner.__kwdefaults__ = func.__kwdefaults__
    return inner
