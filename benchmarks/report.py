"""What does a file of results say? Draws its tables, as Markdown, and its charts, as SVG.

    python benchmarks/report.py benchmarks/results/costs.json --output FOLDER

The documentation is built from the same functions.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from result_file import Cell, Difference, Results, read

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

OWN = "this package"
PLAIN = "plain"
SUMMARY = {
    "BatchGrad": "individual gradients",
    "BatchL2Grad": "norms of individual gradients",
    "Variance": "variance of individual gradients",
    "DiagGGNMC": "GGN diagonal, sampled",
    "DiagGGNExact": "GGN diagonal, exact",
    "DiagHessian": "Hessian diagonal",
    "HMP": "product with the Hessian",
    "KFAC": "Kronecker factors",
}
"""The rows of the short table, in words."""
SUMMARY_NETWORKS = ["3C3D", "GPT-2 block"]
COLORS = {OWN: "C0", "original": "C1", "torch.func": "C2", "Opacus": "C3", "curvlinops": "C4"}
COLORS |= {"Opacus, ghost clipping": "C5", "kronfluence": "C6"}
STYLES = {OWN: "-", "original": "--", "torch.func": ":", "Opacus": "-.", "curvlinops": (0, (1, 4))}
STYLES |= {"Opacus, ghost clipping": (0, (4, 4)), "kronfluence": (0, (1, 8))}
LAYERS = "number of layers"
"""The series that shows what a layer takes."""
MULTIPLE = "multiple of the plain gradient"


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(row(cells) for cells in (header, ["---"] * len(header), *rows)) + "\n"


def libraries(results: Results) -> dict[str, str]:
    """Library to its name with its version, in the order of the file."""
    names = dict.fromkeys(cell.library for cell in results.cells)
    outside = [name for name in names if name not in (OWN, "torch.func")]
    return {name: f"{name} {results.versions[name]}" if name in outside else name for name in names}


def _best_of_others(cells: list[Cell]) -> str:
    others = [cell for cell in cells if cell.library != OWN]
    measured = [cell for cell in others if cell.multiple is not None]
    if measured:
        best = min(measured, key=lambda cell: cell.multiple)
        return f"{best.multiple:.2f}, {best.library}"
    return "; ".join(f"{cell.library}: {cell.error}" for cell in others) or "not offered"


def summary(results: Results) -> str:
    """The short table: this package, and the fastest of the others, on two networks."""
    units = ["time (× plain)", "memory (MiB)", "fastest other (× plain)"]
    header = ["quantity", *(f"{network}: {unit}" for network in SUMMARY_NETWORKS for unit in units)]
    rows = []
    for quantity, words in SUMMARY.items():
        cells = [f"{words} (`{quantity}`)"]
        for network in SUMMARY_NETWORKS:
            found = [c for c in results.cells if (c.network, c.quantity, c.series) == (network, quantity, None)]
            own = next(cell for cell in found if cell.library == OWN)
            measured = own.multiple is not None
            cells += [f"{own.multiple:.2f}" if measured else own.error, f"{own.peak_mib:.0f}" if measured else "–"]
            cells.append(_best_of_others(found))
        rows.append(cells)
    plain = {c.network: c.peak_mib for c in results.cells if (c.quantity, c.library, c.series) == (PLAIN, OWN, None)}
    memory = ", ".join(f"{plain[network]:.0f} MiB on {network}" for network in SUMMARY_NETWORKS)
    return table(header, rows) + f"\nA plain step itself takes {memory}.\n"


def environment(results: Results) -> str:
    """On what the numbers were measured, as a list."""
    machine, method = results.machine, results.method
    memory = "not recorded" if machine["memory_gib"] is None else f"{machine['memory_gib']} GiB"
    lines = [
        f"Date: {results.date}. Commit: {results.commit or 'not recorded'}.",
        f"Processor: {machine['processor']}.",
        f"Cores: {machine['cores']}. Threads: {machine['threads']}. Memory: {memory}.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in results.versions.items()) + ".",
        f"Rounds: {method['rounds']}, of {method['seconds']} s each.",
    ]
    if machine["accelerator"]:
        lines.insert(2, f"Accelerator: {machine['accelerator']}.")
    for network, threads in method.get("other_threads", {}).items():
        lines.append(f"{network} ran with {threads} thread(s).")
    return "\n".join(f"- {line}" for line in [*lines, *results.notes]) + "\n"


def _cells(cells: Iterable[Cell | Difference], names: dict[str, str], first: str, unit: str) -> str:
    """A table with one column for each library."""
    rows: dict[str, dict[str, str]] = {}
    for cell in cells:
        at = "" if getattr(cell, "at", None) is None else f", {cell.at}"
        rows.setdefault(f"`{cell.quantity}`{at}", {})[cell.library] = cell.text
    header = [first, *(f"{name}{unit}" for name in names.values())]
    return table(header, ([label, *(found.get(name, "–") for name in names)] for label, found in rows.items()))


def details(results: Results) -> str:
    """All cells: a section for each network, and one with a chart for each series."""
    names = libraries(results)
    parts = []
    for network in dict.fromkeys(cell.network for cell in results.cells if cell.series is None):
        own = [cell for cell in results.cells if (cell.network, cell.series) == (network, None)]
        parts += [f"### {network}, {own[0].batch} samples\n", _cells(own, names, "quantity", ": × plain (MiB)")]
    for series in series_of(results):
        own = [cell for cell in results.cells if cell.series == series]
        parts += [f"### By {series}\n", f"![Time by {series}]({chart_name(series)})\n"]
        parts.append(_cells(own, names, f"quantity, {series}", ": × plain (MiB)"))
        if series == LAYERS:
            parts += ["Time beyond the plain step, for each layer, in microseconds:\n", layers(own)]
    return "\n".join(parts)


def layers(cells: Sequence[Cell]) -> str:
    """What a layer takes beyond the plain step, in microseconds: a row for each quantity and library."""
    depths = [*dict.fromkeys(cell.at for cell in cells)]
    rows: dict[tuple[str, str], dict[int | None, str]] = {}
    for cell in cells:
        if cell.multiple is not None and cell.plain_ms is not None and cell.at:
            beyond = (cell.multiple - 1) * cell.plain_ms * 1e3 / cell.at
            rows.setdefault((cell.quantity, cell.library), {})[cell.at] = f"{beyond:.0f}"
    header = ["quantity, library", *(f"{depth} layers" for depth in depths)]
    named = (
        [f"`{quantity}`, {library}", *(found.get(d, "–") for d in depths)]
        for (quantity, library), found in rows.items()
    )
    return table(header, named)


def agreement(results: Results) -> str:
    """Largest differences between results: a table for each library, a column for each network."""
    parts = []
    for library, name in libraries(results).items():
        own = [cell for cell in results.cells if cell.library == library]
        networks = [*dict.fromkeys(cell.network for cell in own)]
        rows: dict[str, dict[str, str]] = {}
        for cell in own:
            rows.setdefault(cell.quantity, {})[cell.network] = cell.text
        cells = ([f"`{quantity}`", *(found.get(n, "–") for n in networks)] for quantity, found in rows.items())
        parts.append(f"### Beside {name}\n\n" + table(["relative difference of", *networks], cells))
    return "\n".join(parts)


def series_of(results: Results) -> list[str]:
    return [series for series in dict.fromkeys(cell.series for cell in results.cells) if series is not None]


def chart_name(series: str) -> str:
    return series.replace(" ", "_") + ".svg"


def cost_chart(results: Results, network: str) -> Figure:
    """Time of the quantities of the short table: a row for each, a mark for each library."""
    from matplotlib.figure import Figure

    cells = [c for c in results.cells if (c.network, c.series) == (network, None) and c.multiple is not None]
    shown = [quantity for quantity in SUMMARY if any(cell.quantity == quantity for cell in cells)][::-1]
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    for library, name in libraries(results).items():
        own = {cell.quantity: cell.multiple for cell in cells if cell.library == library and cell.quantity in shown}
        marker = {"marker": "o", "s": 60, "zorder": 3} if library == OWN else {"marker": "x", "s": 40}
        if own:
            axes.scatter(own.values(), [shown.index(q) for q in own], color=COLORS[library], label=name, **marker)
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_yticks(range(len(shown)), shown)
    axes.grid(axis="x", alpha=0.3)
    batch = cells[0].batch
    axes.set(xscale="log", xlabel=f"time of a step, {MULTIPLE}\n({network}, {batch} samples)")
    _label(axes.xaxis)
    figure.legend(fontsize="small", loc="outside lower center", ncols=3)
    return figure


def series_chart(results: Results, series: str) -> Figure:
    """A line for each quantity (colour) and library (dashes)."""
    from matplotlib.figure import Figure

    cells = [cell for cell in results.cells if cell.series == series and cell.multiple is not None]
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    quantities = [*dict.fromkeys(cell.quantity for cell in cells)]
    for library, name in libraries(results).items():
        for colour, quantity in enumerate(quantities):
            points = [(c.at, c.multiple) for c in cells if (c.library, c.quantity) == (library, quantity)]
            if points:
                style = {"color": f"C{colour}", "linestyle": STYLES[library], "marker": "o"}
                axes.plot(*zip(*points, strict=True), label=f"{quantity}, {name}", **style)
    axes.set(xscale="log", yscale="log", xlabel=series, ylabel=MULTIPLE)
    axes.set_xticks(ticks := sorted({cell.at for cell in cells}), [str(x) for x in ticks], minor=False)
    axes.xaxis.minorticks_off()
    _label(axes.yaxis)
    figure.legend(fontsize="small", loc="outside lower center", ncols=2, handlelength=4)
    return figure


def _label(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FormatStrFormatter("%g"))


def write(results: Results, folder: Path) -> None:
    """All tables and charts of costs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in {"details": details, "environment": environment}.items():
        (folder / f"benchmark_{name}.md").write_text(part(results))
    networks = [*dict.fromkeys(cell.network for cell in results.cells if cell.series is None)]
    if set(networks).issuperset(SUMMARY_NETWORKS):
        (folder / "benchmark_summary.md").write_text(summary(results))
    for network in [own for own in SUMMARY_NETWORKS if own in networks] or networks[:1]:
        cost_chart(results, network).savefig(folder / chart_name(f"cost {network}"))
    for series in series_of(results):
        series_chart(results, series).savefig(folder / chart_name(series))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what run.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder for the tables and charts")
    options = parser.parse_args()
    write(read(options.file), options.output)


if __name__ == "__main__":
    main()
