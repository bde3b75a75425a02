"""The state of each thread: open blocks, the forward pass that runs, a backward pass of our own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor
from torch.nn import Module


class _Thread(threading.local):
    """The state of one thread.

    ``root`` is the outermost extended module whose forward pass runs. It was called from ``frame``. ``depth`` counts
    its calls that run, one inside of the other. ``random`` is the state of the generators when the pass began, if the
    module may have to run again. ``inner`` is a backward pass of our own that runs.
    """

    def __init__(self) -> None:
        self.blocks: list[Any] = []
        self.root: Module | None = None
        self.depth = 0
        self.frame: FrameType | None = None
        self.random: list[Tensor] | None = None
        self.disabled = 0
        self.muted = False
        self.inner: Any = None


HERE = _Thread()


@contextmanager
def muted() -> Iterator[None]:
    """Let forward passes leave no notes, and backward passes take no cotangents."""
    HERE.muted, before = True, HERE.muted
    try:
        yield
    finally:
        HERE.muted = before
