"""The scores that the benchmark of data attribution compares are what it says they are, by plain autograd."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from truths import close

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def attribution():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.setattr(sys, "argv", ["attribution.py"])
        yield importlib.import_module("attribution")


@pytest.fixture
def subject(attribution, tmp_path, monkeypatch):
    monkeypatch.setattr(attribution, "TRAIN", 30)
    monkeypatch.setattr(attribution, "TEST", 4)
    monkeypatch.setattr(attribution, "BATCH", 12)
    monkeypatch.setitem(attribution.SIZES, "small MLP", (64, 3, 10))
    attribution.write_subject("small MLP", tmp_path)
    return attribution.read_subject("small MLP", tmp_path, torch.float64)


def gradients(subject, data):
    parameters = list(subject.model.parameters())
    rows = []
    for x, y in zip(*data.tensors, strict=True):
        loss = cross_entropy(subject.model(x[None]), y[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


def matrices(subject):
    """The Hessian of the mean loss, and EKFAC of the empirical Fisher matrix, both dense."""
    parameters = dict(subject.model.named_parameters())
    sizes = [p.numel() for p in parameters.values()]
    X, y = subject.train.tensors

    def loss(flat):
        parts = [part.view_as(p) for part, p in zip(flat.split(sizes), parameters.values(), strict=True)]
        return cross_entropy(torch.func.functional_call(subject.model, dict(zip(parameters, parts, strict=True)), X), y)

    point = torch.cat([p.detach().flatten() for p in parameters.values()])
    hessian = torch.autograd.functional.hessian(loss, point)

    first, last = parameters.values()
    hidden = (X @ first.T).tanh()
    error = (hidden @ last.T).softmax(1) - torch.eye(10).to(X)[y]
    below = error @ last * (1 - hidden**2)
    rows = gradients(subject, subject.train).split(sizes, 1)
    blocks = []
    for own, inputs, cotangents in zip(rows, (X, hidden), (below, error), strict=True):
        bases = [torch.linalg.eigh(values.T @ values).eigenvectors for values in (cotangents, inputs)]
        basis = torch.kron(*bases)
        blocks.append(basis * (own @ basis).square().mean(0) @ basis.T)
    return {"Hessian": hessian, "EKFAC": torch.block_diag(*blocks).detach()}


@pytest.mark.parametrize("quantity", ["gradients", "Hessian", "EKFAC"])
def test_scores_are_products_of_gradients_with_an_inverse_matrix_between_them(quantity, attribution, subject):
    train, test = gradients(subject, subject.train), gradients(subject, subject.test)
    if quantity != "gradients":
        matrix = matrices(subject)[quantity]
        test = torch.linalg.solve(matrix + attribution.DAMPING * torch.eye(len(matrix)).to(matrix), test.T).T
    assert close(attribution.of_this_package(quantity, subject, ""), train @ test.T)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from /proc")
def test_a_run_writes_times_memory_and_differences(tmp_path):
    file = tmp_path / "attribution.json"
    options = ["--libraries", "this package", "--quantities", "EKFAC", "projections", "--rounds", "2"]
    command = [sys.executable, str(BENCHMARKS / "attribution.py"), *options, "--output", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    records = {record["quantity"]: record for record in json.loads(file.read_text())["cells"]}
    assert records.keys() == {"EKFAC", "projections"}
    for record in records.values():
        low, high = record["spread"]
        assert low <= record["seconds"] <= high and "error" not in record
    assert records["EKFAC"]["difference"] < 1e-9 and 0 < records["projections"]["difference"] < 1
