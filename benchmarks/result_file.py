"""What does a file of results hold? The machine, the versions, and one record for each cell, as JSON.

``run.py`` and ``agreement.py`` write such files, ``report.py`` draws tables and charts from them. Nothing here needs
PyTorch. A record leaves out what it has no value for.
"""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cell:
    """Cost of one quantity on one network with one library; or an error in words."""

    network: str
    batch: int
    quantity: str
    library: str
    series: str | None = None
    """What varies from record to record, for example ``"batch size"``."""
    at: int | None = None
    """Where in the series this record lies."""
    multiple: float | None = None
    """Median over the rounds: time of a step as a multiple of a step with plain ``loss.backward()``."""
    plain_ms: float | None = None
    """Median over the rounds: milliseconds of the plain step. Files from before it was recorded lack it."""
    spread: Sequence[float] | None = None
    """Lower and upper quartile of the rounds' multiples."""
    peak_mib: float | None = None
    """How far a step raises the process's memory above its size at rest."""
    error: str | None = None
    message: str | None = None
    """How the library itself puts the error."""

    @property
    def text(self) -> str:
        """For a table: the multiple, and the memory in parentheses; or the error."""
        return self.error if self.multiple is None else f"{self.multiple:.2f} ({self.peak_mib:.0f})"


@dataclass(frozen=True)
class Difference:
    """Largest difference between this package's result and another library's; or an error in words."""

    network: str
    batch: int
    quantity: str
    library: str
    difference: float | None = None
    error: str | None = None

    @property
    def text(self) -> str:
        return self.error if self.difference is None else f"{self.difference:.1e}"


@dataclass
class Results:
    """All that a file holds."""

    date: str
    commit: str | None
    machine: dict[str, Any]
    versions: dict[str, str]
    method: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    cells: list[Any] = field(default_factory=list)

    def write(self, file: Path) -> None:
        """One record a line, so that changes can be read."""
        head = asdict(self)
        records = [{name: value for name, value in cell.items() if value is not None} for cell in head.pop("cells")]
        lines = ",\n  ".join(json.dumps(record, ensure_ascii=False) for record in records)
        start = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
        file.write_text(f'{start},\n "cells": [\n  {lines}\n ]\n}}\n')


def read(file: Path, kind: type = Cell) -> Results:
    """The results in a file, whose records are of this kind."""
    found = json.loads(file.read_text())
    return Results(**{**found, "cells": [kind(**record) for record in found["cells"]]})


def begin(versions: dict[str, str], threads: int, accelerator: str | None = None, **method: Any) -> Results:
    """Results of a run that starts now, on this machine, still without records."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = {"processor": _processor(), "accelerator": accelerator, "cores": os.cpu_count(), "threads": threads}
    return Results(str(date.today()), _commit(), {**machine, "memory_gib": round(memory, 1)}, versions, method)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the working tree, marked if files were changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


WORDS = {
    "does not have an ex": "unsupported layer",
    "un-supported layers": "unsupported layer",
    "groups ≠ 1 is not supported": "unsupported grouped convolution",
    "got an unexpected keyword argument": "cannot select samples",
    "alloc_cpu": "out of memory",
    "out of memory": "out of memory",
    "needs the curvature in the output of": "matrix too large",
    "would have to be di": "matrix too large",
    "doesn't match the broadcast": "shape error",
    "forward gradient that has a different size": "shape error",
    "use forward AD with _scaled_dot_product": "unsupported attention",
    "eigh: The algorithm failed to converge": "eigenvalues not found",
}
"""Part of a library's message to what it means for the reader of a table."""


def in_words(kind: str, message: str) -> str:
    """What a table says in place of a number."""
    return next((words for part, words in WORDS.items() if part in message), f"raises {kind}")
