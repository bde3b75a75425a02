"""The few names of PyTorch that are not part of its public interface, in one place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import Variable
from torch.autograd.graph import Node


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


unobserved = torch._C.DisableTorchFunction
"""Context in which no ``TorchFunctionMode`` sees what is called."""
