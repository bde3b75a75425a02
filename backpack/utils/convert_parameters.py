"""Conversion between parameters and vectors of all their entries."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def vector_to_parameter_list(vec: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Cut a vector into tensors of the shapes of parameters.

    Args:
        vec: A vector with as many entries as all parameters together.
        parameters: The tensors that give the shapes.

    Returns:
        Views of ``vec``, one for each parameter.

    Raises:
        TypeError: ``vec`` is no tensor.
        ValueError: ``vec`` is no vector, or has another size.
    """
    if not isinstance(vec, Tensor):
        raise TypeError(f"vec must be a tensor, got {type(vec).__name__}.")
    shapes = [parameter.shape for parameter in parameters]
    sizes = [shape.numel() for shape in shapes]
    if vec.dim() != 1 or len(vec) != sum(sizes):
        raise ValueError(f"vec has shape {list(vec.shape)}, but the parameters have {sum(sizes)} entries.")
    return [part.reshape(shape) for part, shape in zip(vec.split(sizes), shapes, strict=True)]
