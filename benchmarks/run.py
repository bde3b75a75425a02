"""Time and memory of each quantity as a multiple of plain ``loss.backward()``, forward included, beside other packages.

Each implementation runs in a process of its own. For each network and quantity the processes take turns, a short round
each; in a round, the quantity and the plain gradient take turns as well. A cell shows the median over the rounds of the
rounds' ratios, and behind it how far the quantity raises the process's memory above its size at rest, in MiB.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from select import select
from statistics import median
from typing import Any

from subjects import MAIN, NETWORKS, QUANTITIES, SERIES, THREADS, TOO_LARGE

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
PATIENCE = 60
"""Seconds that one answer may take: three steps, or a round."""


class Process:
    """A worker; with ``root``, it imports this package from there."""

    def __init__(self, python: str, implementation: str, threads: int, root: Path | None = None) -> None:
        self.command = [python, str(HERE / "worker.py"), implementation, str(LIMIT)]
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if python == PEERS:
            self.environment.pop("PYTHONPATH", None)  # it may lead to this package, which has the original's name
        if root is not None:
            self.environment["PYTHONPATH"] = str(root)
        self.start()

    def start(self) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            self.command, stdin=pipe, stdout=pipe, text=True, env=self.environment, cwd=HERE
        )

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        if select([self.process.stdout], [], [], PATIENCE)[0]:
            answer = self.process.stdout.readline()
            if answer:
                return json.loads(answer)
        ended = self.process.poll() is not None
        self.stop()
        self.start()
        return {"error": "the process ended" if ended else f"takes over {PATIENCE} s"}


Cell = tuple[float, float] | str
"""Multiple of the plain gradient and MiB; or why there is none."""


def compare(
    processes: dict[str, Process], net: str, quantity: str, rounds: int, seconds: float
) -> tuple[dict[str, Cell], list[dict[str, float]]]:
    """One row: what each implementation takes; and the multiples of each round."""
    row: dict[str, Cell] = {}
    peaks: dict[str, float] = {}
    for name, process in processes.items():
        answer = process.ask(do="build", net=net, quantity=quantity)
        answer = answer or process.ask(do="peak")
        if "peak" in answer:
            peaks[name] = answer["peak"] / 2**20
        elif "missing" not in answer:
            row[name] = f"fails ({answer['error'].split(': ', 1)[-1][:60]})"
    multiples: list[dict[str, float]] = [{} for _ in range(rounds)]
    for found in multiples:
        for name in peaks:
            answer = processes[name].ask(do="measure", seconds=seconds)
            if "plain" in answer:
                found[name] = answer["quantity"] / answer["plain"]
    for name, peak in peaks.items():
        own = [found[name] for found in multiples if name in found]
        row[name] = (median(own), peak) if own else "fails"
    return row, multiples


def table(rows: dict[str, dict[str, Cell]], names: list[str], first: str) -> list[str]:
    def text(cell: Cell) -> str:
        return cell if isinstance(cell, str) else f"{cell[0]:.2f} ({cell[1]:.0f})"

    lines = [f"| {first} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += ["| " + " | ".join([label, *(text(row.get(n, "")) for n in names)]) + " |" for label, row in rows.items()]
    return lines


def draw(title: str, rows: dict[tuple[str, int], dict[str, Cell]], file: Path) -> None:
    """A line for each quantity (colour) and implementation (dashes)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    quantities = list(dict.fromkeys(quantity for quantity, _ in rows))
    for place, name in enumerate(IMPLEMENTATIONS):
        for colour, quantity in enumerate(quantities):
            points = [(x, row[name][0]) for (q, x), row in rows.items() if q == quantity and name in row and row[name]]
            points = [(x, y) for x, y in points if isinstance(y, float)]
            if points:
                style = {"color": f"C{colour}", "linestyle": ["-", "--", ":", "-.", (0, (1, 4))][place]}
                axes.plot(*zip(*points, strict=True), marker="o", label=f"{quantity}, {name}", **style)
    axes.set(xscale="log", yscale="log", xlabel=title, ylabel="multiple of the plain gradient")
    axes.set_xticks(ticks := sorted({x for _, x in rows}), [str(x) for x in ticks], minor=False)
    axes.minorticks_off()
    figure.legend(fontsize="small", loc="outside right center", handlelength=4)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", default=MAIN, choices=[*NETWORKS])
    parser.add_argument("--quantities", nargs="+", default=[*QUANTITIES], choices=[*QUANTITIES])
    parser.add_argument("--implementations", nargs="+", default=[*IMPLEMENTATIONS], choices=[*IMPLEMENTATIONS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--series", nargs="*", default=[*SERIES], choices=[*SERIES], help="what else to vary")
    parser.add_argument("--quick", action="store_true", help="one network, three quantities, one series, one round")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder for the tables and plots")
    options = parser.parse_args()
    if options.quick:
        options.nets, options.rounds, options.seconds = ["MLP"], 1, 0.2
        options.quantities, options.series = ["nothing", "BatchGrad", "DiagGGNMC"], ["selected of 128 samples"]
    chosen = {
        name: IMPLEMENTATIONS[name] for name in options.implementations if Path(IMPLEMENTATIONS[name][0]).exists()
    }
    processes = {name: Process(*how, options.threads) for name, how in chosen.items()}
    versions = next(iter(processes.values())).ask(do="versions")
    lines = [
        str(__doc__),
        f"{date.today()}, {versions['device']}, {options.threads} threads, PyTorch {versions['torch']}, "
        f"{options.rounds} rounds of {options.seconds} s.",
    ]
    options.output.mkdir(exist_ok=True)

    def report(more: list[str]) -> None:
        print("\n".join(more), flush=True)
        lines.extend(more)
        (options.output / "results.md").write_text("\n".join(lines) + "\n")

    def measure(net: str, quantity: str) -> dict[str, Cell]:
        return compare(processes, net, quantity, options.rounds, options.seconds)[0]

    for net in options.nets:
        rows = {q: measure(net, q) for q in options.quantities if (net, q) not in TOO_LARGE}
        heading = f"## {net}" + (f", {THREADS[net]} thread" if net in THREADS else "")
        report(["", heading, "", *table({q: row for q, row in rows.items() if row}, [*processes], "quantity")])
    for title in options.series:
        quantities, places = SERIES[title]
        points = {(q, x): measure(net, q + more) for q in quantities for x, (net, more) in places.items()}
        shown = {f"{q}, {x}": row for (q, x), row in points.items() if row}
        plot = title.replace(" ", "_") + ".svg"
        draw(title, points, options.output / plot)
        report(["", f"## By {title}", "", f"![{title}]({plot})", "", *table(shown, [*processes], f"quantity, {title}")])


if __name__ == "__main__":
    main()
