"""Random layers and models for ``fuzz.py``, drawn by a ``random.Random``, in float64 and complex128."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


class Twice(nn.Module):
    """The same module, called twice."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(self.body(x).tanh())


class Bare(nn.Module):
    """Bare parameters in arithmetic."""

    def __init__(self, width):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))
        self.matrix = nn.Parameter(torch.rand(width, width) / width)

    def forward(self, x):
        return (x * self.scale + self.shift).sin() + x @ self.matrix


class Tied(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Linear(width, width)

    def forward(self, x):
        return F.linear(self.weight(x).tanh(), self.weight.weight.T)


class Recurrent(nn.Module):
    def __init__(self, layer, width, **options):
        super().__init__()
        self.layer = layer(width, width, batch_first=True, **options)
        self.down = nn.Linear(width * (2 if options.get("bidirectional") else 1), width)

    def forward(self, x):
        return self.down(self.layer(x)[0])


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Swap(nn.Module):
    """Positions first, as recurrent code often has it; or flattened into the batch."""

    def __init__(self, body, flat):
        super().__init__()
        self.body, self.flat = body, flat

    def forward(self, x):
        if self.flat:
            return self.body(x.flatten(0, 1)).reshape(x.shape)
        return self.body(x.transpose(0, 1)).transpose(0, 1)


def activation(r):
    return r.choice([nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.ELU, nn.SiLU, nn.Softplus, nn.LogSigmoid])()


def vector_layer(r, width):
    return r.choice(
        [
            lambda: nn.Linear(width, width, bias=r.random() < 0.7),
            lambda: nn.LayerNorm(width, bias=r.random() < 0.7),
            lambda: nn.RMSNorm(width, eps=1e-5),
            lambda: Residual(nn.Sequential(nn.Linear(width, width), activation(r))),
            lambda: Twice(nn.Linear(width, width)),
            lambda: Bare(width),
            lambda: Tied(width),
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(width, width)),
            lambda: nn.Sequential(nn.Linear(width, width), nn.Dropout(0.3)),
            lambda: nn.PReLU(),
            lambda: activation(r),
        ]
    )()


def sequence_layer(r, width):
    return r.choice(
        [
            lambda: vector_layer(r, width),
            lambda: Recurrent(r.choice([nn.RNN, nn.GRU, nn.LSTM]), width, bidirectional=r.random() < 0.3),
            lambda: Attention(width),
            lambda: Swap(nn.Linear(width, width), flat=r.random() < 0.5),
            lambda: Residual(nn.Sequential(nn.LayerNorm(width), Attention(width))),
        ]
    )()


def image_layer(r, width):
    return r.choice(
        [
            lambda: nn.Conv2d(width, width, 3, padding=1, groups=r.choice([1, 2, width]), bias=r.random() < 0.7),
            lambda: nn.Conv2d(width, width, r.choice([1, 2]), padding="same", dilation=r.choice([1, 2])),
            lambda: nn.Conv2d(width, width, 3, padding=1, padding_mode=r.choice(["reflect", "circular"])),
            lambda: nn.ConvTranspose2d(width, width, 3, padding=1, groups=r.choice([1, 2])),
            lambda: nn.GroupNorm(2, width),
            lambda: nn.InstanceNorm2d(width, affine=True),
            lambda: nn.BatchNorm2d(width).train(r.random() < 0.05),
            lambda: nn.AvgPool2d(3, 1, 1),
            lambda: nn.MaxPool2d(3, 1, 1),
            lambda: Residual(nn.Sequential(nn.Conv2d(width, width, 3, padding=1), activation(r))),
            lambda: nn.PReLU(width),
            lambda: activation(r),
        ]
    )()


def model_and_inputs(r):
    width, n, depth = r.choice([2, 4, 6]), r.choice([1, 2, 3, 4, 5]), r.randint(1, 4)
    kind = r.choice(["vector", "vector", "sequence", "image", "tokens"])
    classes = r.choice([2, 3])
    if kind == "vector":
        body, inputs = [vector_layer(r, width) for _ in range(depth)], torch.randn(n, width)
        return nn.Sequential(*body, nn.Linear(width, classes)), inputs, n, classes
    if kind == "image":
        body, inputs = [image_layer(r, width) for _ in range(depth)], torch.randn(n, width, 5, 4)
        head = r.choice([[nn.Flatten(), nn.Linear(width * 20, classes)], [nn.Conv2d(width, classes, 1)]])
        return nn.Sequential(*body, *head), inputs, n, classes
    length = r.choice([2, 3, n])
    body = [sequence_layer(r, width) for _ in range(depth)]
    head = r.choice([[nn.Flatten(), nn.Linear(width * length, classes)], [nn.Linear(width, classes)]])
    if kind == "tokens":
        table = nn.Embedding(7, width, padding_idx=r.choice([None, 1]))
        return nn.Sequential(table, *body, *head), torch.randint(0, 7, (n, length)), n, classes
    return nn.Sequential(*body, *head), torch.randn(n, length, width), n, classes


# ---------------------------------------------------------------------------------------------------------------
# Layers that may be of some steps only, move rows, mix samples, or compute with complex numbers


class Fn(nn.Module):
    """A function ``f(self, x)`` with parts; what it mixes: ``"batch"``, ``"positions"`` or nothing."""

    mixes = ""

    def __init__(self, f, mixes="", **parts):
        super().__init__()
        self.f, self.mixes = f, mixes
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.f(self, *inputs)


class Branches(Fn):
    """Takes one of its parts, as the step says."""


class Documents(Fn):
    """Takes the document of each position, and keeps documents apart."""


def parameter(*shape, dtype=torch.float64):
    return nn.Parameter(torch.randn(*shape, dtype=dtype) / 2)


def linear(i, o, dtype=torch.float64, bias=True):
    return nn.Linear(i, o, bias=bias, dtype=dtype)


def flat(f):
    """A function of rows, of all leading axes together."""
    return lambda s, x: f(s, x.flatten(0, -2)).reshape(*x.shape[:-1], -1)


def experts_in_a_list(r, width):
    way, top = r.randrange(4), r.choice([1, 1, 2])

    def f(s, h):
        weight, choice = s.gate(h).softmax(-1).topk(top, -1)
        out = torch.zeros_like(h)
        for k, expert in enumerate(s.experts):
            rows, slot = (choice == k).nonzero(as_tuple=True)
            own = expert(h[rows]).tanh() * weight[rows, slot, None]
            if way == 0:
                out = out.index_add(0, rows, own)
            elif way == 1:
                out = out.index_put((rows,), own, accumulate=True)
            elif way == 2:
                out = out.scatter_add(0, rows[:, None].expand(own.shape), own)
            else:
                out[rows] = out[rows] + own
        return out

    experts = nn.ModuleList(linear(width, width) for _ in range(3))
    return Fn(flat(f), gate=linear(width, 3), experts=experts)


def experts_in_a_stack(r, width):
    way = r.randrange(5)

    def f(s, h):
        weight, choice = s.gate(h).softmax(-1).max(-1)
        if way == 0:
            out = torch.bmm(h[:, None], s.weight[choice])[:, 0]
        elif way == 1:
            out = torch.einsum("rd,rde->re", h, s.weight.index_select(0, choice))
        elif way == 2:
            out = torch.einsum("rd,kde->rke", h, s.weight)[torch.arange(len(h)), choice]
        elif way == 3:
            out = torch.einsum("rd,kde->rke", h, s.weight)
            out = out.gather(1, choice[:, None, None].expand(-1, 1, width))[:, 0]
        else:
            out = torch.zeros_like(h)
            for k in range(3):
                (rows,) = torch.where(choice == k)
                out = out.index_add(0, rows, h[rows] @ s.weight[k])
        return out * weight[:, None] + s.bias.gather(0, choice[:, None].expand(-1, width))

    return Fn(flat(f), gate=linear(width, 3), weight=parameter(3, width, width), bias=parameter(3, width))


def rows_that_are_sorted(r, width):
    way = r.randrange(3)

    def f(s, h):
        order = h.detach().sum(-1).argsort()
        own = s.a(h[order]).sin()
        if way == 0:
            return own[order.argsort()] * s.scale
        if way == 1:
            return torch.zeros_like(h).index_copy(0, order, own * s.scale)
        return torch.zeros_like(h).scatter(0, order[:, None].expand(h.shape), own) + h * s.scale

    return Fn(flat(f), a=linear(width, width), scale=parameter(width))


def rows_that_are_kept(r, width):
    def f(s, h):
        keep = h.detach()[:, 0] > 0
        out = h * s.scale
        if not writes:
            return torch.where(keep[:, None], s.a(h), out)
        out[keep] = s.a(h[keep]).tanh() + s.shift
        return out

    writes = r.random() < 0.6
    return Fn(flat(f), a=linear(width, width), scale=parameter(width), shift=parameter(width))


def branches(r, width):
    def f(s, x, branch):
        chosen = s.parts[branch % len(s.parts)]
        return x + chosen(x) if residual else chosen(x)

    residual = r.random() < 0.5
    parts = nn.ModuleList([linear(width, width), nn.Sequential(linear(width, width), nn.Tanh(), linear(width, width))])
    return Branches(f, parts=parts)


def centered(r, width):
    def f(s, x):
        h = s.a(x)
        return h - h.mean(0) if way == 0 else (h - h.mean(0)) / (h.var(0, correction=0) + 1).sqrt()

    way = r.randrange(2)
    return Fn(f, "batch", a=linear(width, width))


def batch_norm(r, width):
    return Fn(flat(lambda s, h: s.norm(h)), "batch", norm=nn.BatchNorm1d(width, affine=r.random() < 0.8))


def documents(r, width):
    def f(s, x, document):
        scores = s.query(x) @ s.key(x).mT
        apart = document[:, :, None] != document[:, None, :]
        return x + scores.masked_fill(apart, float("-inf")).softmax(-1) @ s.value(x)

    return Documents(f, query=linear(width, 2), key=linear(width, 2), value=linear(width, width))


def scaled_dot_product(r, width):
    def f(s, x, document):
        q, k, v = s.all(x).chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=document[:, :, None] == document[:, None, :])

    return Documents(f, all=linear(width, 3 * width))


def routed(r, width):
    return r.choice([experts_in_a_list, experts_in_a_stack, rows_that_are_sorted, rows_that_are_kept])(r, width)


COMPLEX, WIDTH = torch.complex128, 4


def real_with_complex_between(r):
    """Real in, real out; ``curved`` by complex functions."""
    w = WIDTH
    phases = torch.tensor([1j, 2, 1 + 1j, -1j], dtype=COMPLEX)
    return r.choice(
        [
            lambda: Fn(lambda s, x: torch.fft.rfft(s.a(x)).abs().sum(-1, keepdim=True) + x, a=linear(w, w)),
            lambda: Fn(lambda s, x: torch.polar(s.r * x.tanh().exp(), s.a(x)).real, r=parameter(w), a=linear(w, w)),
            lambda: Fn(lambda s, x: (s.a(x).to(COMPLEX) * phases + 1).abs(), a=linear(w, w)),
            lambda: Fn(lambda s, x: torch.complex(x, (s.w * x).sin() + 2).angle(), w=parameter(w)),
            lambda: Fn(
                lambda s, x: torch.view_as_real(
                    torch.view_as_complex(x.unflatten(-1, (2, 2))) @ torch.view_as_complex(s.w)
                ).flatten(-2),
                w=parameter(2, 2, 2),
            ),
            lambda: Fn(
                lambda s, x: torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(s.w), n=w), w=parameter(3, 2)
            ),
            lambda: Fn(lambda s, x: (x * torch.exp(1j * s.t * x)).imag, t=parameter(w)),
            lambda: Fn(lambda s, x: (x * torch.polar(s.r, s.t)).conj().mul(1j).imag, r=parameter(w), t=parameter(w)),
        ]
    )()


def complex_layer(r):
    """Complex in, complex out."""
    w = WIDTH
    return r.choice(
        [
            lambda: linear(w, w, COMPLEX, bias=r.random() < 0.7),
            lambda: Fn(lambda s, z: z * s.w.conj() + z.conj(), w=parameter(w, dtype=COMPLEX)),
            lambda: Fn(lambda s, z: z * s.w, w=parameter(w)),
            lambda: Fn(lambda s, z: z @ s.w.mH, w=parameter(w, w, dtype=COMPLEX)),
            lambda: Fn(lambda s, z: z @ s.w.to(COMPLEX) + s.b, w=parameter(w, w), b=parameter(w, dtype=COMPLEX)),
            lambda: Fn(lambda s, z: torch.fft.ifft(z.tanh())),
            lambda: Fn(lambda s, z: z * torch.exp(1j * s.t), t=parameter(w)),
            lambda: Fn(lambda s, z: z * torch.view_as_complex(s.w), w=parameter(w, 2)),
            lambda: Fn(lambda s, z: s.a(s.a(z).sin()), a=linear(w, w, COMPLEX)),
            lambda: Fn(
                lambda s, z: s.c(z.flatten(0, -2)[:, None]).sum(1).reshape(z.shape),
                c=nn.Conv1d(1, 2, 3, padding=1, dtype=COMPLEX),
            ),
        ]
    )()


def into_complex(r):
    w = WIDTH
    return r.choice(
        [
            lambda: Fn(lambda s, x: torch.fft.fft(x)),
            lambda: Fn(lambda s, x: torch.view_as_complex(s.a(x).unflatten(-1, (w, 2))), a=linear(w, 2 * w)),
            lambda: Fn(lambda s, x: torch.complex(x, s.a(x)), a=linear(w, w)),
        ]
    )()


def out_of_complex(r):
    return r.choice(
        [
            lambda: Fn(lambda s, z: torch.cat([z.real, z.imag], -1)[..., 2:6]),
            lambda: Fn(lambda s, z: z.real + z.angle().sin()),
            lambda: Fn(lambda s, z: (z + 2).abs() - z.imag),
        ]
    )()


class Network(nn.Module):
    """A trunk and heads, each of a model's outputs from one."""

    is_complex = False
    """Whether some activations are complex."""

    def __init__(self, trunk, heads):
        super().__init__()
        self.trunk, self.heads = nn.ModuleList(trunk), nn.ModuleList(heads)

    def forward(self, x, document=None, branch=0):
        for layer in self.trunk:
            if isinstance(layer, Branches):
                x = layer(x, branch)
            elif isinstance(layer, Documents):
                x = layer(x, document)
            else:
                x = layer(x)
        outs = [head(x) for head in self.heads]
        return outs if len(outs) > 1 else outs[0]

    @property
    def mixed(self):
        """Which axes are mixed, by construction: of ``"batch"`` and ``"positions"``."""
        found = {module.mixes for module in self.modules() if isinstance(module, Fn)}
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and module.training:
                found.add("batch")
            if isinstance(module, (Recurrent, Attention)):
                found.add("positions")
        return found - {""}


def network(r):
    """A model, and a function that draws for ``n`` rows what it is called with: ``n -> (x, document or None)``."""
    kind = r.choice(["rows", "rows", "positions", "positions", "tokens", "image", "complex", "curved", "packed"])
    width, length, classes = r.choice([2, 3, 4]), r.randint(1, 4), r.randint(2, 3)
    if kind in ("complex", "curved", "positions", "tokens"):
        width = WIDTH if kind in ("complex", "curved") else r.choice([2, 4])
    trunk, shape, is_complex = [], (width,) if r.random() < 0.6 else (length, width), False
    for _ in range(r.randint(1, 3)):
        mixing = r.random() < 0.08 and kind != "packed"
        if kind == "complex":
            if is_complex:
                trunk.append(complex_layer(r))
            else:
                trunk += [into_complex(r), complex_layer(r)]
            is_complex = r.random() < 0.6
            trunk += [] if is_complex else [out_of_complex(r), activation(r)]
        elif kind == "image":
            trunk.append(image_layer(r, 2))
        elif mixing:
            trunk.append(r.choice([centered, batch_norm])(r, width))
        elif r.random() < 0.35:
            trunk.append(r.choice([routed, routed, branches])(r, width))
        elif kind == "curved":
            trunk += [linear(width, width), real_with_complex_between(r)]
        elif kind == "packed" and r.random() < 0.7:
            trunk.append(r.choice([documents, scaled_dot_product])(r, width))
        elif kind in ("positions", "tokens"):
            trunk.append(sequence_layer(r, width))
        else:
            trunk.append(vector_layer(r, width))
    if is_complex:
        trunk.append(out_of_complex(r))
    if kind in ("positions", "tokens", "packed"):
        shape = (length, width)
    if kind == "image":
        shape, width = (2, 3, 3), 18
        trunk.append(nn.Flatten())
    if kind == "tokens":
        trunk.insert(0, nn.Embedding(6, width, padding_idx=r.choice([None, 1])))
    heads = [linear(width, classes + k) for k in range(r.choice([1, 1, 1, 2, 3]))]
    model = Network(trunk, heads).double()
    model.is_complex = kind in ("complex", "curved")

    def inputs(n):
        if kind == "tokens":
            return torch.randint(6, (n, length)), None
        return torch.randn(n, *shape, dtype=torch.float64), numbered(r, n, length) if kind == "packed" else None

    return model, inputs


def numbered(r, n, length):
    """Documents one after another in each row, of different lengths."""
    starts = torch.tensor([[1] + [r.random() < 0.4 for _ in range(length - 1)] for _ in range(n)], dtype=torch.int64)
    return starts.flatten().cumsum(0).reshape(n, length) - 1
