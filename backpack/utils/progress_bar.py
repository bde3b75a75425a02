"""A progress bar for work that takes long."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def bar(
    wanted: bool | None, total: int | None, done: int = 0, unit: str = "batch", delay: float = 0.0
) -> Iterator[Callable[..., Any]]:
    """Show a progress bar; yields the function that advances it, by a number or by one.

    It appears after ``delay`` seconds if ``tqdm`` is installed, and by default (``wanted=None``) on a terminal only.
    """
    if not (sys.stderr and sys.stderr.isatty() if wanted is None else wanted):
        yield lambda count=1: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda count=1: None
        return
    with tqdm(total=total, initial=done, unit=unit, leave=False, delay=delay) as shown:
        yield shown.update
