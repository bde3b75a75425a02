"""Functions that need names of PyTorch which are not part of its public interface."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import (
    _add_batch_dim,
    _remove_batch_dim,
    _vmap_decrement_nesting,
    _vmap_increment_nesting,
    get_unwrapped,
    maybe_get_bdim,
    maybe_get_level,
    pop_dynamic_layer_stack,
    push_dynamic_layer_stack,
)
from torch._functorch.vmap import lazy_load_decompositions
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge
from torch.nn import Module
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

_warn_of_loops: Callable[[bool], None] = torch._C._functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]

P = ParamSpec("P")
T = TypeVar("T")


def pull_back(
    outputs: Sequence[Any], inputs: Sequence[Any], seeds: Sequence[Tensor], create_graph: bool = False
) -> tuple[Any, ...]:
    """As ``torch.autograd.grad(..., retain_graph=True, allow_unused=True)``, but without checking its arguments.

    The checks take longer than a pass through a few nodes.
    """
    return Variable._execution_engine.run_backward(
        tuple(outputs), tuple(seeds), True, create_graph, tuple(inputs), allow_unreachable=True, accumulate_grad=False
    )


def is_fully_sharded(module: Module) -> bool:
    """Whether ``torch.distributed.fsdp.fully_shard`` was applied to a module."""
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return sharded is not None and isinstance(module, sharded)


def gathered_parameters(module: Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Of a fully sharded module in its forward pass: the whole parameters that it uses, and the sharded ones."""
    state = module._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    for group in groups:
        for parameter in group.fsdp_params if group is not None else ():
            yield parameter._unsharded_param, parameter.sharded_param


def shape_at(edge: GradientEdge) -> torch.Size:
    """The shape of the tensor that an edge of a graph stands for."""
    return torch.Size(edge.node._input_metadata[edge.output_nr].shape)


def dtype_at(edge: GradientEdge) -> torch.dtype:
    """The data type of the tensor that an edge of a graph stands for."""
    return edge.node._input_metadata[edge.output_nr].dtype


def is_packed(raw: Any) -> bool:
    """Whether a node has saved a tensor through ``saved_tensors_hooks``; older versions of PyTorch do not tell."""
    return getattr(raw, "unpack_hook", None) is not None


def memory_of(tensor: Tensor) -> int:
    """Identifies the memory that a tensor is a view of: the same for all tensors that share it."""
    return tensor.untyped_storage()._cdata


@contextmanager
def checkpoints_explained() -> Iterator[None]:
    """Say why checkpointed regions fail with versions of PyTorch that do not tell which saved tensors are theirs."""
    try:
        yield
    except CheckpointError as error:
        if hasattr(torch._C._autograd.SavedTensor, "unpack_hook"):
            raise
        raise RuntimeError(
            f"torch.utils.checkpoint does not work inside of a backpack(...) block with PyTorch {torch.__version__}, "
            f"which does not tell which saved tensors are recomputed. Use a later version (2.13 is tested), or do "
            f"without checkpointing."
        ) from error


def is_active(mode: TorchFunctionMode) -> bool:
    """Whether a mode is the innermost one. When a backward pass fails, PyTorch takes off those that it began."""
    depth = torch._C._len_torch_function_stack()
    return depth > 0 and torch._C._get_function_stack_at(depth - 1) is mode


@contextmanager
def outside_vmap(tensors: Sequence[Tensor], count: int) -> Iterator[list[Tensor]]:
    """Code inside runs outside of ``torch.vmap``, and gets the tensors with the axis of size ``count`` in front.

    A custom function with a rule for ``torch.vmap`` does that too, and takes 150 microseconds more.
    """
    axes = [maybe_get_bdim(tensor) for tensor in tensors]
    level = pop_dynamic_layer_stack()
    try:
        yield [
            tensor.expand(count, *tensor.shape) if axis < 0 else get_unwrapped(tensor).movedim(axis, 0)
            for tensor, axis in zip(tensors, axes, strict=True)
        ]
    finally:
        push_dynamic_layer_stack(level)


def vmap(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """As ``torch.vmap(function, randomness="same")``, for tensors to one tensor, but without checking its arguments.

    The checks call a hundred functions, which takes as long as a pass through a small network. There is no warning of
    functions that PyTorch loops over.
    """
    lazy_load_decompositions()
    size = len(tensors[0])
    level = _vmap_increment_nesting(size, "same")
    _warn_of_loops(False)
    try:
        return _remove_batch_dim(function(*[_add_batch_dim(tensor, 0, level) for tensor in tensors]), level, size, 0)
    finally:
        _warn_of_loops(True)
        _vmap_decrement_nesting()


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor differs along the axis that ``torch.vmap`` maps over."""
    return maybe_get_bdim(tensor) >= 0


def inside_vmap(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor as ``torch.vmap`` has it inside, where its first axis is mapped; undoes ``outside_vmap(like)``."""
    return _add_batch_dim(tensor, 0, maybe_get_level(like))


def interpreted(function: Callable[P, T]) -> Callable[P, T]:
    """The function, which a compiler of PyTorch's that is in use must neither trace nor compile."""
    known: list[Callable[P, T]] = []
    modules = sys.modules

    @wraps(function)
    def hidden(*args: P.args, **kwargs: P.kwargs) -> T:
        if "torch._dynamo" not in modules:
            return function(*args, **kwargs)
        if not known:
            known.append(torch.compiler.disable(function))
        return known[0](*args, **kwargs)

    return hidden


def caller() -> FrameType:
    """The nearest frame that is neither of this package nor of PyTorch's compiler."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("backpack.", "torch._dynamo")):
        frame = frame.f_back
    assert frame is not None
    return frame


def uncompiled() -> AbstractContextManager[object] | None:
    """Context in which compiled modules run as they were written, so that each of their functions is seen.

    ``None``: there are none.
    """
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return None
    return torch.compiler.set_stance("force_eager")
