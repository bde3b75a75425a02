"""Complex numbers, in PyTorch's convention: a complex parameter is two real ones.

Its gradient is ``dL/d Re + i dL/d Im``. What a linear map ``z = W x`` sends back to ``W`` is ``g conj(x)^T``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def squared(tensor: Tensor) -> Tensor:
    """The squares of numbers; of complex numbers, the squares of their absolute values."""
    return tensor.real.square() + tensor.imag.square() if tensor.is_complex() else tensor.square()


def as_real(tensor: Tensor) -> Tensor:
    """Real and imaginary parts side by side along the last axis, which is twice as long then."""
    return torch.view_as_real(tensor.resolve_conj()).flatten(-2) if tensor.is_complex() else tensor


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another data type; if that is real, the real part of complex numbers."""
    return (tensor.real if tensor.is_complex() and not dtype.is_complex else tensor).to(dtype)


def conjugated(tensor: Tensor) -> Tensor:
    """The complex conjugates; of real numbers, themselves."""
    return tensor.conj_physical() if tensor.is_complex() else tensor


def double(tensor: Tensor) -> Tensor:
    """The tensor in float64, or in complex128."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
