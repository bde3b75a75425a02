"""What is shown while a data set is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(wanted: bool | None, total: int | None, done: int) -> Iterator[Callable[[], object]]:
    """A progress bar, on a terminal unless ``wanted`` says otherwise; yields what advances it."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    disabled = None if wanted is None else not wanted
    with tqdm(total=total, initial=done, unit="batch", disable=disabled, leave=False) as shown:
        yield shown.update
