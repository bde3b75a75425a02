"""What one thread is doing: the open blocks, the forward pass that runs, a pass of our own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor
from torch.nn import Module


class _Thread(threading.local):
    """What one thread is doing.

    ``root``: the outermost extended module whose forward pass runs, ``depth`` times, called from ``frame``; ``random``:
    the state of the generators when it began, if it may have to run again; ``inner``: a pass of our own that runs.
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
    """Forward passes inside leave no notes, and no cotangents are taken."""
    HERE.muted, before = True, HERE.muted
    try:
        yield
    finally:
        HERE.muted = before
