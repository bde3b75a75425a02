"""What is shown while a data set is computed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(wanted: bool | None, total: int | None, done: int) -> Iterator[Callable[[], object]]:
    """A progress bar, on a terminal unless ``wanted`` says otherwise; yields what advances it."""
    if not (sys.stderr and sys.stderr.isatty() if wanted is None else wanted):
        yield lambda: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=total, initial=done, unit="batch", leave=False) as shown:
        yield shown.update
