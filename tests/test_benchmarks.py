"""A measurement becomes a file of results, and the file becomes tables and charts."""

import importlib
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from time import monotonic

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
QUANTITIES = ["plain", "BatchGrad", "KFAC"]
ON_LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from /proc")


def script(name: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A run of a tiny network: one short round, and a series of one."""
    file = tmp_path_factory.mktemp("results") / "costs.json"
    options = ["--nets", "MLP 8-8-8-8", "--quantities", *QUANTITIES, "--libraries", "this package", "torch.func"]
    script("run.py", *options, "--series", "--rounds", "2", "--seconds", "0.01", "--output", str(file))
    return file


@pytest.fixture
def modules(monkeypatch) -> dict[str, object]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return {name: importlib.import_module(name) for name in ("report", "result_file", "subjects")}


@ON_LINUX
def test_a_run_with_a_device_and_a_limit_of_time_ends_in_time(tmp_path):
    """As on a GPU, with the CPU in its place."""
    start, file = monotonic(), tmp_path / "costs.json"
    options = ["--device", "cpu", "--nets", "MLP 8-8-8-8", "--quantities", *QUANTITIES, "--series"]
    options += ["--libraries", "this package", "--rounds", "1", "--seconds", "0.01", "--output", str(file)]
    script("run.py", *options, "--minutes", "5")
    whole = json.loads(file.read_text())
    assert [cell["quantity"] for cell in whole["cells"]] == QUANTITIES and not whole["notes"]
    assert whole["machine"]["accelerator"] is None
    script("run.py", *options, "--minutes", "0")
    stopped = json.loads(file.read_text())
    assert not stopped["cells"] and stopped["notes"] == ["Stopped after 0 minutes."]
    assert monotonic() - start < 60


@pytest.mark.slow
@ON_LINUX
def test_a_run_records_machine_versions_and_each_cell(measured):
    results = json.loads(measured.read_text())
    assert results["machine"]["cores"] >= 1 and results["machine"]["memory_gib"] > 0
    assert results["versions"].keys() == {"torch", "this package", "torch.func"}
    cells = {(cell["quantity"], cell["library"]): cell for cell in results["cells"]}
    expected = {(quantity, "this package") for quantity in QUANTITIES}
    assert cells.keys() == expected | {("plain", "torch.func"), ("BatchGrad", "torch.func")}
    for cell in cells.values():
        assert (cell["network"], cell["batch"]) == ("MLP 8-8-8-8", 32)
        low, high = cell["spread"]
        assert 0 < low <= cell["multiple"] <= high
        assert cell["peak_mib"] >= 0 and "error" not in cell


@pytest.mark.slow
@ON_LINUX
def test_tables_and_charts_show_what_a_run_measured(measured, tmp_path):
    script("report.py", str(measured), "--output", str(tmp_path))
    details = (tmp_path / "benchmark_details.md").read_text()
    assert "### MLP 8-8-8-8, 32 samples" in details
    assert "this package: × plain (MiB) | torch.func: × plain (MiB)" in details
    for cell in json.loads(measured.read_text())["cells"]:
        assert f"{cell['multiple']:.2f} ({cell['peak_mib']:.0f})" in details
    chart = ElementTree.parse(tmp_path / "cost_MLP_8-8-8-8.svg").getroot()
    assert chart.tag.endswith("svg")
    assert str(json.loads(measured.read_text())["date"]) in (tmp_path / "benchmark_environment.md").read_text()


def test_a_file_is_read_back_as_it_was_written(modules, tmp_path):
    result_file = modules["result_file"]
    measured = result_file.Cell("MLP", 128, "KFAC", "original", multiple=1.5, spread=[1.4, 1.7], peak_mib=3)
    refused = result_file.Cell("MLP", 128, "KFRA", "original", series="batch size", at=8, error="unsupported layer")
    results = result_file.begin({"torch": "2"}, threads=1, rounds=3, seconds=0.5)
    results.cells += [measured, refused]
    results.write(tmp_path / "results.json")
    assert result_file.read(tmp_path / "results.json") == results
    assert [cell.text for cell in results.cells] == ["1.50 (3)", "unsupported layer"]


def test_what_a_layer_takes_is_read_off_the_multiples(modules):
    cells = [
        modules["result_file"].Cell(f"{n} layers", 32, "KFAC", "this package", "number of layers", n, 3.0, n / 10)
        for n in (10, 100)
    ]
    assert "| `KFAC`, this package | 200 | 200 |" in modules["report"].layers(cells)


def test_networks_of_one_purpose_have_their_quantities(modules):
    subjects = modules["subjects"]
    assert {quantity for own in subjects.ONLY.values() for quantity in own} >= subjects.SPECIAL
    for net, quantities in subjects.ONLY.items():
        assert net in subjects.MAIN and {*quantities} <= subjects.QUANTITIES.keys()
        assert all(subjects.is_measured(net, quantity) for quantity in quantities)
    assert not any(subjects.is_measured("MLP", quantity) for quantity in subjects.SPECIAL)


def test_models_of_the_benchmarks_have_the_size_that_their_names_say(modules):
    subjects = modules["subjects"]
    linear = [p for p in subjects.gpt(linear_only=True).parameters() if p.requires_grad and p.dim() > 1]
    assert len(linear) == 17
    assert [type(module).__name__ for module in subjects.wide_resnet().modules()].count("Conv2d") == 16
    assert sum(p.numel() for p in subjects.wide_resnet().parameters()) == pytest.approx(2.7e6, rel=0.05)


@pytest.mark.parametrize("file", ["costs.json", "transformers.json", "growth.json"])
def test_stored_cells_are_of_known_networks_and_have_a_number_or_an_error(file, modules):
    results = modules["result_file"].read(BENCHMARKS / "results" / file)
    networks, quantities = modules["subjects"].NETWORKS, modules["subjects"].QUANTITIES
    for cell in results.cells:
        assert networks[cell.network].batch == cell.batch and cell.quantity in quantities
        assert (cell.multiple is None) == (cell.peak_mib is None) == (cell.error is not None)
    places = [(cell.network, cell.quantity, cell.library, cell.series, cell.at) for cell in results.cells]
    assert len(set(places)) == len(places)


def test_the_page_of_benchmarks_is_drawn_from_the_stored_results(modules, tmp_path):
    """It names each file that it includes, and its table has eight rows."""
    report, result_file = modules["report"], modules["result_file"]
    stored = BENCHMARKS / "results"
    results = result_file.read(stored / "costs.json")
    report.write(results, tmp_path)
    for name in ("transformers", "growth"):
        report.write(result_file.read(stored / f"{name}.json"), tmp_path / name)
    agreement = report.agreement(result_file.read(stored / "agreement.json", result_file.Difference))
    (tmp_path / "benchmark_agreement.md").write_text(agreement)
    page = (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text()
    named = {part.split()[0].rstrip(")") for part in page.split("generated/")[1:]}
    assert named and all((tmp_path / name).exists() for name in named)
    rows = [line for line in (tmp_path / "benchmark_summary.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 8 and "× plain" in rows[0] and "MiB" in rows[0]
    place = "3C3D", "BatchGrad", None
    first = [cell for cell in results.cells if (cell.network, cell.quantity, cell.series) == place]
    own = next(cell for cell in first if cell.library == "this package")
    fastest = min(cell.multiple for cell in first if cell is not own)
    assert f"| {own.multiple:.2f} | {own.peak_mib:.0f} | {fastest:.2f}, " in rows[2]
