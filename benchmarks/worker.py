"""How long does a step take in one library, and how much memory? A process that answers, one line of JSON each way.

``steps.py`` has the steps.
"""

import ctypes
import gc
import json
import os
import resource
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from result_file import in_words
from steps import LIBRARIES, NotOffered, Step, plain
from subjects import DEVICE, PLAIN, THREADS, make

DEFAULT_THREADS = torch.get_num_threads()


class Subject:
    """A network and a quantity, beside plain PyTorch on a network of its own."""

    def __init__(self, library: str, net: str, quantity: str) -> None:
        torch.set_num_threads(THREADS.get(net, DEFAULT_THREADS))
        self.plain = plain(*make(net))
        own = plain if quantity == PLAIN else LIBRARIES[library][0]
        self.step = own(*make(net), quantity)

    def measure(self, seconds: float) -> dict[str, Any]:
        """Medians of a round of about so many seconds, in which both take turns."""
        times: list[tuple[float, float]] = []
        timed(self.plain), timed(self.step)  # the caches hold another process's data
        start = perf_counter()
        while len(times) < 3 or perf_counter() - start < seconds:
            times.append((timed(self.plain), timed(self.step)))
            if perf_counter() - start > 10 * seconds:
                break
        return dict(zip(("plain", "quantity"), map(median, zip(*times, strict=True)), strict=True))

    def peak(self) -> dict[str, Any]:
        """How far the first three steps raise the memory in use above what it is now, in bytes."""
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            for _ in range(3):
                self.step()
            return {"peak": torch.cuda.max_memory_allocated() - before}
        if release := getattr(sys.modules.get("backpack.memory"), "release", None):  # old commits have none
            release()
        ctypes.CDLL(None).malloc_trim(0)  # what earlier subjects left would be used again, uncounted
        before = reset_peak()
        for _ in range(3):
            self.step()
        return {"peak": status("VmHWM") - before}


def timed(step: Step) -> float:
    """Seconds of one step."""
    wait()
    start = perf_counter()
    step()
    wait()
    return perf_counter() - start


def wait() -> None:
    """Let the device finish what is queued on it."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def status(field: str) -> int:
    """A size of this process, from Linux, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def reset_peak() -> int:
    """Let the peak of this process's memory start from its present size, which is returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


class Worker:
    """Answers requests."""

    def __init__(self, library: str) -> None:
        self.library = library
        self.subject: Subject | None = None

    def answer(self, do: str, **arguments: Any) -> dict[str, Any]:
        if do == "versions":
            accelerator = torch.cuda.get_device_name() if DEVICE == "cuda" else None
            return {"torch": torch.__version__, "own": version(LIBRARIES[self.library][1]), "accelerator": accelerator}
        if do == "origin":
            import backpack

            return {"file": backpack.__file__}
        if do == "build":
            self.subject = None
            gc.collect()
            self.subject = Subject(self.library, **arguments)
            return {}
        assert self.subject is not None
        return getattr(self.subject, do)(**arguments)


def main(library: str, bytes_at_most: int) -> None:
    if DEVICE == "cpu":  # CUDA reserves more addresses than there is memory
        # A quantity that does not fit is to fail by itself, not to take the machine with it.
        resource.setrlimit(resource.RLIMIT_AS, (bytes_at_most, bytes_at_most))
    warnings.simplefilter("ignore")
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    worker = Worker(library)
    for line in sys.stdin:
        try:
            reply = worker.answer(**json.loads(line))
        except NotOffered:
            reply = {"missing": True}
        except Exception as error:
            message = " ".join(str(error).split())[:300]
            reply = {"error": in_words(type(error).__name__, message), "message": message}
        print(json.dumps(reply), file=channel, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
