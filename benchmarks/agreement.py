"""Largest differences between the results of this package and those of the original, in float32, in one table; and of
Kronecker factors and EKFAC from those of curvlinops, in float64.

They compute every quantity that the other has, on networks that it supports, from the same parameters and data;
of sampled quantities, which draw in different ways, only the mean over many samples can be compared, so that they are
left to the tests. A cell shows the largest difference over all entries of all parameters, relative to the largest entry
of the parameter; of curvlinops, of the products of all parameters' blocks with ten vectors. Run it with the environment
of this package; the others' is made by ``make bench``'s rule.

    .venv/bin/python benchmarks/agreement.py
"""

import os
import subprocess
import sys
import tempfile
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
PEERS = HERE / ".venv-peers" / "bin" / "python"
QUANTITIES = [
    *("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"),
    *("DiagGGNExact", "BatchDiagGGNExact", "SqrtGGNExact"),
    *("KFLR", "KFRA", "HBP", "HBP hessian", "HBP pch-abs", "HBP pch-clip"),
]
HBP = "sum", "average", "E[J^T E(H) J]"


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.Sigmoid(), nn.Linear(16, 10))


def three_c_three_d() -> nn.Module:
    def pooled(*sizes: int, padding: int = 0) -> list[nn.Module]:
        return [nn.Conv2d(*sizes, padding=padding), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)]

    dense = [nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)]
    return nn.Sequential(*pooled(3, 16, 5), *pooled(16, 24, 3), *pooled(24, 32, 3, padding=1), nn.Flatten(), *dense)


def conv1d() -> nn.Module:
    layers = [nn.Conv1d(4, 8, 5, stride=2, padding=1), nn.Tanh(), nn.ConvTranspose1d(8, 6, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 17, 10))


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(50, 16), nn.Flatten(), nn.Linear(12 * 16, 10))


NETWORKS: dict[str, tuple[Any, tuple[int, ...], int | None, Any]] = {
    "MLP": (mlp, (8, 64), None, nn.CrossEntropyLoss),
    "MLP, squared error": (mlp, (8, 64), None, nn.MSELoss),
    "3C3D": (three_c_three_d, (8, 3, 32, 32), None, nn.CrossEntropyLoss),
    "Conv1d": (conv1d, (8, 4, 32), None, nn.CrossEntropyLoss),
    "Embedding": (embedding, (8, 12), 50, nn.CrossEntropyLoss),
}


def results() -> dict[str, list[Tensor] | str]:
    """Of the package in this environment; the message where it fails."""
    from backpack import backpack, extend, extensions

    found: dict[str, list[Tensor] | str] = {}
    for net, (build, shape, words, loss) in NETWORKS.items():
        torch.manual_seed(0)
        model, lossfunc = extend(build()), extend(loss())
        X = torch.randn(shape) if words is None else torch.randint(words, shape)
        y = torch.randint(10, shape[:1]) if loss is nn.CrossEntropyLoss else torch.randn(shape[0], 10)
        for quantity in QUANTITIES:
            if net == "3C3D" and quantity.startswith(("KFRA", "HBP")):  # matrices of 12,544 rows
                found[f"{net}/{quantity}"] = "left out"
                continue
            name, _, curvature = quantity.partition(" ")
            extension = getattr(extensions, name)(*((curvature or "ggn", *HBP) if name == "HBP" else ()))
            try:
                with backpack(extension):
                    lossfunc(model(X), y).backward()
                values = [getattr(p, extension.savefield) for p in model.parameters()]
                flat = [value if isinstance(value, list) else [value] for value in values]
                found[f"{net}/{quantity}"] = [tensor.detach() for tensors in flat for tensor in tensors]
            except Exception as error:
                found[f"{net}/{quantity}"] = f"{type(error).__name__}"
    return found


BLOCKS = [(kind, *rest) for kind in ("KFAC", "EKFAC") for rest in product(("exact", "empirical"), ("expand", "reduce"))]


class Sequence(nn.Module):
    """Weights that positions share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu().mean(1))


BLOCK_NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "MLP": (mlp, (80, 64)),
    "CNN": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)), (80, 3, 8, 8)),
    "Sequence": (Sequence, (80, 5, 8)),
}


def block_products(peer: bool) -> dict[str, list[Tensor] | str]:
    """Products of the weights' Kronecker-factored blocks with vectors; by curvlinops (``peer``), or by this package.

    So many samples that no factor is singular: a basis of its kernel is arbitrary. Of biases that positions share,
    ``"expand"`` is an approximation there, and the exact block here.
    """
    found: dict[str, list[Tensor] | str] = {}
    for net, (build, shape) in BLOCK_NETWORKS.items():
        torch.manual_seed(0)
        model, X, y = build().double(), torch.randn(shape).double(), torch.randint(10, shape[:1])
        parameters = [p for p in model.parameters() if p.requires_grad]
        V = torch.randn(sum(p.numel() for p in parameters), 10).double()
        for kind, fisher, approx in BLOCKS:
            way = (of_curvlinops if peer else of_factors)(model, X, y, kind, fisher, approx)
            try:
                products = way(V).split([p.numel() for p in parameters])
                found[f"{net}/{kind} {fisher} {approx}"] = list(products[::2])
            except Exception as error:
                found[f"{net}/{kind} {fisher} {approx}"] = type(error).__name__
    return found


def of_curvlinops(model: nn.Module, X: Tensor, y: Tensor, kind: str, fisher: str, approx: str) -> Any:
    import curvlinops

    operator = {"KFAC": curvlinops.KFACLinearOperator, "EKFAC": curvlinops.EKFACLinearOperator}[kind]
    options = {"fisher_type": {"exact": "type-2", "empirical": "empirical"}[fisher], "kfac_approx": approx}
    return operator(model, nn.CrossEntropyLoss(), list(model.parameters()), [(X, y)], **options).__matmul__


def of_factors(model: nn.Module, X: Tensor, y: Tensor, kind: str, fisher: str, approx: str) -> Any:
    from backpack import backpack, extend, extensions
    from backpack.utils.kroneckers import apply_kfac_mat_prod

    extension = getattr(extensions, kind)(fisher=fisher, approx=approx)
    with backpack(extension):
        extend(nn.CrossEntropyLoss())(extend(model)(X), y).backward()

    def multiply(V: Tensor) -> Tensor:
        pieces = []
        for p, v in zip(model.parameters(), V.split([p.numel() for p in model.parameters()]), strict=True):
            result = getattr(p, extension.savefield)
            pieces.append(apply_kfac_mat_prod(result, v) if kind == "KFAC" else result.dense() @ v)
        return torch.cat(pieces).detach()

    return multiply


def difference(ours: list[Tensor] | str, theirs: list[Tensor] | str) -> float | str:
    """The largest relative one; of roots, between their Gram matrices, which alone are determined."""
    if isinstance(ours, str) or isinstance(theirs, str):
        return f"{ours if isinstance(ours, str) else 'ok'} / {theirs if isinstance(theirs, str) else 'ok'}"
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def gram(roots: list[Tensor] | str) -> list[Tensor] | str:
    """``V V^T`` of each parameter's root ``[C, N, *p]``."""
    return roots if isinstance(roots, str) else [(v := r.flatten(2).flatten(0, 1)).T @ v for r in roots]


def run(python: str, environment: dict[str, str]) -> dict[str, list[Tensor] | str]:
    """``results()`` in another environment."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.pt"
        subprocess.run([python, __file__, str(file)], check=True, env=environment, cwd=folder)
        return torch.load(file)


def main() -> None:
    if len(sys.argv) > 1:
        warnings.simplefilter("ignore")
        torch.save({**results(), **block_products(peer=True)}, sys.argv[1])
        return
    if not PEERS.exists():
        raise SystemExit(f"{PEERS} is missing: `make {PEERS.parent.parent.relative_to(HERE.parent)}/.made` makes it.")
    warnings.simplefilter("ignore")
    ours = {**results(), **block_products(peer=False)}
    theirs = run(str(PEERS), {name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    print("| quantity | " + " | ".join(NETWORKS) + " |", "|---" * (len(NETWORKS) + 1) + "|", sep="\n")
    for quantity in QUANTITIES:
        cells = []
        for net in NETWORKS:
            a, b = ours[f"{net}/{quantity}"], theirs[f"{net}/{quantity}"]
            value = difference(gram(a), gram(b)) if quantity.startswith("Sqrt") else difference(a, b)
            cells.append(value if isinstance(value, str) else f"{value:.1e}")
        print(f"| {quantity} | " + " | ".join(cells) + " |")

    header = ["beside curvlinops", *BLOCK_NETWORKS]
    print("\n| " + " | ".join(header) + " |", "|---" * len(header) + "|", sep="\n")
    for block in BLOCKS:
        names = [f"{net}/{' '.join(block)}" for net in BLOCK_NETWORKS]
        values = [difference(ours[name], theirs[name]) for name in names]
        cells = [value if isinstance(value, str) else f"{value:.1e}" for value in values]
        print(f"| {' '.join(block)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
