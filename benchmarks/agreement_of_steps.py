"""Do the very steps that are timed compute the same? On smaller networks of the same kinds, in ``float64``.

``agreement.py`` calls this in both environments.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from result_file import Difference, in_words
from steps import LIBRARIES
from subjects import ALONE, EXPAND, OVER_DATA, encoder, gpt, wide_resnet
from torch import Tensor, nn

Found = dict[tuple[str, str, str], list[Tensor] | str]
"""Network, quantity and library to the result of each parameter; or an error in words."""

OF_SAMPLES = ["BatchL2Grad" + ALONE, "ClippedGrad" + ALONE]
PEERS_OF_SAMPLES = ["Opacus", "Opacus, ghost clipping"]


def _words(shape: tuple[int, ...], classes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.randint(20, shape), torch.randint(10, classes)


def _without_biases() -> nn.Module:
    """kronfluence takes a weight and its bias as one matrix."""
    layers = [nn.Linear(12, 9, bias=False), nn.Sigmoid(), nn.Linear(9, 10, bias=False)]
    return nn.Sequential(*layers)


SUBJECTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "encoder": (lambda: encoder(2, 16, 20), lambda: _words((4, 6), (4,))),
    "WRN": (lambda: wide_resnet(1, 1, 4), lambda: (torch.randn(4, 3, 8, 8), torch.randint(10, (4,)))),
    "GPT": (lambda: gpt(1, 8, 20, 6, linear_only=True), lambda: _words((60, 6), (60, 6))),
    "bias-free MLP": (_without_biases, lambda: (torch.randn(60, 12), torch.randint(10, (60,)))),
}


def _result(library: str, net: str, quantity: str, **options: bool) -> Any:
    torch.manual_seed(0)
    build, data = SUBJECTS[net]
    X, y = data()
    return LIBRARIES[library][0](build().double(), X.double() if X.is_floating_point() else X, y, quantity, **options)()


def _attempt(found: Found, library: str, net: str, quantity: str, compute: Callable[[], list[Tensor]]) -> None:
    try:
        found[net, quantity, library] = [tensor.detach() for tensor in compute()]
    except Exception as error:
        found[net, quantity, library] = in_words(type(error).__name__, str(error))


def of_samples(libraries: list[str]) -> Found:
    """Norms of individual gradients and sums of clipped ones."""
    found: Found = {}
    for net in ("encoder", "WRN"):
        for quantity in OF_SAMPLES:
            for library in libraries:
                _attempt(found, library, net, quantity, lambda: _result(library, net, quantity))  # noqa: B023
    return found


def vectors(sizes: list[int]) -> list[Tensor]:
    """What blocks are multiplied with, ``[p, 10]`` for each parameter."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 10, generator=generator, dtype=torch.float64) for size in sizes]


def of_kronfluence() -> list[Tensor]:
    """Products of the blocks of EKFAC with the labels' gradients; the mean over samples is left to it."""
    factors = _result("kronfluence", "bias-free MLP", "EKFAC" + OVER_DATA, empirical=True)
    products = []
    names = [*factors["lambda_matrix"]]
    for name, own in zip(names, vectors([factors["lambda_matrix"][n].numel() for n in names]), strict=True):
        rows, columns = (factors[f"{side}_eigenvectors"][name].double() for side in ("gradient", "activation"))
        mean = factors["lambda_matrix"][name].double() / factors["num_lambda_processed"][name]
        matrices = own.T.reshape(10, *mean.shape)
        products.append((rows @ ((rows.T @ matrices @ columns) * mean) @ columns.T).reshape(10, -1).T)
    return products


def of_ekfac() -> list[Tensor]:
    """The same by this package."""
    from backpack import accumulate
    from backpack.extensions import EKFAC

    torch.manual_seed(0)
    build, data = SUBJECTS["bias-free MLP"]
    X, y = data()
    model = build().double()
    found = accumulate(model, nn.CrossEntropyLoss(), [*zip(X.double().split(20), y.split(20), strict=True)],
                       EKFAC(fisher="empirical"))  # fmt: skip
    blocks = found["ekfac"].values()
    sizes = [p.numel() for p in model.parameters()]
    return [block.dense() @ own for block, own in zip(blocks, vectors(sizes), strict=True)]


def of_language(peer: bool) -> list[Tensor]:
    """Products of Kronecker-factored blocks of weights; by curvlinops (``peer``), or by this package.

    Of the empirical Fisher matrix: curvlinops pulls back columns of all positions together, so that exact factors below
    attention differ by products of positions, which have a mean of zero only where labels are sampled.
    """
    from agreement import of_curvlinops, of_factors
    from steps import Terms

    torch.manual_seed(0)
    build, data = SUBJECTS["GPT"]
    (X, y), model = data(), build().double()
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    V = torch.cat(vectors(sizes))
    if peer:
        multiply = of_curvlinops(nn.Sequential(model, Terms()), X, y.flatten(), "KFAC", "empirical", "expand")
    else:
        multiply = of_factors(model, X, y, "KFAC", "empirical", "expand")
    return [*multiply(V).split(sizes)[::2]]


def of_peers() -> Found:
    """All that the peers' environment has."""
    found = of_samples(PEERS_OF_SAMPLES)
    _attempt(found, "kronfluence", "bias-free MLP", "EKFAC" + OVER_DATA, of_kronfluence)
    _attempt(found, "curvlinops", "GPT", "KFAC empirical" + EXPAND, lambda: of_language(peer=True))
    return found


def of_this_package() -> Found:
    """The same keys, with this package for all libraries, and ``torch.func``."""
    own = of_samples(["this package"])
    _attempt(own, "this package", "bias-free MLP", "EKFAC" + OVER_DATA, of_ekfac)
    _attempt(own, "this package", "GPT", "KFAC empirical" + EXPAND, lambda: of_language(peer=False))
    return own


def differences(theirs: Found, compare: Callable[..., dict[str, Any]]) -> Iterator[Difference]:
    """A record for each network, quantity and library."""
    ours = of_this_package()
    for (net, quantity, library), values in {**theirs, **of_samples(["torch.func"])}.items():
        torch.manual_seed(0)
        batch = len(SUBJECTS[net][1]()[0])
        yield Difference(net, batch, quantity, library, **compare(library, ours[net, quantity, "this package"], values))
