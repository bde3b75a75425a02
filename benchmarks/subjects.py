"""What is measured? Networks and quantities. Every environment imports this file, so it needs nothing but PyTorch."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

DEVICE = os.environ.get("BENCHMARK_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")


class Positions(nn.Module):
    """The mean over positions, ``[N, T, D]`` to ``[N, D]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Block(nn.Module):
    """One layer of GPT-2, without dropout; not ``causal``: of an encoder."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.activation = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        x = x + self.projection(mixed)
        return x + self.narrow(self.activation(self.wide(self.norm2(x))))


class ClassesBehind(nn.Module):
    """Scores ``[N, T, C]`` to ``[N, C, T]``, as the loss takes them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Language(nn.Module):
    """GPT-2 without dropout: the scores of the next word at each position, ``[N, C, T]``."""

    def __init__(self, layers: int, width: int, words: int, positions: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*[Block(width, 4) for _ in range(layers)], nn.LayerNorm(width))
        self.head, self.last = nn.Linear(width, words), ClassesBehind()

    def forward(self, index: Tensor) -> Tensor:
        places = torch.arange(index.shape[1], device=index.device)
        return self.last(self.head(self.blocks(self.words(index) + self.places(places))))


class Wide(nn.Module):
    """A block of a wide residual network (Zagoruyko & Komodakis, 2016), with group normalization."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, inputs), nn.GroupNorm(groups, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.activation1, self.activation2 = nn.ReLU(), nn.ReLU()
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation1(self.norm1(x))
        return self.shortcut(h) + self.conv2(self.activation2(self.norm2(self.conv1(h))))


def mlp(
    classes: int = 10, last: type[nn.Module] = nn.ReLU, inputs: int = 784, hidden: tuple[int, int] = (512, 256)
) -> nn.Module:
    first, second = hidden
    layers = [nn.Linear(inputs, first), nn.ReLU(), nn.Linear(first, second), last()]
    return nn.Sequential(*layers, nn.Linear(second, classes))


def small_mlp() -> nn.Module:
    """So small that a step shows what the library itself takes."""
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def deep(depth: int) -> nn.Module:
    """So many narrow layers that a step shows what each of them takes."""
    layers = [layer for _ in range(depth - 1) for layer in (nn.Linear(16, 16), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(16, 10))


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


def encoder(layers: int = 4, width: int = 256, words: int = 1000) -> nn.Module:
    blocks = [Block(width, 4, causal=False) for _ in range(layers)]
    return nn.Sequential(nn.Embedding(words, width), *blocks, nn.LayerNorm(width), Positions(), nn.Linear(width, 10))


def wide_resnet(blocks: int = 2, widen: int = 4, groups: int = 16) -> nn.Module:
    """WRN-16-4: ``6 * blocks + 4`` layers."""
    sizes = [16, 16 * widen, 32 * widen, 64 * widen]
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)]
    for stage in range(3):
        for number in range(blocks):
            first = number == 0
            inputs, stride = sizes[stage] if first else sizes[stage + 1], 2 if first and stage else 1
            layers.append(Wide(inputs, sizes[stage + 1], stride, groups))
    last = sizes[-1]
    layers += [nn.GroupNorm(groups, last), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10)]
    return nn.Sequential(*layers)


def gpt(
    layers: int = 4, width: int = 192, words: int = 256, positions: int = 128, linear_only: bool = False
) -> nn.Module:
    """``linear_only``: only the ``4 * layers + 1`` linear layers are trained."""
    model = Language(layers, width, words, positions)
    for module in model.modules() if linear_only else ():
        if isinstance(module, (nn.Embedding, nn.LayerNorm)):
            module.requires_grad_(False)
    return model


class Network(NamedTuple):
    """A model and the size of its data."""

    build: Callable[[], nn.Module]
    batch: int
    shape: tuple[int, ...]
    """Of one sample."""
    classes: int = 10
    words: int | None = None
    """Inputs are numbers of words below this; ``None``: real numbers."""
    each_position: bool = False
    """Whether there is a target for each position of a sample."""


DEPTHS, WIDTHS = (10, 100, 1000), (128, 512, 1024)

NETWORKS: dict[str, Network] = {
    "MLP": Network(mlp, 128, (784,)),
    "MLP 8-8-8-8": Network(small_mlp, 32, (8,), 8),
    "3C3D": Network(three_c_three_d, 32, (3, 32, 32)),
    "All-CNN-C": Network(all_cnn_c, 16, (3, 32, 32), 100),
    "Conv1d": Network(conv1d, 64, (8, 128)),
    "Embedding": Network(embedding, 64, (32,), words=1000),
    "Grouped": Network(grouped, 32, (3, 32, 32)),
    "GPT-2 block": Network(gpt2_block, 8, (128, 256)),
    "Encoder": Network(encoder, 16, (64,), words=1000),
    "WRN-16-4": Network(wide_resnet, 16, (3, 32, 32)),
    "GPT, linear layers": Network(partial(gpt, linear_only=True), 8, (128,), 256, 256, each_position=True),
    "GPT": Network(partial(gpt, width=256), 8, (128,), 256, 256, each_position=True),
    "MLP 784-512-512-10": Network(partial(mlp, hidden=(512, 512)), 512, (784,)),
    "MLP, sigmoid": Network(partial(mlp, last=nn.Sigmoid), 128, (784,)),
    "CNN, sigmoid": Network(sigmoid_cnn, 16, (3, 16, 16)),
    **{f"{depth} layers": Network(partial(deep, depth), 32, (16,)) for depth in DEPTHS},
    **{f"MLP, width {width}": Network(partial(mlp, hidden=(width, width)), 128, (784,)) for width in WIDTHS},
    **{f"3C3D, N={n}": Network(three_c_three_d, n, (3, 32, 32)) for n in (8, 128)},
    **{f"MLP, C={c}": Network(partial(mlp, c), 128, (784,), c) for c in (100, 1000)},
    **{f"GPT-2 block, T={t}": Network(gpt2_block, 8, (t, 256)) for t in (32, 512)},
}

THREADS = {"MLP 8-8-8-8": 1}
"""Networks that are measured with a fixed number of threads, whatever the others use."""

MAIN = [
    *("MLP", "MLP 8-8-8-8", "MLP, sigmoid", "CNN, sigmoid", "3C3D", "All-CNN-C", "Conv1d", "Embedding", "Grouped"),
    *("GPT-2 block", "Encoder", "WRN-16-4", "GPT, linear layers", "GPT", "MLP 784-512-512-10"),
]
"""The networks that are measured; the others are of the series."""

OF_ONE = ["plain", "BatchL2Grad", "BatchL2Grad alone", "ClippedGrad", "ClippedGrad alone"]

ONLY = {
    **dict.fromkeys(("Encoder", "WRN-16-4"), OF_ONE),
    "GPT, linear layers": ["plain", "KFAC expand alone"],
    "GPT": ["plain", "ProjectedGrad alone", "BatchDotGrad against directions alone"],
    "MLP 784-512-512-10": ["plain", "EKFAC over data set"],
}
"""Networks for which only some quantities are measured."""

SPECIAL = {
    *("BatchL2Grad alone", "ProjectedGrad alone", "BatchDotGrad against directions alone", "KFAC expand alone"),
    "EKFAC over data set",
}
"""Quantities that are measured only where the table above names them."""

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
    "number of layers": (
        ["BatchGrad", "BatchL2Grad", "Variance", "DiagGGNExact", "KFAC"],
        {depth: (f"{depth} layers", "") for depth in DEPTHS},
    ),
    "width of layers": (
        ["BatchGrad", "BatchL2Grad", "DiagGGNMC", "KFAC"],
        {width: (f"MLP, width {width}", "") for width in WIDTHS},
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
    y = torch.randint(network.classes, shape if network.each_position else shape[:1])
    return network.build().to(DEVICE), X.to(DEVICE), y.to(DEVICE)


def is_measured(net: str, quantity: str) -> bool:
    """Whether a run measures a quantity on one of the main networks."""
    return quantity in ONLY.get(net, {*QUANTITIES} - SPECIAL) and (net, quantity) not in TOO_LARGE


PLAIN = "plain"
"""No extended module at all: what the noise between two plain gradients is."""

EXTENDED = "extended"
"""An extended module and loss outside of any block."""

ALONE = " alone"
"""Behind a quantity's name: the gradient is left out, the loss is differentiated by the model's output only."""

EXPAND = " expand"
"""Behind a quantity's name: positions count as if they were samples, as curvlinops and others have it."""

OVER_DATA = " over data set"
"""Behind a quantity's name: the samples come in batches of ``PART``, for whose sum it is computed."""

PART = 128

DIRECTIONS = 8
"""How many directions dot products are with; a step draws them."""

QUANTITIES: dict[str, Sequence[tuple[str, dict[str, Any]]]] = {
    PLAIN: [],
    EXTENDED: [],
    "nothing": [],
    "BatchGrad": [("BatchGrad", {})],
    "BatchGrad" + ALONE: [("BatchGrad", {})],
    "BatchL2Grad": [("BatchL2Grad", {})],
    "BatchL2Grad" + ALONE: [("BatchL2Grad", {})],
    "SumGradSquared": [("SumGradSquared", {})],
    "Variance": [("Variance", {})],
    "BatchDotGrad": [("BatchDotGrad", {})],
    "BatchDotGrad against directions" + ALONE: [("BatchDotGrad", {"against": DIRECTIONS})],
    "ProjectedGrad" + ALONE: [("ProjectedGrad", {"dim": 256})],
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
    "KFAC" + EXPAND + ALONE: [("KFAC", {"approx": "expand"})],
    "KFRA": [("KFRA", {})],
    "EKFAC": [("EKFAC", {})],
    "EKFAC" + OVER_DATA: [("EKFAC", {})],
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
