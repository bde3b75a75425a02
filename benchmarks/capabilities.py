"""What can each library do with models as users write them? The comparison in README.md, cell by cell.

    python benchmarks/capabilities.py

Each cell is a run, compared with a loop over samples by plain autograd in float64. The script prints the table.
"""

import json
import sys
import warnings

import torch
import torch.nn.functional as F
from peers import LIBRARIES, output_of
from report import table
from steps import LIBRARIES as MAKERS
from torch import Tensor, nn

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
EXTENSIONS = {
    "individual gradients": ("BatchGrad", "grad_batch"),
    "GGN diagonal": ("DiagGGNExact", "diag_ggn_exact"),
}
"""Name in the benchmarks, and the attribute that BackPACK leaves."""


def results(library: str, quantity: str, model: nn.Module, X: Tensor, y: Tensor, **options: bool) -> list[Tensor]:
    """By one step of the benchmarks."""
    extension, field = EXTENSIONS[quantity]
    returned = MAKERS[library][0](model, X, y, extension, **options)()
    if library == "torch.func":
        return returned
    return [getattr(p, "grad_sample" if library == "Opacus" else field) for p in model.parameters()]


def outcome(library: str, quantity: str, model_name: str) -> str:
    """What one cell says: the first attempt that is right, or else how the first one fails."""
    said = ""
    attempts = {"yes": {}, "with the converter": {"use_converter": True}} if library == "original" else {"yes": {}}
    for word, options in attempts.items():
        torch.manual_seed(0)
        make, shape = MODELS[model_name]
        model, X, y = make().double(), torch.rand(N, *shape, dtype=torch.float64), torch.arange(N)
        truth = TRUTH[quantity](model, X, y)
        try:
            found = results(library, quantity, model, X, y, **options)
        except Exception as error:
            print(f"{library}, {quantity}, {model_name}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
            said = said or "error"
            continue
        if len(found) == len(truth) and all(
            a.shape == b.shape and torch.allclose(a, b) for a, b in zip(found, truth, strict=True)
        ):
            return word
        print(f"{library}, {quantity}, {model_name}: wrong", file=sys.stderr)
        said = said or "wrong"
    return said


def main() -> None:
    if len(sys.argv) > 1:  # all cells of one library, in its environment
        warnings.simplefilter("ignore")
        print(json.dumps({q: {m: outcome(sys.argv[1], q, m) for m in MODELS} for q in TRUTH}))
        return
    answers = {
        name: json.loads(output_of(LIBRARIES[name], __file__, name))
        for name in ("this package", "original", "torch.func", "Opacus")
    }
    columns = [(name, "individual gradients") for name in answers]
    columns += [(name, "GGN diagonal") for name in ("this package", "original")]
    rows = [[model, *(answers[name][quantity][model] for name, quantity in columns)] for model in MODELS]
    print(table(["model", *(f"{name}, {quantity}" for name, quantity in columns)], rows))


if __name__ == "__main__":
    main()
