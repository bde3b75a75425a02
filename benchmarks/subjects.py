"""What is measured? Networks and quantities. Every environment imports this file, so it needs nothing but PyTorch."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Positions(nn.Module):
    """The mean over positions, ``[N, T, D]`` to ``[N, D]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Block(nn.Module):
    """One layer of GPT-2, without dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.activation = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.projection(mixed)
        return x + self.narrow(self.activation(self.wide(self.norm2(x))))


def mlp(
    classes: int = 10, last: type[nn.Module] = nn.ReLU, inputs: int = 784, hidden: tuple[int, int] = (512, 256)
) -> nn.Module:
    first, second = hidden
    layers = [nn.Linear(inputs, first), nn.ReLU(), nn.Linear(first, second), last()]
    return nn.Sequential(*layers, nn.Linear(second, classes))


def small_mlp() -> nn.Module:
    """So small that a step shows what the library itself takes."""
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def three_c_three_d(channels: tuple[int, int, int] = (64, 96, 128), hidden: tuple[int, int] = (512, 256)) -> nn.Module:
    def pooled(*convolution: int, padding: int = 0) -> list[nn.Module]:
        return [nn.Conv2d(*convolution, padding=padding), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)]

    a, b, c = channels
    layers = [*pooled(3, a, 5), *pooled(a, b, 3), *pooled(b, c, 3, padding=1), nn.Flatten()]
    return nn.Sequential(*layers, *mlp(inputs=9 * c, hidden=hidden))


def all_cnn_c() -> nn.Module:
    sizes = [(3, 96, 3, 1, 1), (96, 96, 3, 1, 1), (96, 96, 3, 2, 1), (96, 192, 3, 1, 1), (192, 192, 3, 1, 1)]
    sizes += [(192, 192, 3, 2, 1), (192, 192, 3, 1, 0), (192, 192, 1, 1, 0), (192, 100, 1, 1, 0)]
    layers = [layer for size in sizes for layer in (nn.Conv2d(*size), nn.ReLU())]
    return nn.Sequential(*layers, nn.AvgPool2d(6), nn.Flatten())


def sigmoid_cnn() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 5), nn.Sigmoid(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


def conv1d() -> nn.Module:
    layers = [nn.Conv1d(8, 32, 5), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(32, 64, 5), nn.ReLU(), nn.MaxPool1d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 29, 10))


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(1000, 64), Positions(), nn.Linear(64, 10))


def grouped() -> nn.Module:
    layers = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 1, 1, groups=8), nn.ReLU()]
    layers += [nn.Conv2d(64, 64, 3, 2, 1, groups=64), nn.ReLU(), nn.Conv2d(64, 128, 1), nn.ReLU(), nn.AvgPool2d(8)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


def gpt2_block() -> nn.Module:
    return nn.Sequential(Block(256, 4), nn.LayerNorm(256), Positions(), nn.Linear(256, 10))


class Network(NamedTuple):
    """A model and the size of its data."""

    build: Callable[[], nn.Module]
    batch: int
    shape: tuple[int, ...]
    """Of one sample."""
    classes: int = 10
    words: int | None = None
    """Inputs are numbers of words below this; ``None``: real numbers."""


NETWORKS: dict[str, Network] = {
    "MLP": Network(mlp, 128, (784,)),
    "MLP 8-8-8-8": Network(small_mlp, 32, (8,), 8),
    "3C3D": Network(three_c_three_d, 32, (3, 32, 32)),
    "All-CNN-C": Network(all_cnn_c, 16, (3, 32, 32), 100),
    "Conv1d": Network(conv1d, 64, (8, 128)),
    "Embedding": Network(embedding, 64, (32,), words=1000),
    "Grouped": Network(grouped, 32, (3, 32, 32)),
    "GPT-2 block": Network(gpt2_block, 8, (128, 256)),
    "MLP, sigmoid": Network(partial(mlp, last=nn.Sigmoid), 128, (784,)),
    "CNN, sigmoid": Network(sigmoid_cnn, 16, (3, 16, 16)),
    **{f"3C3D, N={n}": Network(three_c_three_d, n, (3, 32, 32)) for n in (8, 128)},
    **{f"MLP, C={c}": Network(partial(mlp, c), 128, (784,), c) for c in (100, 1000)},
    **{f"GPT-2 block, T={t}": Network(gpt2_block, 8, (t, 256)) for t in (32, 512)},
}

THREADS = {"MLP 8-8-8-8": 1}
"""Networks that are measured with a fixed number of threads, whatever the others use."""

MAIN = [
    *("MLP", "MLP 8-8-8-8", "MLP, sigmoid", "CNN, sigmoid", "3C3D", "All-CNN-C", "Conv1d", "Embedding", "Grouped"),
    "GPT-2 block",
]
"""The networks on which every quantity is measured; the others are of the series."""

TOO_LARGE = {("All-CNN-C", "SqrtGGNExact"), ("All-CNN-C", "BatchDiagGGNExact"), ("All-CNN-C", "BatchDiagHessian")}
"""Networks and quantities left out: results of gigabytes, or minutes a step."""

SERIES: dict[str, tuple[Sequence[str], dict[int, tuple[str, str]]]] = {
    "batch size": (
        ["BatchGrad", "Variance", "DiagGGNExact", "KFAC"],
        {8: ("3C3D, N=8", ""), 32: ("3C3D", ""), 128: ("3C3D, N=128", "")},
    ),
    "number of classes": (
        ["DiagGGNMC", "DiagGGNExact"],
        {10: ("MLP", ""), 100: ("MLP, C=100", ""), 1000: ("MLP, C=1000", "")},
    ),
    "selected of 128 samples": (
        ["BatchGrad", "DiagGGNMC", "DiagGGNExact"],
        {k: ("3C3D, N=128", f"@{k}") for k in (1, 4, 8, 32, 128)},
    ),
    "sequence length": (
        ["BatchGrad", "BatchL2Grad"],
        {32: ("GPT-2 block, T=32", ""), 128: ("GPT-2 block", ""), 512: ("GPT-2 block, T=512", "")},
    ),
}
"""What varies: quantities, and the networks to measure them on, with what is put behind the quantity's name."""


def make(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, inputs and targets; the same ones every time."""
    network = NETWORKS[name]
    torch.manual_seed(0)
    shape = network.batch, *network.shape
    X = torch.randn(shape) if network.words is None else torch.randint(network.words, shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return network.build().to(device), X.to(device), torch.randint(network.classes, (network.batch,)).to(device)


PLAIN = "plain"
"""No extended module at all: what the noise between two plain gradients is."""

EXTENDED = "extended"
"""An extended module and loss outside of any block."""

ALONE = " alone"
"""Behind a quantity's name: the gradient is left out, the loss is differentiated by the model's output only."""

QUANTITIES: dict[str, Sequence[tuple[str, dict[str, Any]]]] = {
    PLAIN: [],
    EXTENDED: [],
    "nothing": [],
    "BatchGrad": [("BatchGrad", {})],
    "BatchGrad" + ALONE: [("BatchGrad", {})],
    "BatchL2Grad": [("BatchL2Grad", {})],
    "SumGradSquared": [("SumGradSquared", {})],
    "Variance": [("Variance", {})],
    "BatchDotGrad": [("BatchDotGrad", {})],
    "ClippedGrad": [("ClippedGrad", {"max_norm": 1e-3})],
    "ClippedGrad" + ALONE: [("ClippedGrad", {"max_norm": 1e-3})],
    "BatchL2Grad, SumGradSquared, Variance": [("BatchL2Grad", {}), ("SumGradSquared", {}), ("Variance", {})],
    "DiagGGNExact": [("DiagGGNExact", {})],
    "DiagGGNMC": [("DiagGGNMC", {})],
    "BatchDiagGGNExact": [("BatchDiagGGNExact", {})],
    "BatchDiagGGNMC": [("BatchDiagGGNMC", {})],
    "SqrtGGNExact": [("SqrtGGNExact", {})],
    "SqrtGGNMC": [("SqrtGGNMC", {})],
    "GGNGram": [("GGNGram", {})],
    "DiagHessian": [("DiagHessian", {})],
    "BatchDiagHessian": [("BatchDiagHessian", {})],
    "HMP": [("HMP", {})],
    "GGNMP": [("GGNMP", {})],
    "PCHMP": [("PCHMP", {})],
    "KFAC": [("KFAC", {})],
    "KFLR": [("KFLR", {})],
    "KFAC" + ALONE: [("KFAC", {})],
    "KFLR" + ALONE: [("KFLR", {})],
    "KFRA": [("KFRA", {})],
    "EKFAC": [("EKFAC", {})],
}
"""Name to extensions and their arguments; what an implementation lacks is left out."""

PRODUCTS = {"HMP": "hmp", "GGNMP": "ggnmp", "PCHMP": "pchmp"}
"""Extensions that leave functions, by the attribute: each is called once, with a vector for its parameter."""


def extensions_of(quantity: str, n: int) -> Sequence[tuple[str, dict[str, Any]]]:
    """The extensions of a quantity, ``BatchGrad@4`` being the one for 4 of the ``n`` samples."""
    name, _, count = quantity.partition("@")
    if not count:
        return QUANTITIES[name]
    chosen = [i * n // int(count) for i in range(int(count))]
    return [(extension, {**kwargs, "subsampling": chosen}) for extension, kwargs in QUANTITIES[name]]
