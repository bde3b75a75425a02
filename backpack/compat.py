"""The few names of PyTorch that are not part of its public interface, in one place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Module


def graph_task() -> int:
    """Identify the backward pass that runs on this thread (-1: none)."""
    return torch._C._current_graph_task_id()


def graph_is_kept() -> bool:
    """Whether the running backward pass was started with ``retain_graph=True``."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def running_node() -> Node | None:
    """The node of the graph whose hooks or function run on this thread."""
    return torch._C._current_autograd_node()


def when_backward_ends(callback: Callable[[], None]) -> None:
    """Run ``callback`` after the running backward pass has done all its work, unless it fails."""
    Variable._execution_engine.queue_callback(callback)


def is_fully_sharded(module: Module) -> bool:
    """Whether ``torch.distributed.fsdp.fully_shard`` was applied to a module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


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


unobserved = torch._C.DisableTorchFunction
"""Context in which no ``TorchFunctionMode`` sees what is called."""
