"""Networks and a loss with all kinds of second derivatives."""

import torch
import torch.nn.functional as F
from torch import nn

from .small import Fn


def residual(m, x):
    h = m.a(x)
    h = h + m.b(h).tanh() * h
    return m.out(h / (1 + h.square()).sqrt())


def unrolled(m, x):
    state = torch.zeros(len(x), 3, dtype=x.dtype)
    for step in x.unbind(1):
        state = (m.i(step) + m.h(state)).tanh()
    return m.out(state)


def recurrent(layer, **options):
    return Fn(lambda m, x: m.out(m.a(x)[0].mean(1)), a=layer(3, 2, batch_first=True, **options), out=nn.Linear(2, 3))


def attention(m, x):
    return m.out(m.a(x, x, x, need_weights=False)[0].mean(1))


def squeeze(m, x):
    h = m.a(x)
    return m.out((h * m.b(h.mean((2, 3))).sigmoid()[:, :, None, None]).softmax(1).flatten(1))


def data_as_weights(m, x):
    h = m.a(x)
    filters = m.b(h.mean(2)).reshape(-1, 1, 2)
    return m.out(
        F.conv1d(h.flatten(0, 1)[None], filters.expand(-1, -1, -1).repeat_interleave(2, 0), groups=2 * len(x)).reshape(
            len(x), -1
        )
    )


class Tied(nn.Module):
    """One matrix in and out, a scale used twice, a module called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.rand(3))
        self.norm = nn.LayerNorm(3)

    def forward(self, x):
        h = self.norm(self.a(x).sigmoid() * self.scale)
        h = self.norm(self.b(self.b(h).tanh())) * self.scale
        return F.linear(h, self.a.weight.T)


class TiedWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(5, 2), nn.Parameter(torch.randn(3, 2))
        self.mix = nn.Conv1d(2, 2, 2, padding=1)

    def forward(self, index):
        h = self.words(index) + self.places
        h = self.mix(self.mix(h.transpose(1, 2)).tanh()).mean(2)
        return h @ self.words.weight.T


class Nonlinear(nn.Module):
    """Parameters that enter not linearly, or through a function of themselves."""

    def __init__(self):
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        self.power, self.log_scale = nn.Parameter(torch.rand(2) + 1), nn.Parameter(torch.rand(2))
        self.root = nn.Parameter(torch.randn(2, 2))
        self.out = nn.Linear(2, 3)

    def forward(self, x):
        h = F.softplus(self.a(x)) ** self.power / self.log_scale.exp()
        h = F.linear(h, self.root @ self.root.T).tanh() / (1 + self.power)
        return self.out(h @ self.root)


def scaled():
    """A matrix of which the scales of the rows are trained alone, and could be samples by their number."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    layer.parametrizations.weight.original1.requires_grad_(False)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), layer, nn.RMSNorm(4), nn.Linear(4, 3))


class OneBias(nn.Module):
    """A linear layer with one bias for all outputs."""

    def __init__(self, i, o):
        super().__init__()
        self.matrix, self.bias = nn.Linear(i, o, bias=False), nn.Parameter(torch.rand(1))

    def forward(self, x):
        return nn.functional.linear(x, self.matrix.weight) + self.bias


NETWORKS = {
    "scaled": (scaled, (2, 3)),
    "residual": (lambda: Fn(residual, a=nn.Linear(3, 4), b=nn.Linear(4, 4), out=nn.Linear(4, 3)), (3, 3)),
    "norms": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 2),
            nn.GroupNorm(2, 4),
            nn.SiLU(),
            nn.InstanceNorm2d(4, affine=True),
            nn.Conv2d(4, 2, 2),
            nn.BatchNorm2d(2).eval(),
            nn.Flatten(),
            nn.LayerNorm(2),
            nn.Linear(2, 3),
        ),
        (3, 1, 3, 3),
    ),
    "pooled": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 2, groups=2, padding=1, padding_mode="reflect"),
            nn.MaxPool2d(2, 1),
            nn.Sigmoid(),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(4, 3, 1, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(3, 3),
        ),
        (2, 2, 3, 3),
    ),
    "positions": (
        lambda: nn.Sequential(
            OneBias(2, 2), nn.Tanh(), nn.Softplus(), nn.Flatten(), OneBias(6, 4), nn.ELU(), OneBias(4, 3)
        ),
        (3, 3, 2),
    ),
    "scale": (
        lambda: Fn(
            lambda m, x: m.b((m.a.weight[0] * x.sin()).tanh()), a=nn.Linear(3, 1, bias=False), b=nn.Linear(3, 3)
        ),
        (3, 3),
    ),
    "rms_norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Linear(4, 3)), (3, 3)),
    "attention": (
        lambda: Fn(attention, a=nn.MultiheadAttention(4, 2, batch_first=True), out=nn.Linear(4, 3)),
        (2, 3, 4),
    ),
    "encoder": (
        lambda: Fn(
            lambda m, x: m.out(m.a(x).mean(1)),
            a=nn.TransformerEncoderLayer(2, 1, 3, dropout=0.0, activation="gelu", batch_first=True),
            out=nn.Linear(2, 3),
        ),
        (2, 3, 2),
    ),
    "sequence_first": (
        lambda: Fn(
            lambda m, x: m.out(m.a(x.transpose(0, 1)).mean(0)),
            a=nn.TransformerEncoderLayer(2, 1, 3, dropout=0.0, batch_first=False),
            out=nn.Linear(2, 3),
        ),
        (2, 4, 2),
    ),
    "lstm": (lambda: recurrent(nn.LSTM), (2, 3, 3)),
    "gru": (lambda: recurrent(nn.GRU), (2, 3, 3)),
    "rnn": (lambda: recurrent(nn.RNN, bias=False), (2, 3, 3)),
    "unrolled": (lambda: Fn(unrolled, i=nn.Linear(2, 3), h=nn.Linear(3, 3), out=nn.Linear(3, 3)), (2, 3, 2)),
    "squeeze_and_excite": (
        lambda: Fn(squeeze, a=nn.Conv2d(1, 2, 2), b=nn.Linear(2, 2), out=nn.Linear(8, 3)),
        (3, 1, 3, 3),
    ),
    "data_as_weights": (
        lambda: Fn(data_as_weights, a=nn.Conv1d(1, 2, 2), b=nn.Linear(2, 2), out=nn.Linear(4, 3)),
        (3, 1, 4),
    ),
    "tied": (Tied, (3, 3)),
    "bilinear": (
        lambda: Fn(lambda m, x: m.b(m.a(x, x.sin()), m.a(x, x).tanh()), a=nn.Bilinear(3, 3, 2), b=nn.Bilinear(2, 2, 3)),
        (3, 3),
    ),
}


class Concave(nn.Module):
    def forward(self, out, target):
        return ((out - target).sin() * out.exp()).mean() - (out.sum(1) * target.sum(1)).cos().mean()
