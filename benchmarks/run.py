"""What does each quantity cost beside plain ``loss.backward()``, and beside other libraries? Writes a file of results.

    python benchmarks/run.py --output benchmarks/results/costs.json
    python benchmarks/run.py --nets MLP --quantities BatchGrad KFAC --series --output mlp.json
    python benchmarks/run.py --device cuda --minutes 8 --rounds 3 --seconds 0.3 --series --output gpu.json

Each library runs in a process of its own. For each network and quantity the processes take turns, a short round each.
In a round, the quantity and the plain gradient take turns as well. A record has the median of the rounds' ratios,
forward pass included, and how far the first steps raise the process's memory above its size at rest. ``report.py``
draws tables and charts from the file.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from select import select
from statistics import median, quantiles
from time import monotonic
from typing import Any

from peers import HERE, LIBRARIES, environment
from result_file import Cell, begin
from subjects import MAIN, NETWORKS, QUANTITIES, SERIES, THREADS, is_measured

LIMIT = 16 * 2**30
"""Bytes that one process may use."""
PATIENCE = 60
"""Seconds that one answer may take: three steps, or a round."""
STARTING = 600
"""Seconds that a process may take to import its library."""


class Process:
    """A worker; with ``root``, it imports this package from there. ``device``: where it computes, if not on a GPU."""

    def __init__(self, library: str, threads: int, root: Path | None = None, device: str | None = None) -> None:
        python = LIBRARIES[library]
        self.command = [python, str(HERE / "worker.py"), library, str(LIMIT)]
        more = {} if root is None else {"PYTHONPATH": str(root)}
        more |= {} if device is None else {"BENCHMARK_DEVICE": device}
        self.environment = environment(python, OMP_NUM_THREADS=str(threads), **more)
        self.start()

    def start(self) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            self.command, stdin=pipe, stdout=pipe, text=True, env=self.environment, cwd=HERE
        )

    def stop(self) -> None:
        self.process.kill()
        with self.process:  # waits, and closes its pipes
            pass

    def ask(self, patience: float = PATIENCE, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        if select([self.process.stdout], [], [], patience)[0]:
            answer = self.process.stdout.readline()
            if answer:
                return json.loads(answer)
        ended = self.process.poll() is not None
        self.stop()
        self.start()
        return {"error": "process ended" if ended else f"over {patience} s"}


@dataclass
class Measurement:
    """Of one library: what it needs, or why there is none."""

    peak: float = 0.0
    """MiB."""
    multiples: dict[int, float] = field(default_factory=dict)
    """Round to multiple of the plain gradient."""
    plain: list[float] = field(default_factory=list)
    """Seconds of a plain step, by rounds."""
    failure: dict[str, str] | None = None

    def cell(self, network: str, quantity: str, library: str, **place: Any) -> Cell:
        where = (network, NETWORKS[network].batch, quantity, library)
        if self.failure is not None:
            return Cell(*where, **place, **self.failure)
        found = list(self.multiples.values())
        spread = None if len(found) < 2 else [round(x, 3) for x in quantiles(found, n=4, method="inclusive")[::2]]
        numbers = {"multiple": round(median(found), 3), "plain_ms": round(1e3 * median(self.plain), 4)}
        return Cell(*where, **place, **numbers, spread=spread, peak_mib=round(self.peak, 1))


def measure(
    processes: dict[str, Process], net: str, quantity: str, rounds: int, seconds: float
) -> dict[str, Measurement]:
    """All that the libraries need for one quantity; those that do not offer it are left out."""
    found: dict[str, Measurement] = {}
    for name, process in processes.items():
        answer = process.ask(do="build", net=net, quantity=quantity)
        answer = answer or process.ask(do="peak")
        if "peak" in answer:
            found[name] = Measurement(peak=answer["peak"] / 2**20)
        elif "missing" not in answer:
            found[name] = Measurement(failure=answer)
    for number in range(rounds):
        for name, own in found.items():
            if own.failure is None:
                answer = processes[name].ask(do="measure", seconds=seconds)
                if "plain" in answer:
                    own.multiples[number] = answer["quantity"] / answer["plain"]
                    own.plain.append(answer["plain"])
                else:
                    own.failure = answer
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", default=MAIN, choices=[*NETWORKS])
    parser.add_argument("--quantities", nargs="+", default=[*QUANTITIES], choices=[*QUANTITIES])
    parser.add_argument("--libraries", nargs="+", default=[*LIBRARIES], choices=[*LIBRARIES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU, if there is one")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further cell after so many")
    parser.add_argument("--series", nargs="*", default=[*SERIES], choices=[*SERIES], help="what else to vary")
    parser.add_argument("--output", type=Path, required=True, help="file of results")
    options = parser.parse_args()
    end = monotonic() + 60 * options.minutes
    libraries = [name for name in options.libraries if Path(LIBRARIES[name]).exists()]
    processes = {name: Process(name, options.threads, device=options.device) for name in libraries}
    said = {name: process.ask(patience=STARTING, do="versions") for name, process in processes.items()}
    for name in [name for name in libraries if "own" not in said[name]]:
        print(f"{name} is left out: {said[name].get('message')}", file=sys.stderr)
        processes.pop(name).stop()
        libraries.remove(name)
    versions = {"torch": said[libraries[0]]["torch"], **{name: said[name]["own"] for name in libraries}}
    results = begin(
        versions,
        options.threads,
        said[libraries[0]]["accelerator"],
        rounds=options.rounds,
        seconds=options.seconds,
        other_threads={net: THREADS[net] for net in options.nets if net in THREADS},
    )

    def add(net: str, quantity: str, more: str = "", **place: Any) -> None:
        if monotonic() > end:
            results.notes[:] = [f"Stopped after {options.minutes:g} minutes."]
            results.write(options.output)
            return
        row = measure(processes, net, quantity + more, options.rounds, options.seconds)
        cells = [own.cell(net, quantity, library, **place) for library, own in row.items()]
        results.cells += cells
        results.write(options.output)  # what is measured so far survives if the run is stopped
        for cell in cells:
            print(f"{net}, {quantity}{more}, {cell.library}: {cell.text}", file=sys.stderr, flush=True)

    for net in options.nets:
        for quantity in options.quantities:
            if is_measured(net, quantity):
                add(net, quantity)
    for title in options.series:
        quantities, places = SERIES[title]
        for quantity in quantities:
            for at, (net, more) in places.items():
                add(net, quantity, more, series=title, at=at)
    for process in processes.values():
        process.stop()


if __name__ == "__main__":
    main()
