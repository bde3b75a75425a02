"""Do other libraries compute the same numbers? The largest differences, as a file of results.

    python benchmarks/agreement.py

The original computes, in ``float32``, every quantity that both have, from the same parameters and data. Sampled
quantities are left to the tests: the libraries draw in different ways, so only means over many samples could be
compared. curvlinops computes Kronecker factors and EKFAC, in ``float64``. A record has the largest difference over all
entries of all parameters, relative to the largest entry of the parameter. Of curvlinops, it compares products of the
weights' blocks with ten vectors. The steps of Opacus, ``torch.func`` and kronfluence that are timed are compared too.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import agreement_of_steps
import torch
from peers import HERE, PEERS, output_of
from result_file import Difference, begin, in_words
from subjects import Positions, mlp, three_c_three_d
from torch import Tensor, nn

QUANTITIES = [
    *("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"),
    *("DiagGGNExact", "BatchDiagGGNExact", "SqrtGGNExact"),
    *("KFLR", "KFRA", "HBP", "HBP hessian", "HBP pch-abs", "HBP pch-clip"),
]
DISTRIBUTIONS = {
    **{"original": "backpack-for-pytorch", "curvlinops": "curvlinops-for-pytorch"},
    **{"Opacus": "opacus", "Opacus, ghost clipping": "opacus", "kronfluence": "kronfluence"},
}
HBP = "sum", "average", "E[J^T E(H) J]"
Found = dict[tuple[str, str], list[Tensor] | str]
"""Network and quantity to the result of each parameter; or an error in words."""


def small_mlp() -> nn.Module:
    return mlp(last=nn.Sigmoid, inputs=64, hidden=(32, 16))


def small_three_c_three_d() -> nn.Module:
    return three_c_three_d(channels=(16, 24, 32), hidden=(64, 32))


def conv1d() -> nn.Module:
    layers = [nn.Conv1d(4, 8, 5, stride=2, padding=1), nn.Tanh(), nn.ConvTranspose1d(8, 6, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 17, 10))


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(50, 16), nn.Flatten(), nn.Linear(12 * 16, 10))


NETWORKS: dict[str, tuple[Any, tuple[int, ...], int | None, Any]] = {
    "MLP": (small_mlp, (8, 64), None, nn.CrossEntropyLoss),
    "MLP, squared error": (small_mlp, (8, 64), None, nn.MSELoss),
    "3C3D": (small_three_c_three_d, (8, 3, 32, 32), None, nn.CrossEntropyLoss),
    "Conv1d": (conv1d, (8, 4, 32), None, nn.CrossEntropyLoss),
    "Embedding": (embedding, (8, 12), 50, nn.CrossEntropyLoss),
}


def results() -> Found:
    """Of the package in this environment."""
    from backpack import backpack, extend, extensions

    found: Found = {}
    for net, (build, shape, words, loss) in NETWORKS.items():
        torch.manual_seed(0)
        model, lossfunc = extend(build()), extend(loss())
        X = torch.randn(shape) if words is None else torch.randint(words, shape)
        y = torch.randint(10, shape[:1]) if loss is nn.CrossEntropyLoss else torch.randn(shape[0], 10)
        for quantity in QUANTITIES:
            if net == "3C3D" and quantity.startswith(("KFRA", "HBP")):  # matrices of 12,544 rows
                found[net, quantity] = "left out, too slow"
                continue
            name, _, curvature = quantity.partition(" ")
            extension = getattr(extensions, name)(*((curvature or "ggn", *HBP) if name == "HBP" else ()))
            try:
                with backpack(extension):
                    lossfunc(model(X), y).backward()
                values = [getattr(p, extension.savefield) for p in model.parameters()]
                flat = [value if isinstance(value, list) else [value] for value in values]
                found[net, quantity] = [tensor.detach() for tensors in flat for tensor in tensors]
            except Exception as error:
                found[net, quantity] = in_words(type(error).__name__, str(error))
    return found


BLOCKS = [*product(("KFAC", "EKFAC"), ("exact", "empirical"), ("expand", "reduce"))]

BLOCK_NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (small_mlp, (80, 64)),
    "CNN": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)), (80, 3, 8, 8)),
    "sequence": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Positions(), nn.Linear(16, 10)), (80, 5, 8)),
}


def block_products(peer: bool) -> Found:
    """Products of the weights' Kronecker-factored blocks with vectors; by curvlinops (``peer``), or by this package.

    There are so many samples that no factor is singular, for a basis of its kernel would be arbitrary. Biases that
    positions share are left out: ``"expand"`` is an approximation of their blocks there, and exact here.
    """
    found: Found = {}
    for net, (build, shape) in BLOCK_NETWORKS.items():
        torch.manual_seed(0)
        model, X, y = build().double(), torch.randn(shape).double(), torch.randint(10, shape[:1])
        sizes = [p.numel() for p in model.parameters()]
        V = torch.randn(sum(sizes), 10).double()
        for block in BLOCKS:
            try:
                multiply = (of_curvlinops if peer else of_factors)(model, X, y, *block)
                found[net, " ".join(block)] = list(multiply(V).split(sizes)[::2])
            except Exception as error:
                found[net, " ".join(block)] = in_words(type(error).__name__, str(error))
    return found


def of_curvlinops(model: nn.Module, X: Tensor, y: Tensor, kind: str, fisher: str, approx: str) -> Any:
    import curvlinops

    operator = {"KFAC": curvlinops.KFACLinearOperator, "EKFAC": curvlinops.EKFACLinearOperator}[kind]
    options = {"fisher_type": {"exact": "type-2", "empirical": "empirical"}[fisher], "kfac_approx": approx}
    trained = [p for p in model.parameters() if p.requires_grad]
    return operator(model, nn.CrossEntropyLoss(), trained, [(X, y)], **options).__matmul__


def of_factors(model: nn.Module, X: Tensor, y: Tensor, kind: str, fisher: str, approx: str) -> Any:
    from backpack import backpack, extend, extensions
    from backpack.utils.kroneckers import apply_kfac_mat_prod

    extension = getattr(extensions, kind)(fisher=fisher, approx=approx)
    with backpack(extension):
        extend(nn.CrossEntropyLoss())(extend(model)(X), y).backward()

    def multiply(V: Tensor) -> Tensor:
        pieces = []
        trained = [p for p in model.parameters() if p.requires_grad]
        for p, v in zip(trained, V.split([p.numel() for p in trained]), strict=True):
            result = getattr(p, extension.savefield)
            pieces.append(apply_kfac_mat_prod(result, v) if kind == "KFAC" else result.dense() @ v)
        return torch.cat(pieces).detach()

    return multiply


def difference(library: str, ours: list[Tensor] | str, theirs: list[Tensor] | str) -> dict[str, Any]:
    """The largest relative one; or why there is none."""
    if isinstance(ours, str) or isinstance(theirs, str):
        if ours == theirs:
            return {"error": ours}
        who, words = ("this package", ours) if isinstance(ours, str) else (library, theirs)
        return {"error": f"{who}: {words}"}
    return {"difference": max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))}


def gram(roots: list[Tensor] | str) -> list[Tensor] | str:
    """``V V^T`` of each parameter's root ``[C, N, *p]``: roots themselves are not determined."""
    return roots if isinstance(roots, str) else [(v := r.flatten(2).flatten(0, 1)).T @ v for r in roots]


def differences(ours: Found, theirs: Found) -> Iterator[Difference]:
    """A record for each network and quantity."""
    for net, quantity in ours:
        library, networks = ("original", NETWORKS) if quantity in QUANTITIES else ("curvlinops", BLOCK_NETWORKS)
        pair = [found[net, quantity] for found in (ours, theirs)]
        pair = [*map(gram, pair)] if quantity.startswith("Sqrt") else pair
        yield Difference(net, networks[net][1][0], quantity, library, **difference(library, *pair))


def main() -> None:
    warnings.simplefilter("ignore")
    if len(sys.argv) > 1:  # in the peers' environment
        versions = {name: version(of) for name, of in DISTRIBUTIONS.items()}
        torch.save(({**results(), **block_products(peer=True)}, agreement_of_steps.of_peers(), versions), sys.argv[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.pt"
        output_of(PEERS, __file__, str(file))
        theirs, steps, versions = torch.load(file)
    ours = {**results(), **block_products(peer=False)}
    found = begin({"torch": torch.__version__, **versions}, torch.get_num_threads())
    found.cells += [*differences(ours, theirs), *agreement_of_steps.differences(steps, difference)]
    found.write(HERE / "results" / "agreement.json")


if __name__ == "__main__":
    main()
