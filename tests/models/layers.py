"""Models of all kinds, small and in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .problem import Problem

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def register(name, make, *shape, low=None):
    def build() -> Problem:
        inputs = torch.randint(0, low, shape) if low else torch.randn(shape, dtype=torch.float64)
        return Problem(make().double(), (inputs,))

    CASES[name] = build


def build(name: str) -> Problem:
    torch.manual_seed(0)
    problem = CASES[name]()
    for parameter in problem.model.parameters():  # no scale of one, no bias of zero
        if parameter.dim() <= 1 and parameter.requires_grad:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return problem


# Linear maps
register("linear", lambda: nn.Linear(4, 3), 3, 4)
register("linear_sequence", lambda: nn.Linear(4, 3), 3, 5, 4)
register("linear_image", lambda: nn.Linear(4, 3, bias=False), 3, 2, 5, 4)
register("linear_square_batch", lambda: nn.Linear(4, 3), 4, 4, 4)
register("linear_one_sample", lambda: nn.Linear(4, 3), 1, 5, 4)
register("mlp", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)), 3, 4)

register("linear_in_place", lambda: nn.Sequential(nn.Linear(4, 4), nn.SiLU(inplace=True), nn.Linear(4, 3)), 3, 5, 4)

# Convolutions
OPTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same"},
    {"padding": "valid", "dilation": 2},
    {"groups": 2, "bias": False},
    {"padding": 2, "dilation": 2, "groups": 2},
    *({"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
]
SIZES = {1: (9,), 2: (6, 7), 3: (4, 5, 4)}
for dims, layer in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
    for number, options in enumerate(OPTIONS):
        if not (dims == 3 and options.get("dilation")):
            register(f"conv{dims}d_{number}", lambda c=layer, o=options: c(4, 6, 3, **o), 3, 4, *SIZES[dims])
TRANSPOSED = [
    {},
    {"stride": 2, "padding": 1, "output_padding": 1},
    {"groups": 2, "bias": False},
    {"dilation": 2, "stride": 3, "padding": 2},
]
for dims, layer in ((1, nn.ConvTranspose1d), (2, nn.ConvTranspose2d), (3, nn.ConvTranspose3d)):
    for number, options in enumerate(TRANSPOSED):
        register(f"transposed{dims}d_{number}", lambda c=layer, o=options: c(4, 6, 3, **o), 3, 4, *SIZES[dims])
register("conv_batch_of_one", lambda: nn.Conv2d(4, 6, 3), 1, 4, 6, 6)
register("depthwise", lambda: nn.Conv2d(4, 8, 3, groups=4), 3, 4, 6, 6)

# Normalizations and scalings
register("layer_norm", lambda: nn.LayerNorm(4), 3, 5, 4)
register("layer_norm_2d", lambda: nn.LayerNorm((5, 4)), 3, 5, 4)
register("layer_norm_no_bias", lambda: nn.LayerNorm(4, bias=False), 3, 5, 4)
register(
    "layer_norm_no_affine", lambda: nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 2)), 3, 4
)
register("rms_norm", lambda: nn.RMSNorm(4), 3, 5, 4)
register("group_norm", lambda: nn.GroupNorm(2, 4), 3, 4, 5)
register("prelu", lambda: nn.PReLU(), 3, 4, 5)
register("prelu_channels", lambda: nn.PReLU(4), 3, 4, 5)
for dims, shape in ((1, (5,)), (2, (3, 4)), (3, (2, 3, 2))):
    norm, instance = getattr(nn, f"BatchNorm{dims}d"), getattr(nn, f"InstanceNorm{dims}d")
    register(f"batch_norm{dims}d", lambda c=norm: c(4).eval(), 3, 4, *shape)
    register(f"instance_norm{dims}d", lambda c=instance: c(4, affine=True), 3, 4, *shape)
    register(
        f"instance_norm{dims}d_stored",
        lambda c=instance: c(4, affine=True, track_running_stats=True).eval(),
        3,
        4,
        *shape,
    )
register("batch_norm_plain", lambda: nn.BatchNorm1d(4).eval(), 3, 4)

# Embeddings
register("embedding", lambda: nn.Embedding(6, 4), 3, 5, low=6)
register("embedding_padding", lambda: nn.Embedding(6, 4, padding_idx=2), 3, 5, low=6)
register("embedding_sparse", lambda: nn.Embedding(6, 4, sparse=True), 3, 5, low=6)
register("embedding_one", lambda: nn.Embedding(6, 4), 3, low=6)
register("bag_sum", lambda: nn.EmbeddingBag(6, 4, mode="sum"), 3, 5, low=6)
register("bag_mean_padding", lambda: nn.EmbeddingBag(6, 4, mode="mean", padding_idx=1), 3, 5, low=6)


@case
def bag_weighted():
    weights = torch.rand(3, 5, dtype=torch.float64)
    bag = nn.EmbeddingBag(6, 4, mode="sum").double()
    return Problem(bag, (), {"input": torch.randint(0, 6, (3, 5)), "per_sample_weights": weights})


# Recurrent layers, behind a linear map so that the root counts samples along axis 0
class Recurrent(nn.Module):
    def __init__(self, layer, **options):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.layer = layer(5, 4, **options)

    def forward(self, x):
        x = self.first(x)
        out, state = self.layer(x if self.layer.batch_first else x.transpose(0, 1))
        out = out if self.layer.batch_first else out.transpose(0, 1)
        states = state if isinstance(state, tuple) else (state,)
        return torch.cat([out.flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1)


for layer in (nn.RNN, nn.LSTM, nn.GRU):
    for number, options in enumerate(
        [
            {"batch_first": True},
            {"batch_first": False, "num_layers": 2, "bidirectional": True},
            {"batch_first": True, "bias": False},
        ]
    ):
        register(f"{layer.__name__.lower()}_{number}", lambda c=layer, o=options: Recurrent(c, **o), 3, 4, 4)
register("lstm_projected", lambda: Recurrent(nn.LSTM, proj_size=2, num_layers=2, bidirectional=True), 3, 3, 4)
register("rnn_relu", lambda: Recurrent(nn.RNN, nonlinearity="relu", batch_first=True), 3, 4, 4)


@case
def lstm_root_sequence_first():
    return Problem(nn.LSTM(4, 3).double(), (torch.randn(5, 3, 4, dtype=torch.float64),), axis=1)


class Unrolled(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell(4, 3)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] + state[1] if isinstance(state, tuple) else state


for cell in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
    register(cell.__name__.lower(), lambda c=cell: Unrolled(c), 3, 4, 4)


class OwnCell(nn.Module):
    def __init__(self):
        super().__init__()
        self.i, self.h = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        state = torch.zeros(len(x), 3, dtype=x.dtype)
        for step in x.unbind(1):
            state = (self.i(step) + self.h(state)).tanh_()
        return state


register("own_cell", OwnCell, 4, 5, 4)
register("own_cell_square", OwnCell, 3, 3, 4)


# Attention
class Attention(nn.Module):
    def __init__(self, batch_first=True, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)

    def forward(self, x):
        x = x if self.attention.batch_first else x.transpose(0, 1)
        out = self.attention(x, x, x, need_weights=False)[0]
        return out if self.attention.batch_first else out.transpose(0, 1)


register("attention", Attention, 3, 5, 4)
register("attention_sequence_first", lambda: Attention(False), 3, 5, 4)
register("attention_square", lambda: Attention(False), 4, 4, 4)
register("attention_bias_kv", lambda: Attention(add_bias_kv=True), 3, 5, 4)
register("attention_other_sizes", lambda: Attention(bias=False, kdim=4, vdim=4), 3, 5, 4)
for norm_first in (False, True):
    register(
        f"encoder_{norm_first}",
        lambda n=norm_first: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=n),
            2,
            enable_nested_tensor=False,
        ),
        *(3, 5, 4),
    )


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x, x.sin())


register("decoder", Decoder, 3, 5, 4)


# Weight computed from other parameters
register("weight_norm", lambda: parametrizations.weight_norm(nn.Linear(4, 3)), 3, 5, 4)
register("weight_norm_columns", lambda: parametrizations.weight_norm(nn.Linear(4, 3), dim=1), 3, 5, 4)
register("weight_norm_conv", lambda: parametrizations.weight_norm(nn.Conv1d(4, 3, 2)), 3, 4, 5)
register("weight_norm_whole", lambda: parametrizations.weight_norm(nn.Linear(4, 3), dim=None), 3, 5, 4)
register("spectral_norm", lambda: parametrizations.spectral_norm(nn.Linear(4, 3)).eval(), 3, 4)


class Adapted(nn.Module):
    def __init__(self, merged):
        super().__init__()
        self.base = nn.Linear(4, 3).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2))
        self.merged = merged

    def forward(self, x):
        if self.merged:
            return F.linear(x, self.base.weight + self.b @ self.a, self.base.bias)
        return self.base(x) + x @ self.a.T @ self.b.T


class Spread(nn.Module):
    """A bias that is copied to the samples before a function without a rule takes it beside a weight."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(1))

    def forward(self, x):
        return torch.addmv(self.bias.expand(len(x)), x, self.weight).unsqueeze(1)


class OneBias(nn.Module):
    """A bias of one entry for all outputs, of a linear layer and of ``addmm``."""

    def __init__(self):
        super().__init__()
        self.weight, self.matrix = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 2))
        self.bias, self.shift = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(1))

    def forward(self, x):
        return torch.addmm(self.shift, F.linear(x, self.weight, self.bias).tanh(), self.matrix)


register("spread", Spread, 3, 4)
register("one_bias", OneBias, 3, 4)
register("adapter_merged", lambda: Adapted(True), 3, 5, 4)
register("adapter", lambda: Adapted(False), 3, 5, 4)


# Graphs
class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.norm = nn.GroupNorm(3, 3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.act(self.norm(self.a(x)))
        h = self.b(h)
        h += x
        h = self.b(h) + self.a(h)  # used twice
        return h.mean((2, 3))


class Tokens(nn.Module):
    """Token and position tables, a class token, a learned scale, tied output, bare matrices."""

    def __init__(self, style):
        super().__init__()
        self.words, self.places = nn.Embedding(6, 4), nn.Embedding(7, 4)
        self.token, self.table = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(5, 4))
        self.scale, self.matrix = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4, 4))
        self.style = style

    def forward(self, index):
        n, t = index.shape
        place = torch.arange(t)
        h = self.words(index) + self.places(place if self.style == "flat" else place[None])
        h = torch.cat([self.token.expand(n, -1, -1), h], 1) * self.scale
        h = h + self.table[:1] - self.table[index[:, :1] % 5]
        h = torch.einsum("nti,ij->ntj", h, self.matrix) + (h @ self.matrix.T).tanh()
        if self.style == "flat":
            return F.linear(h, self.words.weight)
        return (h.reshape(-1, 4) @ self.words.weight.T).reshape(n, -1)


register("tokens_flat", lambda: Tokens("flat"), 3, 4, low=6)
register("tokens_square", lambda: Tokens("flat"), 4, 4, low=6)
register("tokens_batched", lambda: Tokens("batched"), 3, 4, low=6)
register("residual", Residual, 3, 3, 4, 4)


class Reordered(nn.Module):
    """Samples side by side, or a step apart, in a flattened axis."""

    def __init__(self, time_first):
        super().__init__()
        self.linear, self.norm, self.time_first = nn.Linear(4, 4), nn.LayerNorm(4), time_first

    def forward(self, x):
        x = x.transpose(0, 1) if self.time_first else x
        h = self.linear(self.norm(x.reshape(-1, 4))).reshape(x.shape)
        return h.transpose(0, 1) if self.time_first else h


register("flattened", lambda: Reordered(False), 3, 5, 4)
register("flattened_time_first", lambda: Reordered(True), 3, 6, 4)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(4, 4, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.output, self.unused = nn.Linear(3, 2), nn.Linear(2, 2)
        self.register_buffer("input0", torch.ones(2))

    def forward(self, x, *, other, options):
        return self.output(self.frozen(self.bilinear(x, other["y"]))) * self.input0 * options


@case
def keywords_and_names():
    x, y = torch.randn(2, 3, 4, dtype=torch.float64)
    return Problem(Two().double(), (x,), {"other": {"y": y}, "options": 2.0})


class Cast(nn.Linear):
    """Parameters that functions of data return as they are, since there is nothing to cast."""

    def forward(self, x):
        return F.linear(x, self.weight.type_as(x), self.bias.to(x))


register("parameters_returned_as_they_are", lambda: nn.Sequential(Cast(4, 3), nn.Tanh(), Cast(3, 3)), 3, 4)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) + F.linear(x.sin(), self.weight)


class Shared(nn.Module):
    """A kernel of two convolutions, with and without groups."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, 3))

    def forward(self, x):
        return F.conv1d(F.conv1d(x, self.weight), self.weight, groups=2)


register("shared_kernel", Shared, 3, 2, 9)


class Same(nn.Linear):
    pass


register("subclasses", lambda: nn.Sequential(Same(4, 4), nn.ReLU(inplace=True), Doubled(4, 3)), 3, 4)
register("lazy", lambda: _lazy(), 3, 4)


def _lazy() -> Tensor:
    model = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(2)).double()
    model(torch.zeros(1, 4, dtype=torch.float64))
    return model
