"""Random compositions of layers, drawn by Hypothesis, and losses for them."""

import math

import torch
from hypothesis import strategies as st
from torch import nn

from .problem import Problem


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.inner(x)


class Twice(Residual):
    def forward(self, x):
        return self.inner(self.inner(x).sin())


class First(nn.Module):
    """The first output of a layer that returns several."""

    def __init__(self, layer, times=1):
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x):
        return self.layer(*[x] * self.times)[0]


class Shift(nn.Module):
    """Bare parameters."""

    def __init__(self, *shape):
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return x * self.scale + self.shift


def vectors(d):
    """Layers of ``[n, d]`` and of ``[n, t, d]``."""
    return [
        lambda: nn.Linear(d, d),
        lambda: nn.Linear(d, d, bias=False),
        lambda: nn.LayerNorm(d),
        lambda: nn.RMSNorm(d),
        lambda: Shift(d),
        lambda: nn.PReLU(),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(d, d)),
        nn.Tanh,
        nn.GELU,
        lambda: nn.Sequential(nn.Linear(d, d), nn.SiLU(inplace=True)),
        nn.Mish,
    ]


def sequences(t, d):
    return [
        *vectors(d),
        lambda: First(nn.GRU(d, d, batch_first=True)),
        lambda: First(nn.LSTM(d, d, batch_first=True)),
        lambda: First(nn.RNN(d, d // 2, batch_first=True, bidirectional=True)),
        lambda: First(nn.MultiheadAttention(d, 2, batch_first=True), 3),
        lambda: nn.TransformerEncoderLayer(d, 2, 3, dropout=0.0, batch_first=True),
        lambda: Shift(t, d),
        lambda: nn.Conv1d(t, t, 3, padding=1),
        lambda: nn.GroupNorm(1, t),
        lambda: nn.Softmax(1),
    ]


def images(c):
    return [
        lambda: nn.Conv2d(c, c, 3, padding=1),
        lambda: nn.Conv2d(c, c, (1, 3), padding="same", groups=2, bias=False),
        lambda: nn.Conv2d(c, c, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv2d(c, c, 3, padding=2, dilation=2),
        lambda: nn.ConvTranspose2d(c, c, 3, padding=1),
        lambda: nn.ConvTranspose2d(c, c, 3, padding=1, groups=2),
        lambda: nn.BatchNorm2d(c).eval(),
        lambda: nn.InstanceNorm2d(c, affine=True),
        lambda: nn.GroupNorm(2, c),
        lambda: nn.PReLU(c),
        lambda: nn.MaxPool2d(3, 1, 1),
        lambda: nn.AvgPool2d(3, 1, 1),
        lambda: Shift(c, 1, 1),
        lambda: nn.Softplus(),
        lambda: nn.Sequential(nn.Conv2d(c, c, 1), nn.ReLU(inplace=True)),
    ]


KINDS = {
    "vectors": ((4,), vectors(4)),
    "sequences": ((3, 4), sequences(3, 4)),
    "images": ((4, 3, 4), images(4)),
}


@st.composite
def problems(draw):
    kind = draw(st.sampled_from(sorted(KINDS)))
    shape, known = KINDS[kind]
    torch.manual_seed(draw(st.integers(0, 2**16)))

    def layers(most):
        return [draw(st.sampled_from(known))() for _ in range(draw(st.integers(1, most)))]

    body = []
    for _ in range(draw(st.integers(1, 3))):
        wrap = draw(st.sampled_from([nn.Sequential, Residual, Twice]))
        body.append(wrap(*layers(2)))
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(math.prod(shape), 3))
    # 3, 4: also as many samples as positions or channels
    inputs = torch.randn(draw(st.sampled_from([1, 2, 3, 4])), *shape, dtype=torch.float64)
    return Problem(model.double(), (inputs,))


def targets(n):
    return {
        "cross_entropy": torch.randint(0, 3, (n,)),
        "soft": torch.rand(n, 3, dtype=torch.float64).softmax(1),
        "values": torch.rand(n, 3, dtype=torch.float64),
    }


class Quartic(nn.Module):
    def forward(self, out, target):
        return ((out - target) ** 4).sum() + out.logsumexp(1).sum()


LOSSES = [
    (nn.CrossEntropyLoss, "cross_entropy", {"label_smoothing": 0.1}),
    (nn.CrossEntropyLoss, "soft", {}),
    (nn.MSELoss, "values", {}),
    (nn.BCEWithLogitsLoss, "values", {}),
    (nn.PoissonNLLLoss, "values", {}),
    (nn.SmoothL1Loss, "values", {"beta": 3.0}),
    (Quartic, "values", None),
]
