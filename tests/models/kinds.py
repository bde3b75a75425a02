"""Random models of many kinds, each with a step: a loss, and what of it belongs to which sample."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backpack import extend

from .small import F64, Fn, L, P, rand


@dataclass
class Step:
    """A loss, and either its terms, one a sample, or the output through whose rows (along ``axis``) it is reached."""

    loss: Tensor
    terms: Tensor | None = None
    output: Tensor | None = None
    axis: int = 0


@dataclass
class Kind:
    """A random model; ``step`` runs it; ``mixes``: samples depend on each other."""

    model: nn.Module
    step: Callable[[nn.Module], Step]
    mixes: bool = False


def sq(out: Tensor) -> Tensor:
    """A term a sample, not symmetric in the outputs."""
    flat = out.flatten(1)
    return (flat * torch.arange(1, flat.shape[1] + 1, dtype=out.dtype).sin() + flat.tanh() + flat.square()).sum(1)


def by_rows(out: Tensor, axis: int = 0) -> Step:
    return Step(sq(out.movedim(axis, 0)).sum(), output=out, axis=axis)


def by_terms(terms: Tensor) -> Step:
    return Step(terms.sum(), terms=terms)


KINDS: dict[str, Callable[[random.Random], Kind]] = {}
FURTHER: dict[str, Callable[[random.Random], Kind]] = {}
"""Kinds that second order is difficult for."""


def kind(f: Callable[[random.Random], Kind]) -> Callable[[random.Random], Kind]:
    KINDS[f.__name__] = f
    return f


def further(f: Callable[[random.Random], Kind]) -> Callable[[random.Random], Kind]:
    FURTHER[f.__name__] = f
    return f


# ---------------------------------------------------------------------------------------------------------------
# Rows


@kind
def permuted_rows(rng: random.Random) -> Kind:
    n, c = rng.randint(2, 5), rng.randint(1, 4)
    x, i, j = rand(n, 3), torch.randperm(n), torch.randperm(n)
    m = Fn(lambda s, x: s.b((s.a(x[i]).tanh() + s.s)[j])[(i[j]).argsort()], a=L(3, 4), b=L(4, c), s=P(4))
    return Kind(m, lambda m: by_rows(m(x)))


@kind
def sorted_by_length(rng: random.Random) -> Kind:
    n, t = rng.randint(2, 4), rng.randint(2, 4)
    x, k = rand(n, t, 2), torch.tensor([rng.randint(1, t) for _ in range(n)])

    def f(s: Any, x: Tensor, k: Tensor) -> Tensor:
        o = k.argsort(descending=True)
        packed = nn.utils.rnn.pack_padded_sequence(x[o], k[o], batch_first=True)
        out, _ = nn.utils.rnn.pad_packed_sequence(s.l(packed)[0], batch_first=True)
        return s.b(s.a(out).tanh().sum(1))[o.argsort()]

    return Kind(Fn(f, l=nn.GRU(2, 3, batch_first=True, dtype=F64), a=L(3, 4), b=L(4, 2)), lambda m: by_rows(m(x, k)))


@kind
def boolean_masks(rng: random.Random) -> Kind:
    n, t = rng.randint(2, 4), rng.randint(2, 4)
    x, keep = rand(n, t, 2), torch.rand(n, t) < 0.6
    keep[:, 0] = True

    def f(s: Any, x: Tensor, keep: Tensor) -> Tensor:
        h = x.new_zeros(n, t, 5)
        h[keep] = s.norm(s.a(x[keep])) * s.g + s.e(torch.arange(int(keep.sum())) % 4)
        return s.b(h.sum(1))

    e = nn.Embedding(4, 5, dtype=F64)
    m = Fn(f, a=L(2, 5), b=L(5, 2), g=P(5), norm=nn.LayerNorm(5, dtype=F64), e=e)
    return Kind(m, lambda m: by_rows(m(x, keep)))


@kind
def time_moved_inside(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    t = rng.choice([n, n, n + 1, 2 * n])
    x = rand(n, t, 2)

    def f(s: Any, x: Tensor) -> Tensor:
        h = s.l(x.transpose(0, 1))[0] * s.g
        h = s.a(h.reshape(t * n, 3)).reshape(t, n, 3).tanh() + s.p[:t]
        return s.b(h).transpose(0, 1).sum(1)

    m = Fn(f, l=nn.RNN(2, 3, dtype=F64), a=L(3, 3), b=L(3, 2), g=P(3), p=P(9, 1, 3))
    return Kind(m, lambda m: by_rows(m(x)))


@kind
def samples_along_the_second_axis(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    t = rng.choice([n, n + 1])
    x = rand(n, t, 2)
    m = Fn(lambda s, x: s.b(s.a(x).tanh() + s.p[:t]).permute(1, 0, 2), a=L(2, 3), b=L(3, 2), p=P(9, 3))
    return Kind(m, lambda m: by_rows(m(x), axis=1))


@kind
def ensembles(rng: random.Random) -> Kind:
    n, e, d = rng.randint(2, 4), rng.randint(2, 4), rng.randint(2, 4)
    x = rand(n, d)
    if rng.random() < 0.5:
        f = lambda s, x: torch.baddbmm(s.c, torch.baddbmm(s.b, x.expand(e, n, d), s.w).tanh(), s.v)  # noqa: E731
        m = Fn(f, w=P(e, d, 3), b=P(e, 1, 3), v=P(e, 3, 2), c=P(e, 1, 2))
        return Kind(m, lambda m: by_rows(m(x), axis=1))
    m = Fn(
        lambda s, x: torch.einsum("eni,eio->neo", torch.einsum("nd,edi->eni", x, s.w).tanh(), s.v),
        w=P(e, d, 3),
        v=P(e, 3, 2),
    )
    return Kind(m, lambda m: by_rows(m(x)))


@kind
def arguments_before_the_data(rng: random.Random) -> Kind:
    n, t, c = rng.randint(2, 4), rng.randint(1, 4), rng.randint(1, 4)
    x, place, scale = rand(n, t, 2), torch.arange(t), torch.tensor([0.5], dtype=F64)
    m = Fn(
        lambda s, k, place, x: s.b((s.a(x) * k + s.e(place)).tanh()),
        a=L(2, 4),
        b=L(4, c),
        e=nn.Embedding(4, 4, dtype=F64),
    )
    return Kind(m, lambda m: by_rows(m(scale, place, x)))


@kind
def masks_and_positions_of_each_sample(rng: random.Random) -> Kind:
    n, t = rng.randint(2, 4), rng.randint(2, 4)
    x, place = rand(n, t, 2), torch.stack([torch.randperm(4)[:t] for _ in range(n)])
    mask = torch.rand(n, t, 1) < 0.5

    def f(s: Any, x: Tensor, place: Tensor, mask: Tensor) -> Tensor:
        h = s.a(x) + s.table[place]
        h = (
            torch.where(mask, s.w, h).tanh().masked_fill(~mask.roll(1, 0), 0.5)
            * s.t.gather(0, place[:, 0])[:, None, None]
        )
        return s.b(h).mean(1)

    return Kind(Fn(f, table=P(4, 4), t=P(4), w=P(4), a=L(2, 4), b=L(4, 2)), lambda m: by_rows(m(x, place, mask)))


@kind
def recurrent_layers_on_reshaped_rows(rng: random.Random) -> Kind:
    n, r, t = rng.randint(2, 3), rng.randint(2, 3), rng.randint(2, 3)
    x = rand(n, r, t, 2)
    kind_, both = rng.choice([nn.GRU, nn.LSTM, nn.RNN]), rng.random() < 0.5
    f = lambda s, x: s.b(s.l(x.reshape(n * r, t, 2))[0][:, -1].reshape(n, -1))  # noqa: E731
    return Kind(
        Fn(f, l=kind_(2, 3, batch_first=True, dtype=F64, bidirectional=both), b=L(r * 3 * (1 + both), 2)),
        lambda m: by_rows(m(x)),
    )


@kind
def tables_written_into(rng: random.Random) -> Kind:
    n, t = rng.randint(2, 4), rng.randint(2, 4)
    x, hide = rand(n, t, 2), torch.rand(n, t) < 0.5
    place = rng.randrange(t)

    def f(s: Any, x: Tensor) -> Tensor:
        z = s.a(x).tanh().clone()
        z[hide] = s.hidden
        z[:, place] = s.token
        z = z.index_fill(1, torch.tensor([0]), 0.5) if t > 2 else z
        z = z.masked_scatter(hide[..., None], (s.c(x) * 2).expand(n, t, 4).contiguous())
        return s.b(z).sum(1)

    m = Fn(f, a=L(2, 4), c=L(2, 4), token=P(4), hidden=P(4), b=L(4, 2))
    return Kind(m, lambda m: by_rows(m(x)), mixes=True)


@kind
def rows_written_by_index(rng: random.Random) -> Kind:
    n, t = rng.randint(2, 4), rng.randint(2, 4)
    x, order = rand(n, t, 2), torch.randperm(n)

    def f(s: Any, x: Tensor) -> Tensor:
        z = x.new_zeros(n, t, 4)
        z[order] = s.a(x[order]).tanh()
        z = z.index_copy(1, torch.tensor([t - 1]), s.token.expand(n, 1, 4))
        z = z.index_add(0, order, s.c(x)[order])
        z = z.scatter_add(2, torch.zeros(n, t, 1, dtype=torch.long), s.d(x))
        return s.b(z).sum(1)

    return Kind(Fn(f, a=L(2, 4), c=L(2, 4), d=L(2, 1), token=P(4), b=L(4, 2)), lambda m: by_rows(m(x)))


@kind
def lists_of_different_lengths(rng: random.Random) -> Kind:
    n, c = rng.randint(2, 4), rng.randint(1, 4)
    xs = [rand(rng.randint(1, 4), 2) for _ in range(n)]
    f = lambda s, xs: s.b(torch.stack([s.a(x).tanh().mean(0) for x in xs]) * s.g)  # noqa: E731
    return Kind(Fn(f, a=L(2, 4), b=L(4, c), g=P(4)), lambda m: by_rows(m(xs)))


@kind
def lists_of_one_length(rng: random.Random) -> Kind:
    n, c = 3, rng.randint(2, 5)
    xs = [rand(c, 2) for _ in range(n)]
    f = lambda s, xs: s.b(torch.stack([s.a(x).tanh().mean(0) for x in xs]) * s.g)  # noqa: E731
    return Kind(Fn(f, a=L(2, 4), b=L(4, c), g=P(4)), lambda m: by_rows(m(xs)))


@kind
def a_loop_over_samples(rng: random.Random) -> Kind:
    n, t = rng.randint(2, 4), rng.randint(2, 4)
    x, ks = rand(n, t, 2), [rng.randint(1, t) for _ in range(n)]
    f = lambda s, x: s.b(torch.cat([s.a(x[i, : ks[i]]).tanh().amax(0, keepdim=True) for i in range(n)]))  # noqa: E731
    return Kind(Fn(f, a=L(2, 4), b=L(4, 2)), lambda m: by_rows(m(x)))


@kind
def unbound_samples(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 3, 2)

    def f(s: Any, x: Tensor) -> Tensor:
        h = s.a(x)
        return torch.stack([s.b(row.tanh() * s.g).sum(0) for row in h.unbind(0)])

    return Kind(Fn(f, a=L(2, 4), b=L(4, 2), g=P(4)), lambda m: by_rows(m(x)))


# ---------------------------------------------------------------------------------------------------------------
# Layers


@kind
def batch_norm_in_training(rng: random.Random) -> Kind:
    n = rng.randint(2, 5)
    if rng.random() < 0.5:
        x = rand(n, 2)
        m = nn.Sequential(L(2, 3), nn.BatchNorm1d(3, dtype=F64), nn.Tanh(), L(3, 2))
    else:
        x = rand(n, 2, 4, 4)
        conv = [nn.Conv2d(2, 3, 3, padding=1, dtype=F64), nn.BatchNorm2d(3, dtype=F64), nn.ReLU()]
        m = nn.Sequential(
            *conv,
            nn.Conv2d(3, 2, 3, groups=1, dtype=F64),
            nn.BatchNorm2d(2, affine=False, dtype=F64),
            nn.Flatten(),
            L(8, 2),
        )
    return Kind(m, lambda m: by_rows(m(x)), mixes=True)


@kind
def odd_parameters(rng: random.Random) -> Kind:
    n, c = rng.randint(1, 4), rng.randint(1, 4)
    x = rand(n, c, 3)

    def f(s: Any, x: Tensor) -> Tensor:
        h = (x * s.zero + s.one) * s.wide
        h = h * s.row + s.column - 2 * s.more.sum() + torch.add(h, s.row, alpha=3)
        h = h / s.scale.exp() + s.power.sigmoid() ** h.sigmoid() - torch.maximum(h, s.row)
        return (
            torch.lerp(h, h.sin(), s.zero) + torch.addcmul(h, s.row, s.column) + (s.big @ torch.ones(2, dtype=F64))[:3]
        )

    m = Fn(
        f,
        zero=P(),
        one=P(1),
        wide=P(1, 1, 3),
        row=P(1, 3),
        column=P(1, c, 1),
        more=P(2, 2, 1),
        scale=P(c, 3),
        power=P(3),
        big=P(5, 2),
    )
    return Kind(m, lambda m: by_rows(m(x)))


@kind
def bounds_that_are_learned(rng: random.Random) -> Kind:
    n, c = rng.randint(2, 4), 4
    x = rand(n, 3)
    f = lambda s, x: s.b(s.a(x).clamp(s.low, s.high).clamp_min(s.least) + torch.minimum(s.a(x), s.high))  # noqa: E731
    low, high = nn.Parameter(-0.3 * torch.ones(c, dtype=F64)), nn.Parameter(torch.tensor(0.4, dtype=F64))
    return Kind(
        Fn(f, a=L(3, c), b=L(c, 2), low=low, high=high, least=nn.Parameter(torch.tensor([-0.2], dtype=F64))),
        lambda m: by_rows(m(x)),
    )


@kind
def filled_with_a_parameter(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x, hide = rand(n, 3), torch.rand(n, 4) < 0.5

    def f(s: Any, x: Tensor) -> Tensor:
        h = s.a(x)
        h = h.masked_fill(hide, s.value) + torch.where(hide, s.value, h)
        h = h.clone()
        h[:, 1].fill_(s.value)
        return s.b(h)

    return Kind(Fn(f, a=L(3, 4), b=L(4, 2), value=P()), lambda m: by_rows(m(x)))


@kind
def renormalized_rows(rng: random.Random) -> Kind:
    x = rand(rng.randint(2, 4), 3)
    return Kind(Fn(lambda s, x: s.b(torch.renorm(s.a(x), 2, 0, 0.5)), a=L(3, 4), b=L(4, 2)), lambda m: by_rows(m(x)))


@kind
def renormalized_columns(rng: random.Random) -> Kind:
    x = rand(rng.randint(2, 4), 3)
    m = Fn(lambda s, x: s.b(torch.renorm(s.a(x), 2, 1, 0.5)), a=L(3, 4), b=L(4, 2))
    return Kind(m, lambda m: by_rows(m(x)), mixes=True)


@kind
def parts_without_entries(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 4, 2)

    def f(s: Any, x: Tensor) -> Tensor:
        h = torch.cat([s.a(x[:, :0]), s.a(x)], 1).flatten(1)
        rows = torch.zeros(0, dtype=torch.long)
        return s.b(h.index_add(0, rows, s.c(x[rows]).tanh().flatten(1)) if rng_choice else h)

    rng_choice = rng.random() < 0.5
    return Kind(Fn(f, a=L(2, 4), b=L(16, 2), c=L(2, 4)), lambda m: by_rows(m(x)))


@kind
def gathered_rows(rng: random.Random) -> Kind:
    n, t = rng.randint(2, 4), 4
    x, index = rand(n, t, 2), torch.randint(t, (n, 2))

    def f(s: Any, x: Tensor) -> Tensor:
        h = s.a(x)
        h = torch.cat([h, s.pad.expand(1, t, 4)]) if pad else h
        return s.b(h.gather(1, index[..., None].expand(n, 2, 4)).sum(1))

    pad = rng.random() < 0.5
    return Kind(Fn(f, a=L(2, 4), b=L(4, 2), pad=P(4)), lambda m: by_rows(m(x)))


@kind
def convolutions_on_frames(rng: random.Random) -> Kind:
    n, t = rng.randint(2, 3), rng.randint(1, 3)
    x = rand(n, t, 2, 4, 4)

    def f(s: Any, x: Tensor) -> Tensor:
        h = s.norm(s.conv(x.flatten(0, 1))).relu()
        h = s.up(h).unflatten(0, (n, t)).movedim(1, 2).flatten(3)
        return s.b(s.last(h.amax(-1)).sum(-1))

    parts: dict[str, Any] = {
        "conv": nn.Conv2d(2, 4, 3, padding=1, groups=rng.choice([1, 2]), dtype=F64),
        "norm": nn.GroupNorm(2, 4, dtype=F64),
        "up": nn.ConvTranspose2d(4, 2, 2, stride=2, dtype=F64),
        "last": nn.Conv1d(2, 3, 1, dtype=F64),
        "b": L(3, 2),
    }
    return Kind(Fn(f, **parts), lambda m: by_rows(m(x)))


@kind
def embeddings_and_bags(rng: random.Random) -> Kind:
    n, t = rng.randint(2, 4), rng.randint(2, 4)
    tokens = torch.randint(5, (n, t))
    offsets = torch.arange(0, n * t, t)
    mode = rng.choice(["sum", "mean", "max"])

    def f(s: Any, tokens: Tensor) -> Tensor:
        h = s.e(tokens) + s.q(tokens)
        return s.b(h.tanh().sum(1)) + s.bag(tokens.flatten(), offsets)

    parts: dict[str, Any] = {
        "e": nn.Embedding(5, 3, padding_idx=1, dtype=F64),
        "q": nn.Embedding(5, 3, scale_grad_by_freq=rng.random() < 0.0, sparse=rng.random() < 0.5, dtype=F64),
        "b": L(3, 2),
        "bag": nn.EmbeddingBag(5, 2, mode=mode, dtype=F64),
    }
    return Kind(Fn(f, **parts), lambda m: by_rows(m(tokens)))


@kind
def attention(rng: random.Random) -> Kind:
    n, t = rng.randint(1, 3), rng.randint(2, 3)
    x = rand(n, t, 4)
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, dtype=F64, norm_first=rng.random() < 0.5)
    m = Fn(
        lambda s, x: s.b(s.l(torch.cat([s.token.expand(n, 1, 4), x], 1) + s.p[: t + 1])[:, 0]),
        l=layer,
        b=L(4, 2),
        token=P(1, 1, 4),
        p=P(6, 4),
    )
    return Kind(m, lambda m: by_rows(m(x)))


@kind
def learned_queries(rng: random.Random) -> Kind:
    n, q = rng.randint(2, 4), rng.randint(1, 3)
    x = rand(n, 4, 2)
    deep = rng.random() < 0.5

    def f(s: Any, x: Tensor) -> Tensor:
        z = s.norm(s.k(s.z if deep else s.z.repeat(n, 1, 1)))
        return s.b((z @ x.transpose(1, 2)).softmax(-1) @ x).flatten(1)

    return Kind(Fn(f, z=P(1, q, 2), k=L(2, 2), norm=nn.LayerNorm(2, dtype=F64), b=L(2, 3)), lambda m: by_rows(m(x)))


@kind
def experts_with_routing(rng: random.Random) -> Kind:
    n, t, e = rng.randint(2, 4), rng.randint(1, 3), 3
    x = rand(n, t, 3)
    top = rng.choice([1, 2])

    def f(s: Any, x: Tensor) -> Tensor:
        h = x.reshape(-1, 3)
        p = s.route(h).softmax(-1)
        weight, choice = p.topk(top, -1)
        out = torch.zeros_like(h)
        for k, expert in enumerate(s.experts):
            row, slot = (choice == k).nonzero(as_tuple=True)
            out = out.index_add(0, row, expert(h[row]) * weight[row, slot, None])
        return s.b(out.reshape(n, t, 3).sum(1))

    experts = nn.ModuleList(nn.Sequential(L(3, 4), nn.Tanh(), L(4, 3)) for _ in range(e))
    return Kind(Fn(f, route=L(3, e), experts=experts, b=L(3, 2)), lambda m: by_rows(m(x)))


@kind
def graphs(rng: random.Random) -> Kind:
    g = rng.randint(2, 4)
    counts = [rng.randint(1, 3) for _ in range(g)]
    total, batch = sum(counts), torch.arange(g).repeat_interleave(torch.tensor(counts))
    starts = torch.tensor([0, *counts]).cumsum(0)
    pairs = [
        (int(starts[k]) + rng.randrange(c), int(starts[k]) + rng.randrange(c))
        for k, c in enumerate(counts)
        for _ in range(3)
    ]
    edges = torch.tensor(pairs).T.contiguous()
    x, c = rand(total, 2), rng.randint(1, 3)

    def f(s: Any, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
        h = s.a(x)
        h = (h + torch.zeros_like(h).index_add_(0, edges[1], s.m(h[edges[0]]))).tanh()
        return s.b(h.new_zeros(g, 4).index_add_(0, batch, s.c(h)))

    return Kind(Fn(f, a=L(2, 4), m=L(4, 4), c=L(4, 4), b=L(4, c)), lambda m: by_rows(m(x, edges, batch)))


@kind
def tied_weights(rng: random.Random) -> Kind:
    n, t = rng.randint(2, 4), rng.randint(1, 3)
    tokens = torch.randint(5, (n, t))
    f = lambda s, i: F.linear(s.a(F.linear(s.e(i), s.a.weight.T)) @ s.a.weight.t(), s.e.weight)  # noqa: E731
    return Kind(Fn(f, e=nn.Embedding(5, 3, dtype=F64), a=L(3, 3)), lambda m: by_rows(m(tokens)))


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int, w: Tensor, b: Tensor | None) -> Any:
        ctx.save_for_backward(x, w)
        return x**3 * w, (x * w).sum(-1)

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> Any:
        x, w = ctx.saved_tensors
        both = g * w * 3 * x**2 + h.unsqueeze(-1) * w
        return both, None, (g * x**3 + h.unsqueeze(-1) * x).reshape(-1, len(w)).sum(0), None


@kind
def functions_of_users(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 2)

    def f(s: Any, x: Tensor) -> Tensor:
        one, other = Cubed.apply(s.a(x), 3, s.w, None)
        return s.b(one) + (other[:, None] if use else 0)

    use = rng.random() < 0.5
    return Kind(Fn(f, a=L(2, 3), w=P(3), b=L(3, 2)), lambda m: by_rows(m(x)))


# ---------------------------------------------------------------------------------------------------------------
# Derivatives, and parameters that are computed


@kind
def gradient_penalties(rng: random.Random) -> Kind:
    n, d = rng.randint(1, 4), rng.randint(2, 4)
    x = rand(n, d)
    act = rng.choice([nn.Softplus, nn.Tanh, nn.GELU])
    m = nn.Sequential(L(d, 5), act(), L(5, rng.choice([1, n])))

    def step(m: nn.Module) -> Step:
        z = x.clone().requires_grad_()
        e = m(z)
        (g,) = torch.autograd.grad(e.sum(), z, create_graph=True)
        return by_terms((e - 1).square().sum(1) + (g.square().sum(1) + 0.1).sqrt())

    return Kind(m, step)


@kind
def penalties_alone(rng: random.Random) -> Kind:
    n, d = rng.randint(2, 4), rng.randint(2, 4)
    x = rand(n, d)

    def step(m: nn.Module) -> Step:
        z = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(m(z).sum(), z, create_graph=True)
        return by_terms(sq(g))

    return Kind(nn.Sequential(L(d, 5), nn.Softplus(), L(5, 1)), step)


@kind
def three_passes_with_a_penalty(rng: random.Random) -> Kind:
    n, d = rng.randint(2, 4), rng.randint(2, 4)
    real, fake, mix = rand(n, d), rand(n, d), torch.rand(n, 1, dtype=F64)

    def step(m: nn.Module) -> Step:
        z = (mix * real + (1 - mix) * fake).requires_grad_()
        (g,) = torch.autograd.grad(m(z).sum(), z, create_graph=True)
        return by_terms((m(fake) - m(real)).squeeze(1) + 10 * (g.norm(2, dim=1) - 1).square())

    return Kind(nn.Sequential(L(d, 5), nn.LeakyReLU(), L(5, 4), nn.Tanh(), L(4, 1)), step)


@kind
def forces_inside(rng: random.Random) -> Kind:
    n, atoms = rng.randint(1, 4), rng.randint(2, 3)
    x = rand(n, atoms, 2)

    def f(s: Any, x: Tensor) -> Any:
        x = x.clone().requires_grad_()
        energy = s.b(s.a(x).tanh() * s.g).sum((1, 2))
        return energy, -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]

    def step(m: nn.Module) -> Step:
        e, force = m(x)
        return by_terms((e.square() if both else 0) + sq(force))

    both = rng.random() < 0.5
    return Kind(Fn(f, a=L(2, 5), b=L(5, 1), g=P(5)), step)


@kind
def cached_parametrizations(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 2)
    m = nn.Sequential(
        nn.utils.parametrizations.weight_norm(L(2, 3)), nn.Tanh(), nn.utils.parametrizations.orthogonal(L(3, 3))
    )

    def step(m: nn.Module) -> Step:
        with nn.utils.parametrize.cached():
            return by_terms(sq(m(x)) + sq(m(x.cos())))

    return Kind(m, step)


@kind
def spectral_norm(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 2)
    new = rng.random() < 0.5
    norm = nn.utils.parametrizations.spectral_norm if new else nn.utils.spectral_norm
    m = nn.Sequential(norm(L(2, 3)), nn.Tanh(), L(3, 2))
    if not new:
        m(x)
        m[0].weight = m[0].weight.detach()
    return Kind(m, lambda m: by_rows(m(x)))


@kind
def weights_made_of_weights(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 3)

    def f(s: Any, x: Tensor) -> Tensor:
        w = s.w + s.a.T @ s.b
        h = F.linear(x, w, s.c.weight.sum(0)).tanh()
        h = F.linear(h, w.t() @ w) + F.linear(h, s.w.T.contiguous().T)
        return (
            h @ torch.stack([s.p, s.q], 1)
            + F.conv1d(h[:, None], s.w[:, None], padding=1).mean((1, 2))[:, None]
            + s.c(h)[:, :2]
        )

    return Kind(Fn(f, w=P(3, 3), a=P(2, 3), b=P(2, 3), c=L(3, 3), p=P(3), q=P(3)), lambda m: by_rows(m(x)))


@kind
def weights_of_each_sample(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 3)

    def f(s: Any, x: Tensor) -> Tensor:
        w = s.hyper(x).reshape(n, 4, 3) + s.w
        h = torch.bmm(w, x[..., None])[..., 0].tanh()
        return torch.func.vmap(lambda w, h: w.mT @ h)(w, h) + torch.einsum("nij,nj->ni", w, x)[:, :3]

    return Kind(Fn(f, hyper=L(3, 12), w=P(4, 3)), lambda m: by_rows(m(x)))


@kind
def transforms_inside(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 2)

    def f(s: Any, x: Tensor) -> Tensor:
        parameters = dict(s.net.named_parameters())
        energy = lambda z: torch.func.functional_call(s.net, parameters, (z[None],)).sum()  # noqa: E731
        return s.b(torch.func.vmap(torch.func.grad(energy))(x)) + torch.func.vmap(lambda z: s.net(z))(x)

    return Kind(Fn(f, net=nn.Sequential(L(2, 4), nn.Tanh(), L(4, 2)), b=L(2, 2)), lambda m: by_rows(m(x)))


@kind
def inner_steps(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x, support, target = rand(n, 2), rand(3, 2), rand(3, 2)

    def f(s: Any, x: Tensor) -> Tensor:
        parameters = dict(s.net.named_parameters())
        inner = (torch.func.functional_call(s.net, parameters, (s_in,)) - target).square().mean()
        grads = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
        fast = {k: p - 0.1 * s.rate * g for (k, p), g in zip(parameters.items(), grads, strict=True)}
        return torch.func.functional_call(s.net, fast, (x,))

    s_in = support
    return Kind(Fn(f, net=nn.Sequential(L(2, 4), nn.Tanh(), L(4, 2)), rate=P()), lambda m: by_rows(m(x)))


@kind
def features_kept_over_two_calls(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x, y = rand(n, 2), rand(n, 2)

    def f(s: Any, x: Tensor, before: Tensor | None = None) -> Any:
        h = s.a(x).tanh()
        h = h if before is None else h + before
        return s.b(h), h

    def step(m: nn.Module) -> Step:
        one, h = m(x)
        two, _ = m(y, h)
        return by_terms(sq(one) + sq(two))

    return Kind(Fn(f, a=L(2, 4), b=L(4, 2)), step)


@kind
def auxiliary_losses(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 2)

    def f(s: Any, x: Tensor) -> Tensor:
        s.kept = [s.a(x)]
        s.kept.append(s.b(s.kept[0].tanh()))
        return s.c(s.kept[1].sin())

    def step(m: Any) -> Step:
        out = m(x)
        loss = sq(out) + sq(m.kept[0]) * 0.1 + sq(m.kept[1].square())
        m.kept = []
        return by_terms(loss)

    return Kind(Fn(f, a=L(2, 3), b=L(3, n), c=L(n, 2)), step)


@kind
def losses_of_pytorch(rng: random.Random) -> Kind:
    n, c = rng.randint(2, 4), rng.randint(2, 4)
    x, y, z = rand(n, 2), torch.randint(c, (n,)), rand(n, c)
    reduction = rng.choice(["none", "mean", "sum"])
    which = rng.randrange(6)
    losses: list[Callable[[Tensor], Tensor]] = [
        lambda o: F.cross_entropy(o, y, reduction=reduction),
        lambda o: F.mse_loss(o, z, reduction=reduction),
        lambda o: F.binary_cross_entropy_with_logits(o, z.sigmoid(), reduction=reduction),
        lambda o: F.nll_loss(o.log_softmax(1), y, reduction=reduction, weight=torch.rand(c, dtype=F64)),
        lambda o: F.kl_div(o.log_softmax(1), z.softmax(1), reduction=reduction),
        lambda o: F.huber_loss(o, z, reduction=reduction),
    ]

    def step(m: nn.Module) -> Step:
        torch.manual_seed(3)
        out = m(x)
        loss = losses[which](out)
        return Step(
            (loss * torch.arange(1, loss.numel() + 1).reshape(loss.shape)).sum() if loss.dim() else loss, output=out
        )

    return Kind(nn.Sequential(L(2, 3), nn.ReLU(), L(3, c)), step)


@kind
def loss_inside(rng: random.Random) -> Kind:
    n, t = rng.randint(2, 4), rng.randint(2, 4)
    tokens = torch.randint(5, (n, t))

    def f(s: Any, tokens: Tensor) -> Any:
        out = s.b(s.a(s.e(tokens)).tanh())
        s.logits = out
        return F.cross_entropy(out[:, :-1].reshape(-1, 5), tokens[:, 1:].reshape(-1)), out

    def step(m: Any) -> Step:
        loss, out = m(tokens)
        return Step(loss, output=out)

    return Kind(Fn(f, e=nn.Embedding(5, 3, dtype=F64), a=L(3, 4), b=L(4, 5)), step)


@kind
def several_outputs(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 3)

    def f(s: Any, x: Tensor) -> Any:
        h = s.a(x).tanh()
        mu, v = s.b(h).chunk(2, 1)
        return {"mean": mu, "more": (v, [s.c(h + mu.sum(1, keepdim=True))]), "none": None}

    def step(m: nn.Module) -> Step:
        out = m(x)
        return by_terms(sq(out["mean"]) + sq(out["more"][1][0]) * 2 + (sq(out["more"][0]) if use else 0))

    use = rng.random() < 0.5
    return Kind(Fn(f, a=L(3, 4), b=L(4, 6), c=L(4, 2)), step)


@kind
def complex_numbers(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 4)

    def f(s: Any, x: Tensor) -> Tensor:
        z = torch.fft.rfft(s.a(x) + s.shift)
        z = (z * torch.polar(s.r, s.phi) + s.real) * torch.view_as_complex(s.pair)
        z = torch.complex(z.real, z.imag * s.r) + s.real.to(torch.complex128) * x[:, :3]
        return s.b(torch.cat([z.abs(), torch.view_as_real(z).flatten(1)], 1))

    parts: dict[str, Any] = {
        "a": L(4, 4),
        "shift": P(4),
        "r": P(3),
        "phi": P(3),
        "real": P(3),
        "pair": P(3, 2),
        "b": L(9, 2),
    }
    parts["r"].data.abs_()
    return Kind(Fn(f, **parts), lambda m: by_rows(m(x)))


@kind
def models_in_models(rng: random.Random) -> Kind:
    n, t = rng.randint(2, 3), rng.randint(2, 3)
    x = rand(n, t, 2)
    inner = extend(nn.Sequential(L(2, 3), nn.Tanh()))
    m = Fn(lambda s, x: s.b(s.inner(x.flatten(0, 1)).unflatten(0, (n, t)).sum(1)), inner=inner, b=L(3, 2))
    plain = copy.deepcopy(m)
    from backpack.context import unextend

    return Kind(unextend(plain), lambda m: by_rows(m(x)))


@kind
def gates_and_recurrences(rng: random.Random) -> Kind:
    n, t = rng.randint(2, 4), rng.randint(2, 4)
    x = rand(n, t, 2)

    def f(s: Any, x: Tensor) -> Tensor:
        h = s.h0.expand(n, 3)
        for k in range(t):
            h = s.cell(x[:, k], h) * s.g + torch.lerp(h, s.a(x[:, k]), s.mix.sigmoid())
        return s.b(h)

    return Kind(
        Fn(f, cell=nn.GRUCell(2, 3, dtype=F64), a=L(2, 3), b=L(3, 2), h0=P(1, 3), g=P(), mix=P(3)),
        lambda m: by_rows(m(x)),
    )


@kind
def normalized_by_the_batch(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 3)
    f = lambda s, x: s.c(s.b((lambda h: (h - h.mean(0)) / (h.std(0) + 0.1))(s.a(x))).tanh()) @ s.d(x).T @ s.d(x)  # noqa: E731
    return Kind(Fn(f, a=L(3, 4), b=L(4, 4), c=L(4, 3), d=L(3, 3)), lambda m: by_rows(m(x)), mixes=True)


@kind
def contrastive(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x, y = rand(n, 3), rand(n, 2)

    def f(s: Any, x: Tensor, y: Tensor) -> Tensor:
        one, other = F.normalize(s.a(x), dim=1), F.normalize(s.b(y), dim=1)
        return one @ other.T * s.t.exp()

    return Kind(Fn(f, a=L(3, 4), b=L(2, 4), t=P()), lambda m: by_rows(m(x, y)), mixes=True)


@kind
def windows_and_folds(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 2, 4, 4)

    def f(s: Any, x: Tensor) -> Tensor:
        h = s.a(F.unfold(x, 2, stride=2).mT).mT
        h = F.fold(h, (4, 4), 2, stride=2) + s.p
        h = F.pad(h, (1, 1, 0, 1), mode="replicate").flip(2).roll(1, 3).unfold(3, 3, 2)
        return s.b(F.adaptive_avg_pool2d(h.flatten(3), 2).flatten(1))

    return Kind(Fn(f, a=L(8, 8), p=P(1, 2, 4, 1), b=L(8, 2)), lambda m: by_rows(m(x)))


@kind
def inputs_changed_before(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 3)
    m = Fn(lambda s, x: s.b(s.a((x - 0.1) / 0.3).tanh()), a=L(3, 4), b=L(4, n))
    return Kind(m, lambda m: by_rows(m(x)))


# ---------------------------------------------------------------------------------------------------------------
# For second order only


@further
def mixed_on_a_branch(rng: random.Random) -> Kind:
    x = rand(rng.randint(2, 4), 3)

    def f(s: Any, x: Tensor) -> Tensor:
        h = s.a(x).tanh()
        return s.b(h) + s.c((h - h.mean(0)).sin()) * s.g

    return Kind(Fn(f, a=L(3, 4), b=L(4, 2), c=L(4, 2), g=P(2)), lambda m: by_rows(m(x)), mixes=True)


@further
def mixed_between_uses_of_one_weight(rng: random.Random) -> Kind:
    x = rand(rng.randint(2, 4), 3)

    def f(s: Any, x: Tensor) -> Tensor:
        h = s.a(x).tanh()
        h = s.a(h - h.mean(0)).sigmoid() * s.g
        return s.a(h.softmax(0) if rng_choice else h) + s.g

    rng_choice = rng.random() < 0.5
    return Kind(Fn(f, a=L(3, 3), g=P(3)), lambda m: by_rows(m(x)), mixes=True)


@further
def attention_over_rows(rng: random.Random) -> Kind:
    x = rand(rng.randint(2, 4), 3)
    fused = rng.random() < 0.5

    def f(s: Any, x: Tensor) -> Tensor:
        q, k, v = s.a(x).chunk(3, 1)
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None])[0] if fused else (q @ k.T).softmax(1) @ v
        return s.b(x + s.c(mixed)).tanh()

    return Kind(Fn(f, a=L(3, 12), c=L(4, 3), b=L(3, 2)), lambda m: by_rows(m(x)), mixes=True)


@further
def neighbours_in_a_graph(rng: random.Random) -> Kind:
    n = rng.randint(2, 5)
    x, edges = rand(n, 2), torch.randint(n, (2, 2 * n))

    def f(s: Any, x: Tensor, edges: Tensor) -> Tensor:
        for layer in (s.a, s.b):
            h = layer(x)
            x = (h + torch.zeros_like(h).index_add_(0, edges[1], s.m(h)[edges[0]])).tanh()
        return s.c(x)

    return Kind(Fn(f, a=L(2, 3), b=L(3, 3), m=L(3, 3), c=L(3, 2)), lambda m: by_rows(m(x, edges)), mixes=True)


@further
def some_positions_mixed(rng: random.Random) -> Kind:
    n, t = rng.randint(2, 3), rng.randint(2, 3)
    x = rand(n, t, 2)

    def f(s: Any, x: Tensor) -> Tensor:
        h = s.a(x)
        first = h[:, :1] - h[:, :1].mean(0)
        return s.b(torch.cat([first.exp(), h[:, 1:].cos()], 1) * s.g)

    return Kind(Fn(f, a=L(2, 3), b=L(3, 2), g=P(t, 3)), lambda m: by_rows(m(x)), mixes=True)


@further
def batch_norm_in_the_middle(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 3)
    norm = nn.BatchNorm1d(4, dtype=F64, momentum=None if rng.random() < 0.3 else 0.1)
    m = nn.Sequential(L(3, 4), nn.Softplus(), norm, nn.Tanh(), L(4, 3), nn.BatchNorm1d(3, dtype=F64), L(3, 2))
    m[rng.choice([2, 5])].eval()
    return Kind(m, lambda m: by_rows(m(x)), mixes=True)


@further
def weights_scaled_by_the_batch(rng: random.Random) -> Kind:
    x = rand(rng.randint(2, 4), 3)
    f = lambda s, x: s.b((F.linear(x, s.w * s.a(x).mean(0).sigmoid())).tanh())  # noqa: E731
    return Kind(Fn(f, w=P(4, 3), a=L(3, 3), b=L(4, 2)), lambda m: by_rows(m(x)), mixes=True)


@further
def checkpointed_regions(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x, deep = rand(n, 3), rng.random() < 0.5
    mixes = rng.random() < 0.4

    def part(s: Any, h: Tensor) -> Tensor:
        h = s.b(h).tanh() * s.g
        if deep:
            h = checkpoint(s.d, h, use_reentrant=False)
        return h - h.mean(0) if mixes else h

    def f(s: Any, x: Tensor) -> Tensor:
        h = checkpoint(part, s, s.a(x), use_reentrant=False)
        return s.c(checkpoint(part, s, h.sin(), use_reentrant=False))

    deeper = nn.Sequential(L(4, 4), nn.Softplus(), nn.LayerNorm(4, dtype=F64))
    return Kind(Fn(f, a=L(3, 4), b=L(4, 4), c=L(4, 2), d=deeper, g=P(4)), lambda m: by_rows(m(x)), mixes=mixes)


@further
def changed_in_place(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 3)

    def f(s: Any, x: Tensor) -> Tensor:
        h = s.a(x).mul_(2)
        view = h.view(n, 2, 2)
        view[:, 0].mul_(s.g)
        h = h.clone()
        h[:, 1:3].add_(s.c(x).sigmoid_())
        h.t()[0].copy_(s.c(x.cos())[:, 0])
        out = s.b(h.relu_() if rng_choice else h.exp_())
        return out.add_(s.p).unsqueeze_(1)

    rng_choice = rng.random() < 0.5
    return Kind(Fn(f, a=L(3, 4), b=L(4, 2), c=L(3, 2), g=P(2), p=P(2)), lambda m: by_rows(m(x)))


@further
def views_and_shared_memory(rng: random.Random) -> Kind:
    n, t = rng.randint(2, 4), rng.randint(2, 3)
    x = rand(n, t, 4)

    def f(s: Any, x: Tensor) -> Tensor:
        h = s.a(x).view(n, t, 2, 2).transpose(1, 2)
        one, other = h.unbind(1)
        h = torch.stack([one * s.g, other.tanh()], -1).as_strided((n, t, 4), (4 * t, 4, 1))
        h = h.expand(2, n, t, 4).diagonal(0, 2, 3)[1][:, : min(t, 4)]
        return s.b(h.unfold(1, 2, 1).square()).squeeze(1)

    return Kind(Fn(f, a=L(4, 4), b=L(2, 2), g=P(2)), lambda m: by_rows(m(x)))


@further
def two_extended_parts(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x, y = rand(n, 3), rand(n, 3)

    def step(m: Any) -> Step:
        one, other = m.parts[0](x), m.parts[0](y)
        return by_rows(m.parts[1](one * other) + (one - other).square()[:, :2])

    m = nn.Module()
    m.parts = nn.ModuleList([nn.Sequential(L(3, 4), nn.Tanh()), nn.Sequential(L(4, 3), nn.Sigmoid(), L(3, 2))])
    return Kind(m, step)


@further
def two_calls_beside_each_other(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x, y = rand(n, 3), rand(n, 3)
    m = nn.Sequential(L(3, 4), nn.GELU(), L(4, 2))
    join = rng.choice([torch.sub, torch.mul, lambda a, b: torch.stack([a, b], 1), lambda a, b: torch.cat([a, b], 1)])
    return Kind(m, lambda m: by_rows(join(m(x), m(y))))


@further
def not_piecewise_linear(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 3)

    def f(s: Any, x: Tensor) -> Tensor:
        h = s.a(x)
        gate, value = h.chunk(2, 1)
        h = F.silu(gate) * value + F.glu(h) + gate.softmax(1).cumsum(1)
        h = h + F.normalize(h, dim=1) + h.logsumexp(1, keepdim=True) + h.norm(dim=1, keepdim=True)
        h = h / (1 + h.square()) + torch.atan2(h, s.g.exp()) + h.std(1, keepdim=True) + s.b(h).erf().sum(1)[:, None]
        h = h + (h[:, :, None] * h[:, None].abs().add(0.1).pow(1.5)).mean(2).sin() + h.tanh().prod(1, keepdim=True)
        return s.b(F.layer_norm(h, (3,), s.g, s.p))

    return Kind(Fn(f, a=L(3, 6), b=L(3, 2), g=P(3), p=P(3)), lambda m: by_rows(m(x)))


@further
def without_second_derivatives(rng: random.Random) -> Kind:
    x = rand(rng.randint(2, 4), 3)
    f = lambda s, x: s.b(torch.cdist(s.a(x)[:, None], s.q)[:, 0].tanh())  # noqa: E731
    return Kind(Fn(f, a=L(3, 3), b=L(2, 2), q=P(2, 3)), lambda m: by_rows(m(x)))


@further
def norms_of_each_sample(rng: random.Random) -> Kind:
    n = rng.randint(1, 3)
    x = rand(n, 2, 4)
    norms = [nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True), nn.LayerNorm([4, 4]), nn.RMSNorm(4)]
    m = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1, dtype=F64), rng.choice(norms).to(F64), nn.Tanh(), nn.Conv1d(4, 2, 2, dtype=F64)
    )
    return Kind(m, lambda m: by_rows(m(x)))


@further
def matrix_functions(rng: random.Random) -> Kind:
    n = rng.randint(2, 3)
    x = rand(n, 3)

    def f(s: Any, x: Tensor) -> Tensor:
        k = s.w @ s.w.T + torch.eye(3, dtype=F64)
        h = torch.linalg.solve(k, s.a(x).T).T
        root = torch.linalg.cholesky(s.b(x).reshape(n, 2, 2).square() + 2 * torch.eye(2, dtype=F64))
        return h[:, :2] + torch.linalg.det(k).log() + root.sum(1) + torch.matrix_exp(s.v)[0, :2]

    return Kind(Fn(f, w=P(3, 3), a=L(3, 3), b=L(3, 4), v=P(2, 2)), lambda m: by_rows(m(x)))


class Straight(torch.autograd.Function):
    """Its derivative is another one than the function's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return (x * scale).round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, scale = ctx.saved_tensors
        return g * scale.tanh(), (g * x).sum(0)


@further
def derivatives_that_are_given(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 3)
    f = lambda s, x: s.b(Straight.apply(s.a(x).tanh(), s.g))  # noqa: E731
    return Kind(Fn(f, a=L(3, 4), b=L(4, 2), g=P(4)), lambda m: by_rows(m(x)))


@further
def tied_transposed_and_sliced(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 3)

    def f(s: Any, x: Tensor) -> Tensor:
        h = F.linear(x, s.w, s.p).tanh()
        h = F.linear(h, s.w.T, s.p[:3]) + s.p[1:] * s.w[0]
        return F.linear(h, s.w[1:3], s.w[3, :2]).sigmoid() + s.p.sum() * s.w.diagonal()[:2]

    return Kind(Fn(f, w=P(4, 3), p=P(4)), lambda m: by_rows(m(x)))


@further
def hidden_layers_with_a_derivative(rng: random.Random) -> Kind:
    n = rng.randint(2, 3)
    x, mixes = rand(n, 2), rng.random() < 0.4

    def f(s: Any, x: Tensor) -> Tensor:
        z = x.clone().requires_grad_()
        energy = s.b((s.a(z) * s.g).tanh()).square()
        energy = energy - energy.mean(0) if mixes else energy
        (g,) = torch.autograd.grad(energy.square().sum(), z, create_graph=True)
        return s.c(g.sin())

    return Kind(Fn(f, a=L(2, 3), b=L(3, 1), c=L(2, 2), g=P(3)), lambda m: by_rows(m(x)), mixes=mixes)


@further
def frozen_below(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 3)
    m = nn.Sequential(L(3, 4), nn.Tanh(), L(4, 4), nn.BatchNorm1d(4, dtype=F64), nn.Sigmoid(), L(4, 2))
    for part in m[: rng.randint(1, 3)]:
        part.requires_grad_(False)
    return Kind(m, lambda m: by_rows(m(x)), mixes=True)
