"""Is a step slower at one commit of this repository than at another?

    python benchmarks/compare.py OLD NEW --network MLP --quantity BatchL2Grad
    python benchmarks/compare.py HEAD . --network "MLP 8-8-8-8" --quantity extended BatchL2Grad --rounds 40

Each commit is checked out in a temporary worktree and measured in a process of its own; ``.`` is the working tree as it
is. Networks and quantities are those of ``run.py``, from the working tree for both; ``extended`` is an extended module
outside of any block. The processes take turns, a short round each, as in ``run.py``.

A cell shows the median of the rounds' multiples of plain ``loss.backward()``, forward included, and behind it how far
the quantity raises the process's memory, in MiB (of the first quantity, also by what its first step imports). The last
column shows the ratio of each round's two multiples: the median, and between which values the middle half lies. Two
processes of the same files (``compare.py . .``) show the noise; it is least with one thread.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory

from peers import HERE
from report import row, table
from run import STARTING, Measurement, Process, measure
from subjects import NETWORKS, QUANTITIES

ROOT = HERE.parent


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Where the commit's files are."""
    if commit == ".":
        yield ROOT
        return
    with TemporaryDirectory() as folder:
        worktree = Path(folder).resolve() / "worktree"
        git = ["git", "-C", str(ROOT), "worktree"]
        try:
            subprocess.run([*git, "add", "--quiet", "--detach", str(worktree), commit], check=True)
            yield worktree
        finally:  # forced twice, since it is locked while git fills it
            subprocess.run([*git, "remove", "--force", "--force", str(worktree)], capture_output=True)


@contextmanager
def worker(commit: str, threads: int) -> Iterator[Process]:
    """A process that is certain to measure this commit."""
    with checkout(commit) as root:
        process = Process("this package", threads, root)
        try:
            origin = process.ask(patience=STARTING, do="origin")
            if not Path(origin.get("file", "")).is_relative_to(root):
                raise RuntimeError(f"The process for {commit} does not import backpack from {root}: {origin}.")
            yield process
        finally:
            process.stop()


def spread(old: Measurement | None, new: Measurement | None) -> str:
    """The median and the quartiles of the rounds' ratios."""
    if old is None or new is None or old.failure or new.failure or len(old.multiples) < 2:
        return ""
    ratios = [new.multiples[number] / multiple for number, multiple in old.multiples.items()]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a commit, or `.`")
    parser.add_argument("new", help="a commit, or `.`")
    parser.add_argument("--network", nargs="+", default=["MLP"], choices=[*NETWORKS])
    parser.add_argument("--quantity", nargs="+", default=["BatchL2Grad"], choices=[*QUANTITIES])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.1, help="length of a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="where the network does not fix them")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # else worktrees would be left
    commits = {f"old: {options.old}": options.old, f"new: {options.new}": options.new}
    old, new = commits
    with ExitStack() as stack:
        processes = {name: stack.enter_context(worker(commit, options.threads)) for name, commit in commits.items()}
        print(table(["network, quantity", old, new, "new / old"], []), end="", flush=True)
        for net in options.network:
            for quantity in options.quantity:
                found = measure(processes, net, quantity, options.rounds, options.seconds)
                cells = [found[name].cell(net, quantity, name).text if name in found else "" for name in commits]
                print(row([f"{net}, {quantity}", *cells, spread(*map(found.get, commits))]), flush=True)


if __name__ == "__main__":
    main()
