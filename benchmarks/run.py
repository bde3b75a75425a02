"""Time and memory of each quantity as a multiple of plain ``loss.backward()``, forward included, beside other packages.

Each implementation runs in a process of its own. For each network and quantity the processes take turns, a short round
each; in a round, the quantity and the plain gradient take turns as well. A cell shows the median over the rounds of the
rounds' ratios, and behind it how far the quantity raises the process's memory above its size at rest, in MiB.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from subjects import NETWORKS, QUANTITIES, SUBSAMPLED

HERE = Path(__file__).parent
PEERS = str(HERE / ".venv-peers" / "bin" / "python")
IMPLEMENTATIONS = {
    "this package": (sys.executable, "backpack"),
    "original 1.7.1": (PEERS, "backpack"),
    "torch.func": (sys.executable, "torch.func"),
    "Opacus": (PEERS, "Opacus"),
    "curvlinops": (PEERS, "curvlinops"),
}
LIMIT = 16 * 2**30
"""Bytes that one process may use."""


class Process:
    """A worker."""

    def __init__(self, python: str, implementation: str, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if python == PEERS:
            environment.pop("PYTHONPATH", None)  # it may lead to this package, which has the original's name
        self.process = subprocess.Popen(
            [python, str(HERE / "worker.py"), implementation, str(LIMIT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=HERE,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        return json.loads(answer) if answer else {"error": "the process ended"}


def compare(processes: dict[str, Process], net: str, quantity: str, rounds: int, seconds: float) -> dict[str, str]:
    """One row: what each implementation takes, as text."""
    row, running, peaks = {}, {}, {}
    for name, process in processes.items():
        answer = process.ask(do="build", net=net, quantity=quantity)
        answer = answer or process.ask(do="peak")
        if "peak" in answer:
            running[name], peaks[name] = process, answer["peak"] / 2**20
        else:
            row[name] = "" if "missing" in answer else f"fails ({answer['error'][:40]})"
    ratios: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, process in running.items():
            answer = process.ask(do="measure", seconds=seconds)
            if "plain" in answer:
                ratios[name].append(answer["quantity"] / answer["plain"])
    for name in running:
        row[name] = f"{median(ratios[name]):.2f} ({peaks[name]:.0f})" if ratios[name] else "fails"
    return row


def table(rows: dict[str, dict[str, str]], names: list[str]) -> list[str]:
    lines = ["| quantity | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        "| " + " | ".join([quantity, *(row.get(name, "") for name in names)]) + " |" for quantity, row in rows.items()
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=[*NETWORKS], choices=[*NETWORKS])
    parser.add_argument("--quantities", nargs="+", default=[*QUANTITIES], choices=[*QUANTITIES])
    parser.add_argument("--implementations", nargs="+", default=[*IMPLEMENTATIONS], choices=[*IMPLEMENTATIONS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="two networks, three quantities, one short round")
    parser.add_argument("--output", type=Path, default=HERE / "results.md")
    options = parser.parse_args()
    if options.quick:
        options.nets, options.rounds, options.seconds = ["MLP", SUBSAMPLED], 1, 0.2
        options.quantities = ["nothing", "BatchGrad", "DiagGGNMC"]
    chosen = {
        name: IMPLEMENTATIONS[name] for name in options.implementations if Path(IMPLEMENTATIONS[name][0]).exists()
    }
    processes = {name: Process(*how, options.threads) for name, how in chosen.items()}
    versions = processes["this package"].ask(do="versions")
    lines = [
        "# Results",
        "",
        str(__doc__),
        f"{date.today()}, {platform.processor() or platform.machine()}, {options.threads} threads, "
        f"PyTorch {versions['torch']}, {options.rounds} rounds of {options.seconds} s.",
    ]
    for net in options.nets:
        wanted = ["plain", "nothing", "BatchGrad", "BatchGrad@4"] if net == SUBSAMPLED else options.quantities
        rows = {quantity: compare(processes, net, quantity, options.rounds, options.seconds) for quantity in wanted}
        rows = {quantity: row for quantity, row in rows.items() if any(row.values())}
        lines += ["", f"## {net}", "", *table(rows, [*processes])]
        print("\n".join(lines[-len(rows) - 4 :]), flush=True)
    options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
