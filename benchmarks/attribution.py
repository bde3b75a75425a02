"""Scores of training samples for test samples, beside kronfluence and dattri: the same numbers? At what cost?

    python benchmarks/attribution.py

The score of a pair is ``g_test^T C g_train``, with gradients of the samples' own losses; larger is more helpful.

- ``gradients``: without ``C``.
- ``EKFAC``: ``C`` is the inverse, damped, of the empirical Fisher matrix, approximated by EKFAC.
- ``Hessian``: ``C`` is the inverse, damped, of the Hessian of the mean loss, as a matrix.
- ``projections``: the first, by random projections to 512 entries. Each library draws its own.

What makes the definitions equal:

- Scores of this package carry a factor ``1 / N``, since the loss is a mean over ``N`` samples. kronfluence and dattri
  leave it out, and here it is taken out. kronfluence has test samples as rows.
- kronfluence takes a loss that is summed, and curvature that is a mean over samples. The curvature of a mean is the
  same, and so is the damping.
- kronfluence takes a layer's bias for a further column of the weight, this package treats it on its own. The models
  have no biases.
- The Fisher matrix is the empirical one. For the other, each library draws labels in its own way.

dattri's EKFAC is left out. It approaches the same scores for large damping only, and its documentation does not define
it closely enough to say why.

Differences are taken in ``float64``, times and memory in ``float32``. Each measurement is a process of its own, which
computes the scores twice and measures the second time: factors, scores, and what the library writes to disk. Libraries
take turns in each round.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from peers import HERE, OWN, PEERS, environment, require
from result_file import begin
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from worker import reset_peak, status, timed

US = "this package"
LIBRARIES = {US: OWN, "kronfluence": PEERS, "dattri": PEERS}
TRAIN, TEST, BATCH, DIM, DAMPING = 1500, 64, 250, 512, 1e-2
SIZES = {"MLP": (64, 256, 128, 10), "small MLP": (64, 8, 10)}
QUANTITIES = {"gradients": "MLP", "EKFAC": "MLP", "projections": "MLP", "Hessian": "small MLP"}
"""Name to network."""


@dataclass(frozen=True)
class Record:
    """One quantity by one library; or an error in words."""

    network: str
    train: int
    test: int
    quantity: str
    library: str
    seconds: float | None = None
    """Median over the rounds."""
    spread: list[float] | None = None
    """Lower and upper quartile."""
    peak_mib: float | None = None
    """How far it raises the process's memory: median over the rounds."""
    difference: float | None = None
    """Of the scores from this package's: the largest, relative to the largest score. Of projections: from the products
    without a projection, in root mean squares."""
    error: str | None = None


class Subject(NamedTuple):
    """A trained classifier of scikit-learn's digits, and its data."""

    model: nn.Sequential
    train: TensorDataset
    test: TensorDataset

    @property
    def batches(self) -> DataLoader:
        return DataLoader(self.train, BATCH)


def build(network: str, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    sizes = SIZES[network]
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def write_subject(network: str, folder: Path) -> None:
    """Train, and save what all libraries read."""
    from sklearn.datasets import load_digits

    data = load_digits()
    X, y = torch.tensor(data.data) / 8 - 1, torch.tensor(data.target)
    model = build(network, torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[:TRAIN]), y[:TRAIN]).backward()
        optimizer.step()
    torch.save((model.state_dict(), X[: TRAIN + TEST], y[: TRAIN + TEST]), folder / f"{network}.pt")


def read_subject(network: str, folder: Path, dtype: torch.dtype) -> Subject:
    state, X, y = torch.load(folder / f"{network}.pt")
    model, X = build(network, dtype), X.to(dtype)
    model.load_state_dict(state)
    return Subject(model, TensorDataset(X[:TRAIN], y[:TRAIN]), TensorDataset(X[TRAIN:], y[TRAIN:]))


def of_this_package(quantity: str, subject: Subject, folder: str) -> Tensor:
    from backpack import accumulate
    from backpack.extensions import EKFAC, BatchDotGrad, BatchGrad, ProjectedGrad

    model, lossfunc, tests = subject.model, nn.CrossEntropyLoss(), [subject.test.tensors]
    if quantity == "projections":
        features = ProjectedGrad(DIM, across="model")
        found = [accumulate(model, lossfunc, data, features)["grad_projected"] for data in (subject.batches, tests)]
        train, test = (next(iter(own.values())) for own in found)
        return TRAIN * TEST * train @ test.T
    directions = {n: TEST * g for n, g in accumulate(model, lossfunc, tests, BatchGrad())["grad_batch"].items()}
    if quantity == "EKFAC":
        curvature = accumulate(model, lossfunc, subject.batches, EKFAC(fisher="empirical"))["ekfac"]
        for name, g in directions.items():
            directions[name] = curvature[name].apply_inverse(g.flatten(1).T, DAMPING).T.reshape(g.shape)
    if quantity == "Hessian":
        rows = torch.cat([g.flatten(1) for g in directions.values()], 1)
        matrix = hessian(subject)
        solved = torch.linalg.solve(matrix + DAMPING * torch.eye(len(matrix)).to(matrix), rows.T).T
        parts = solved.split([g[0].numel() for g in directions.values()], 1)
        directions = {name: part.reshape(g.shape) for (name, g), part in zip(directions.items(), parts, strict=True)}
    dots = accumulate(model, lossfunc, subject.batches, BatchDotGrad(against=directions))["batch_dot"]
    return TRAIN * sum(dots.values())


def hessian(subject: Subject) -> Tensor:
    """Of the mean loss, column by column."""
    from backpack.hessianfree import hessian_vector_product

    parameters = list(subject.model.parameters())
    X, y = subject.train.tensors
    loss = nn.functional.cross_entropy(subject.model(X), y)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    sizes, columns = [p.numel() for p in parameters], []
    for unit in torch.eye(sum(sizes), dtype=X.dtype):
        vectors = [part.view_as(p) for part, p in zip(unit.split(sizes), parameters, strict=True)]
        products = hessian_vector_product(loss, parameters, vectors, gradients)
        columns.append(torch.cat([product.flatten() for product in products]))
    return torch.stack(columns, 1)


def of_kronfluence(quantity: str, subject: Subject, folder: str) -> Tensor:
    from kronfluence import FactorArguments, ScoreArguments, Task
    from kronfluence.analyzer import Analyzer, prepare_model

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    dtype = subject.train.tensors[0].dtype
    names = ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
    factors = FactorArguments(
        {"gradients": "identity", "EKFAC": "ekfac"}[quantity],
        use_empirical_fisher=True,
        **{f"{name}_dtype": dtype for name in names},
    )
    names = ("per_sample_gradient", "precondition", "score")
    scores = ScoreArguments(damping_factor=DAMPING, **{f"{name}_dtype": dtype for name in names})
    task = Classification()
    model = prepare_model(subject.model, task)
    analyzer = Analyzer("scores", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
    analyzer.fit_all_factors("f", subject.train, BATCH, factor_args=factors, overwrite_output_dir=True)
    analyzer.compute_pairwise_scores(
        "s", "f", subject.test, subject.train, TEST, BATCH, score_args=scores, overwrite_output_dir=True
    )
    return analyzer.load_pairwise_scores("s")["all_modules"].T


def of_dattri(quantity: str, subject: Subject, folder: str) -> Tensor:
    from dattri.algorithm import IFAttributorExplicit, TracInAttributor
    from dattri.algorithm.base import BaseInnerProductAttributor
    from dattri.task import AttributionTask

    def loss(parameters: Any, batch: Any) -> Tensor:
        output = torch.func.functional_call(subject.model, parameters, batch[0])
        return nn.functional.cross_entropy(output, batch[1])

    task = AttributionTask(loss_func=loss, model=subject.model, checkpoints=subject.model.state_dict())
    test, whole = DataLoader(subject.test, TEST), DataLoader(subject.train, TRAIN)
    if quantity == "projections":
        attributor = TracInAttributor(task, torch.ones(1), normalized_grad=False, projector_kwargs={"proj_dim": DIM})
    elif quantity == "gradients":
        attributor = BaseInnerProductAttributor(task)
        attributor.cache(whole)
    else:
        attributor = IFAttributorExplicit(task, regularization=DAMPING)
        attributor.cache(whole)
    return attributor.attribute(subject.batches, test).detach()


SCORES: dict[str, Callable[[str, Subject, str], Tensor]] = {
    US: of_this_package,
    "kronfluence": of_kronfluence,
    "dattri": of_dattri,
}
LACKING = {"kronfluence": ("Hessian", "projections"), "dattri": ("EKFAC",)}


def measure(quantity: str, library: str, folder: Path, dtype: torch.dtype) -> None:
    """In the process that measures: print seconds and bytes, and leave the scores in a file."""
    network = QUANTITIES[quantity]

    def scores() -> Tensor:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            return SCORES[library](quantity, read_subject(network, folder, dtype), own)

    torch.save(scores(), folder / "scores.pt")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the first time left would be used again, uncounted
    before = reset_peak()
    seconds = timed(scores)
    versions = {} if library == US else {library: version(library)}
    print(json.dumps({"seconds": seconds, "bytes": status("VmHWM") - before, "versions": versions}))


def measured(quantity: str, library: str, folder: Path, dtype: str, python: str) -> dict[str, Any]:
    """What such a process prints, and its scores; or an error."""
    command = [python, __file__, "--measure", quantity, library, str(folder), dtype]
    done = subprocess.run(command, env=environment(python), capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "scores": torch.load(folder / "scores.pt").double()}


def record(quantity: str, library: str, exact: dict[str, Any], rounds: list[dict[str, Any]], truth: Tensor) -> Record:
    """``exact``: in ``float64``. ``truth``: what its scores are compared with."""
    about = QUANTITIES[quantity], TRAIN, TEST, quantity, library
    error = next((found["error"] for found in (exact, *rounds) if "error" in found), None)
    if error is not None:
        return Record(*about, error=error)
    gap = exact["scores"] - truth
    difference = gap.norm() / truth.norm() if quantity == "projections" else gap.abs().max() / truth.abs().max()
    seconds = [found["seconds"] for found in rounds]
    lower, _, upper = quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    peak = median(found["bytes"] for found in rounds) / 2**20
    spread = [round(lower, 4), round(upper, 4)]
    return Record(*about, round(median(seconds), 4), spread, round(peak, 1), float(f"{float(difference):.2e}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quantities", nargs="+", default=[*QUANTITIES], choices=QUANTITIES)
    parser.add_argument("--libraries", nargs="+", default=[*LIBRARIES], choices=LIBRARIES)
    parser.add_argument("--peers", default=PEERS, help="the Python that has kronfluence and dattri")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "attribution.json")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        quantity, library, folder, dtype = arguments.measure
        return measure(quantity, library, Path(folder), getattr(torch, dtype))
    chosen = [library for library in LIBRARIES if library in arguments.libraries or library == US]
    if chosen != [US]:
        require(arguments.peers)
    pythons = {library: OWN if python == OWN else arguments.peers for library, python in LIBRARIES.items()}
    versions, cells = {"torch": torch.__version__}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for network in SIZES:
            write_subject(network, folder)
        for quantity in arguments.quantities:
            offering = [library for library in chosen if quantity not in LACKING.get(library, ())]
            exact = {own: measured(quantity, own, folder, "float64", pythons[own]) for own in offering}
            unprojected = {"projections": "gradients"}.get(quantity, quantity)
            truth = of_this_package(unprojected, read_subject(QUANTITIES[quantity], folder, torch.float64), name)
            rounds: dict[str, list[dict[str, Any]]] = {own: [] for own in offering}
            for number in range(arguments.rounds):
                for own in offering if number % 2 else reversed(offering):
                    rounds[own].append(measured(quantity, own, folder, "float32", pythons[own]))
            for own in offering:
                cells.append(record(quantity, own, exact[own], rounds[own], truth))
                versions.update(exact[own].get("versions", {}))
                print(cells[-1])
    method = {"rounds": arguments.rounds, "damping": DAMPING, "dim": DIM, "batch": BATCH}
    found = begin(versions, torch.get_num_threads(), **method)
    found.cells += cells
    found.write(arguments.output)


if __name__ == "__main__":
    sys.exit(main())
