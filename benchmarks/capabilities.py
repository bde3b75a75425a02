"""What this package and others can do with models as users write them: the comparison in README.md, cell by cell.

Each cell is a run, compared with a loop over samples by plain autograd in float64. Run as a script, it prints the
table; the others are in the environment that ``make bench`` makes.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PEERS = Path(__file__).parent / ".venv-peers" / "bin" / "python"
N = 3


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = (
            nn.Conv2d(1, 2, 3, padding=1),
            nn.Conv2d(2, 2, 3, padding=1),
            nn.Linear(2, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        return self.out((h + F.relu(self.second(h))).mean((2, 3)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Parameter(torch.rand(5, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x + self.table).mean(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


def convnet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))


def normalized() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


IMAGES, SEQUENCES = (1, 6, 6), (5, 4)
MODELS = {
    "a sequence of layers, convolutional": (convnet, IMAGES),
    "with group normalization": (normalized, IMAGES),
    "residual net, sums and ReLU as functions": (Residual, IMAGES),
    "a module called twice": (Twice, (4,)),
    "a parameter of its own, beside layers": (Table, SEQUENCES),
    "`nn.MultiheadAttention`": (Attention, SEQUENCES),
    "`nn.LSTM`": (Recurrent, SEQUENCES),
}


def individual_gradients(model: nn.Module, X: Tensor, y: Tensor) -> list[Tensor]:
    """By a loop."""
    rows = [
        torch.autograd.grad(F.cross_entropy(model(X[n : n + 1]), y[n : n + 1]) / N, model.parameters())
        for n in range(N)
    ]
    return [torch.stack(row) for row in zip(*rows, strict=True)]


def ggn_diagonal(model: nn.Module, X: Tensor, y: Tensor) -> list[Tensor]:
    """By explicit Jacobians."""
    diagonal = [torch.zeros_like(p) for p in model.parameters()]
    for x in X:
        output = model(x[None])[0]
        p = output.detach().softmax(0)
        root = torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())  # diag(p) - p p^T is its square
        for column in root.T:
            rows = torch.autograd.grad(output, model.parameters(), column, retain_graph=True)
            for total, row in zip(diagonal, rows, strict=True):
                total += row**2 / N
    return diagonal


TRUTH = {"individual gradients": individual_gradients, "GGN diagonal": ggn_diagonal}


def by_backpack(quantity: str, model: nn.Module, X: Tensor, y: Tensor, convert: bool) -> list[Tensor]:
    """This package and the original have the same interface."""
    from backpack import backpack, extend, extensions

    model = extend(model, use_converter=convert)
    lossfunc = extend(nn.CrossEntropyLoss())
    name, field = {
        "individual gradients": ("BatchGrad", "grad_batch"),
        "GGN diagonal": ("DiagGGNExact", "diag_ggn_exact"),
    }[quantity]
    with backpack(getattr(extensions, name)()):
        lossfunc(model(X), y).backward()
    return [getattr(p, field) for p in model.parameters()]


def by_func(model: nn.Module, X: Tensor, y: Tensor) -> list[Tensor]:
    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x[None],)), y[None]) / N

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return list(torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, X, y).values())


def by_opacus(model: nn.Module, X: Tensor, y: Tensor) -> list[Tensor]:
    from opacus import GradSampleModule

    model = GradSampleModule(model)  # scaled as gradients of the samples' own losses
    F.cross_entropy(model(X), y).backward()
    return [p.grad_sample / N for p in model.parameters()]


def attempts(implementation: str, quantity: str):
    """What to try, in words for the table."""
    if implementation in ("this package", "original"):
        yield "yes", lambda *problem: by_backpack(quantity, *problem, False)
        if implementation == "original":
            yield "with the converter", lambda *problem: by_backpack(quantity, *problem, True)
    elif quantity == "individual gradients":
        yield "yes", by_func if implementation == "torch.func" else by_opacus


def outcome(implementation: str, quantity: str, model_name: str) -> str:
    """What one cell says."""
    said = ""
    for word, attempt in attempts(implementation, quantity):
        torch.manual_seed(0)
        make, shape = MODELS[model_name]
        model, X, y = make().double(), torch.rand(N, *shape, dtype=torch.float64), torch.arange(N)
        truth = TRUTH[quantity](model, X, y)
        try:
            found = attempt(model, X, y)
        except Exception as error:
            print(f"{implementation}, {quantity}, {model_name}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
            said = said or "error"
            continue
        if len(found) == len(truth) and all(
            a.shape == b.shape and torch.allclose(a, b) for a, b in zip(found, truth, strict=True)
        ):
            return word
        print(f"{implementation}, {quantity}, {model_name}: wrong", file=sys.stderr)
        said = said or "wrong"
    return said


def ask(python: str, implementation: str) -> dict[str, dict[str, str]]:
    """All cells of one implementation, in a process of its own."""
    environment = dict(os.environ)
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)  # it may lead to this package, which has the original's name
    command = [python, __file__, implementation]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    if len(sys.argv) > 1:
        warnings.simplefilter("ignore")
        cells = {q: {m: outcome(sys.argv[1], q, m) for m in MODELS} for q in TRUTH}
        print(json.dumps(cells))
        return
    columns = {
        "this package": (sys.executable, "individual gradients"),
        "`torch.func`": (sys.executable, "individual gradients"),
        "Opacus": (str(PEERS), "individual gradients"),
        "original": (str(PEERS), "individual gradients"),
        "this package, GGN": (sys.executable, "GGN diagonal"),
        "original, GGN": (str(PEERS), "GGN diagonal"),
    }
    answers = {name: ask(python, name.partition(",")[0].strip("`")) for name, (python, _) in columns.items()}
    print("| model | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for model in MODELS:
        row = [answers[name][quantity][model] for name, (_, quantity) in columns.items()]
        print("| " + " | ".join([model, *row]) + " |")


if __name__ == "__main__":
    main()
