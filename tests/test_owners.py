"""Owners of cotangents on random graphs: what is said to be a sample's comes from its row alone, in every precision.

Each graph is a random composition of what models do with rows and axes. The truth is plain autograd: a cotangent of one
row of the output at a time, pulled down to every edge of the graph.
"""

import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from models.small import Fn
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import checkpoint
from truths.autograd import through_rows

from backpack import backpack, extend
from backpack.extensions import BatchGrad
from backpack.graph import LEAF, count_outputs, read, variable_of
from backpack.samples import Layout, same
from backpack.samples.coded_pass import coded
from backpack.samples.layout_rules import RULES
from backpack.samples.owners import find_owners

MOST = 2400
"""Entries of an intermediate result, at most."""

STEPS = []
MIXING = []
"""Steps, also among ``STEPS``, that are there to mix samples. Others do so where the samples are no longer in rows."""


def step(function):
    STEPS.append(function)
    return function


def mixing(function):
    MIXING.append(function)
    return step(function)


class Composition(nn.Module):
    """Random steps from a batch ``[n, t, d]`` to an output whose axis 0 counts the samples.

    The first call creates the parameters. All that is drawn depends on ``seed`` alone.
    """

    def __init__(self, seed, length=8, sizes=None, allowed=None):
        super().__init__()
        draw = random.Random(seed)
        k = draw.randrange(2, 6)
        self.sizes = sizes or draw.choice([(k, k, k), (k, k, 3), (6, 4, 3), (4, 2, 6), (5, 1, 3), (7, 3, 1), (2, 3, 4)])
        self.seed, self.length, self.allowed = seed, length, allowed or STEPS
        self.own = nn.ParameterList()
        self(self.batch())

    def batch(self):
        return torch.randn(self.sizes, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)

    def new(self, *shape):
        """The next parameter."""
        if self.used == len(self.own):
            drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
            self.own.append(nn.Parameter(drawn * max(1, shape[-1]) ** -0.5))
        self.used += 1
        return self.own[self.used - 1]

    def index(self, size, count):
        return torch.tensor([self.draw.randrange(size) for _ in range(count)], dtype=torch.int64)

    def axis(self, h):
        return self.draw.randrange(h.dim())

    def forward(self, x):
        self.draw, self.used, self.names, self.n = random.Random(self.seed), 0, [], len(x)
        self.generator = torch.Generator().manual_seed(self.seed + 1)
        h = linear(self, x)
        earlier = [h]
        while len(self.names) < self.length:
            chosen = self.draw.choice(self.allowed)
            found = chosen(self, h)
            if found is None or not found.numel():
                continue
            self.names.append(chosen.__name__)
            h = found if found.numel() <= max(MOST, 9 * self.n) else found.flatten()[: MOST // self.n * self.n]
            before = self.draw.choice(earlier)
            if self.draw.random() < 0.2 and before.shape == h.shape:
                h = h + before
            earlier.append(h)
        return self.rows(linear(self, h.tanh()))

    def rows(self, h):
        """Bring what there is to ``[n, ...]``."""
        n = self.n
        if h.numel() < n:
            return h.reshape(-1)[torch.arange(n) % h.numel()].unsqueeze(1)
        if h.shape[0] == n:
            return h.unsqueeze(1) if h.dim() == 1 else h
        if n in h.shape and self.draw.random() < 0.7:
            return h.movedim(h.shape.index(n), 0).reshape(n, -1)
        h = h.reshape(-1)[: h.numel() // n * n]
        return h.reshape(n, -1) if self.draw.random() < 0.5 else h.reshape(-1, n).T


# Layers


@step
def linear(net, h):
    return F.linear(h, net.new(net.draw.choice([h.shape[-1], 3]), h.shape[-1]), None)


@step
def linear_with_bias(net, h):
    width = net.draw.choice([h.shape[-1], min(net.n, 9), 2])
    return F.linear(h, net.new(width, h.shape[-1]), net.new(width))


@step
def scale_and_shift(net, h):
    return h * net.new(h.shape[-1]) + net.new(*h.shape[1:]) if h.dim() > 1 else None


@step
def table_of_all_entries(net, h):
    """A parameter with one entry for each of the batch's, like positions of nodes."""
    return h + net.new(*h.shape).sin()


@step
def activation(net, h):
    return net.draw.choice([torch.tanh, F.relu, F.gelu, F.silu, torch.sin])(h)


@step
def layer_norm(net, h):
    return F.layer_norm(h, h.shape[-1:], net.new(h.shape[-1])) if h.shape[-1] > 1 else None


@step
def group_norm(net, h):
    return F.group_norm(h, 1, net.new(h.shape[1])) if h.dim() == 3 and h[0].numel() > 1 else None


@step
def convolution(net, h):
    return F.conv1d(h, net.new(h.shape[1], h.shape[1], 3), net.new(h.shape[1]), padding=1) if h.dim() == 3 else None


@step
def convolution_in_groups(net, h):
    """The batch's rows as groups of channels."""
    if h.dim() != 3:
        return None
    groups = h.shape[0]
    joined = h.reshape(1, -1, h.shape[2])
    weight = net.new(1, h.shape[1], 1).expand(groups, -1, -1)
    return F.conv1d(joined, weight, groups=groups).reshape(groups, 1, -1)


@step
def pooling(net, h):
    return F.max_pool1d(h, 2) if h.dim() == 3 and h.shape[2] > 1 else None


@step
def attention(net, h):
    if h.dim() != 3:
        return None
    query = h @ net.new(h.shape[-1], h.shape[-1])
    return (query @ h.transpose(1, 2)).softmax(-1) @ h


@step
def fused_attention(net, h):
    return F.scaled_dot_product_attention(*(h[:, None],) * 3).squeeze(1) if h.dim() == 3 else None


def softmax_along_an_axis(net, h):
    return h.softmax(net.draw.randrange(1, h.dim())) if h.dim() > 1 else None


class Doubled(torch.autograd.Function):
    """A user's function, of which nothing is known."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return 2 * x * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return 2 * grad * weight, 2 * (grad * x).sum(tuple(range(x.dim() - 1)))


@step
def custom_function(net, h):
    return Doubled.apply(h, net.new(h.shape[-1])) if h.dim() > 1 else None


@step
def tied_parameter(net, h):
    own = [p for p in net.own[: net.used] if p.shape[-1:] == h.shape[-1:] and p.dim() == 1]
    return h * own[0] if own else None


@step
def checkpointed(net, h):
    weight = net.new(h.shape[-1], h.shape[-1])
    return checkpoint(lambda x: (x @ weight).tanh(), h, use_reentrant=False)


@step
def derivative(net, h):
    weight = net.new(h.shape[-1], h.shape[-1])
    return torch.autograd.grad((h @ weight).sin().sum(), h, create_graph=True)[0]


@step
def look_up(net, h):
    """An embedding of what the batch's rows say."""
    return h + F.embedding(h.detach().flatten(1).sum(1).gt(0).long(), net.new(2, h.shape[-1])) if h.dim() == 2 else None


@step
def einsum(net, h):
    return torch.einsum("nti,ntj->nij", h, h @ net.new(h.shape[-1], h.shape[-1])) if h.dim() == 3 else None


@step
def recurrence(net, h):
    if h.dim() != 3 or h.shape[1] > 6:
        return None
    state, weight = h[:, 0], net.new(h.shape[-1], h.shape[-1])
    for position in range(1, h.shape[1]):
        state = (state @ weight + h[:, position]).tanh()
    return state


@step
def phases(net, h):
    return (h * torch.exp(1j * net.new(h.shape[-1]))).real


@step
def vmapped(net, h):
    weight = net.new(h.shape[-1])
    return torch.vmap(lambda row: (row * weight).sum() * row)(h.flatten(1)[:, : h.shape[-1]]) if h.dim() > 1 else None


@step
def spectrum(net, h):
    return torch.fft.rfft(h.float() if h.dtype == torch.bfloat16 else h, dim=-1).abs().square()


# Axes


@step
def transposition(net, h):
    return h.transpose(net.axis(h), net.axis(h)) if h.dim() > 1 else None


@step
def permutation_of_axes(net, h):
    order = list(range(h.dim()))
    net.draw.shuffle(order)
    return h.permute(order)


@step
def flattening(net, h):
    return h.flatten(*sorted([net.axis(h), net.axis(h)])) if h.dim() > 1 else None


@step
def unflattening(net, h):
    where = net.axis(h)
    factors = [k for k in range(2, h.shape[where]) if h.shape[where] % k == 0]
    return h.unflatten(where, (net.draw.choice(factors), -1)) if factors and h.dim() < 4 else None


@step
def reshape(net, h):
    sizes = [k for k in range(1, h.numel() + 1) if h.numel() % k == 0]
    return h.reshape(net.draw.choice(sizes), -1)


def new_axis(net, h):
    return h.unsqueeze(net.draw.randrange(h.dim() + 1)) if h.dim() < 4 else None


@step
def reduction(net, h):
    if h.dim() < 2:
        return None
    reduce = net.draw.choice([torch.sum, torch.mean, torch.amax, torch.logsumexp])
    return reduce(h, net.draw.randrange(1, h.dim()), keepdim=net.draw.random() < 0.5)


@step
def selection(net, h):
    where = net.axis(h)
    return h.select(where, net.draw.randrange(h.shape[where])) if h.dim() > 1 else None


@step
def narrowing(net, h):
    where = net.axis(h)
    start = net.draw.randrange(h.shape[where])
    return h.narrow(where, start, net.draw.randrange(1, h.shape[where] - start + 1))


@step
def padding(net, h):
    return F.pad(h, [net.draw.randrange(2) for _ in range(2 * h.dim())])


@step
def repetition(net, h):
    return h.repeat([net.draw.randrange(1, 3) for _ in range(h.dim())])


@step
def expansion(net, h):
    return h.unsqueeze(0).expand(2, *h.shape) if h.dim() < 4 else None


# Rows


@step
def roll(net, h):
    return h.roll(net.draw.randrange(1, 5), net.axis(h))


@step
def flip(net, h):
    return h.flip(net.axis(h))


def rows_by_index(net, h):
    return h[net.index(h.shape[0], net.draw.choice([net.n, h.shape[0], 3]))]


@step
def permuted_rows(net, h):
    order = list(range(h.shape[0]))
    net.draw.shuffle(order)
    return h[torch.tensor(order)]


@step
def index_select(net, h):
    where = net.axis(h)
    return h.index_select(where, net.index(h.shape[where], h.shape[where]))


@step
def gather(net, h):
    where = net.axis(h)
    return h.gather(where, net.index(h.shape[where], h.numel()).reshape(h.shape))


@step
def masked_rows(net, h):
    mask = torch.tensor([net.draw.random() < 0.7 for _ in range(h.shape[0])])
    return h[mask]


@step
def masked_entries(net, h):
    mask = torch.tensor([net.draw.random() < 0.7 for _ in range(h.numel())]).reshape(h.shape)
    return h[mask]


@step
def masked_rows_put_back(net, h):
    """Experts: some rows take another way."""
    if h.dim() == 1:
        return None
    mask = torch.tensor([net.draw.random() < 0.5 for _ in range(h.shape[0])])
    out = torch.zeros_like(h)
    out[mask] = (h[mask] * net.new(h.shape[-1])).to(h)
    return out + h


@step
def ragged_rows(net, h):
    counts = net.index(4, h.shape[0])
    return h.repeat_interleave(counts, 0)


@step
def sum_of_groups(net, h):
    """A graph's nodes, added up."""
    groups = net.draw.choice([net.n, 2])
    return h.new_zeros(groups, *h.shape[1:]).index_add(0, net.index(groups, h.shape[0]), h)


@step
def sum_of_neighbours(net, h):
    return h.index_add(0, net.index(h.shape[0], h.shape[0]), h.roll(1, 0))


@step
def scatter(net, h):
    where = net.axis(h)
    return torch.zeros_like(h).scatter_add(where, net.index(h.shape[where], h.numel()).reshape(h.shape), h)


@step
def index_put(net, h):
    return torch.zeros_like(h).index_put((net.index(h.shape[0], h.shape[0]),), h, accumulate=net.draw.random() < 0.5)


@step
def sorting(net, h):
    return h.sort(net.axis(h)).values


@step
def cat_of_parts(net, h):
    where = net.axis(h)
    parts = list(h.split(net.draw.randrange(1, h.shape[where] + 1), where))
    net.draw.shuffle(parts)
    return torch.cat([part.sin() for part in parts], where)


@step
def cat_with_itself(net, h):
    return torch.cat([h, h.tanh()], net.axis(h))


@step
def cat_of_different_ways(net, h):
    return torch.cat([h, (h * net.new(h.shape[-1])).flip(0)], net.axis(h))


@step
def stack(net, h):
    return torch.stack([h, h.roll(1, 0).tanh()], net.draw.randrange(h.dim() + 1)) if h.dim() < 4 else None


@step
def chunks(net, h):
    where = net.axis(h)
    first, *others = h.chunk(2, where)
    return first * others[0] if others and others[0].shape == first.shape else first


@step
def unbound_rows(net, h):
    rows = list(h.unbind(0))
    net.draw.shuffle(rows)
    return torch.stack(rows)


@step
def written_in_place(net, h):
    out = h.new_zeros(h.shape)
    for row in range(0, h.shape[0], 2):
        out[row] = h[h.shape[0] - 1 - row] * 2
    return out + h


@step
def where(net, h):
    return torch.where(h.detach() > 0, h, h.roll(1, net.axis(h)))


@step
def largest(net, h):
    axis = net.axis(h)
    return h.topk(net.draw.randrange(1, h.shape[axis] + 1), axis).values


@step
def changed_in_place(net, h):
    h = h.clone()
    h[h.shape[0] // 2 :].mul_(2).add_(1)
    return h.tanh_() if net.draw.random() < 0.5 else h


@step
def diagonal(net, h):
    return h + torch.diag_embed(torch.diagonal(h, 0, -2, -1)) if h.dim() > 1 and h.shape[-1] == h.shape[-2] else None


@step
def cumulative_sum(net, h):
    return h.cumsum(net.axis(h))


# Sizes


@step
def dead_rows(net, h):
    return h * torch.tensor([net.draw.randrange(2) for _ in range(h.shape[0])]).reshape(-1, *[1] * (h.dim() - 1)).to(h)


@step
def rows_of_all_sizes(net, h):
    powers = torch.tensor([net.draw.randrange(-6, 7) for _ in range(h.shape[0])], dtype=torch.float64)
    return h * (10**powers).reshape(-1, *[1] * (h.dim() - 1)).to(h)


@step
def tamed(net, h):
    return h / (1 + h.abs())


# Mixing


@mixing
def mean_added(net, h):
    return h + net.draw.choice([1, 0.01]) * h.mean(0)


@mixing
def gate_from_the_batch(net, h):
    return h * h.flatten(1).mean().sigmoid() if h.dim() > 1 else None


@mixing
def batch_norm(net, h):
    if h.dim() not in (2, 3) or h.numel() == h.shape[1]:
        return None
    return F.batch_norm(h, None, None, net.new(h.shape[1]), net.new(h.shape[1]), training=True)


@mixing
def branch_with_batch_norm(net, h):
    found = batch_norm(net, h)
    return None if found is None else h + found


@mixing
def softmax_along_rows(net, h):
    return h.softmax(0)


@mixing
def similarities(net, h):
    return h.flatten(1) @ h.flatten(1).T if h.dim() > 1 else None


@mixing
def mean_expanded(net, h):
    return h.mean(0, True).expand_as(h)


# Laws of owners


def output_of(net, precision=torch.float64, axis=0):
    """The output of a composition, with its samples along an axis, and where they are."""
    x = net.batch()
    if precision != torch.float64:
        net, x = net.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        out = net(x).movedim(0, axis)
    return out, Layout(net.n, axis)


def owners_of(roots, layout):
    """The graph below some edges, and the owners in it if samples begin at the first one."""
    graph = read(roots)
    return graph, find_owners(graph, {(roots[0].node, roots[0].output_nr): layout}, torch.Generator())


def edges_of(graph):
    following = {edge for node in graph.order for edge in graph.edges[node] if edge[0] is not None}
    return list(following | {(root.node, root.output_nr) for root in graph.roots})


def contributions(out, layout, edges, samples):
    """For each edge, how much of its entries comes from each of some samples: ``[sample, *edge]``."""
    seed = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    inputs = [variable_of(node) if node.name() == LEAF else GradientEdge(node, number) for node, number in edges]
    found = {edge: [] for edge in edges}
    for n in samples:
        own = torch.zeros_like(seed)
        own.select(layout.axis, n).copy_(seed.select(layout.axis, n))
        for edge, grad in zip(
            edges, torch.autograd.grad(out, inputs, own, retain_graph=True, allow_unused=True), strict=True
        ):
            if grad is not None:
                found[edge].append(grad.abs().where(grad.isfinite(), 0))
    return {edge: torch.stack(parts) for edge, parts in found.items() if parts}


def check(net, precision=torch.float64, axis=0, samples=None):
    """The laws on one graph. Counts its edges: owned, the first mixed ones, and false alarms among these."""
    out, layout = output_of(net, precision, axis)
    graph, owners = owners_of([get_gradient_edge(out)], layout)
    samples = torch.arange(layout.n) if samples is None else samples
    assert not owners.mixed & owners.owned.keys()
    counts = Counter()
    found = contributions(out, layout, edges_of(graph), samples.tolist())
    largest = {}  # of the cotangents of a node and of those above it
    for node in graph.order:
        parts = [found[node, k] for k in range(count_outputs(node)) if (node, k) in found]
        own = [float(part.max()) for part in parts if part.numel()]
        largest[node] = max(own + [largest[consumer] for consumer, _, _ in graph.incoming[node]], default=0.0)
    for edge, parts in found.items():
        node, number = edge
        comes_from = parts > 0
        consumers = [consumer for consumer, _, output in graph.incoming[node] if output == number]
        is_below_mixed = any((consumer, -1) in owners.mixed for consumer in consumers)
        if not comes_from.any():
            continue
        assert edge in owners.owned or edge in owners.mixed, f"{node.name()} is overlooked"
        if edge in owners.owned:
            counts["owned"] += 1
            assert not is_below_mixed, f"{node.name()} is owned, below what is mixed"
            owner = owners.owned[edge].owners(comes_from.shape[1:], torch.device("cpu"))
            others = (samples.reshape(-1, *[1] * owner.dim()) != owner) & (owner >= 0)
            assert not (comes_from & others).any(), f"{node.name()} is owned, and comes from others as well"
            rounding = 100 * torch.finfo(parts.dtype).eps * largest[node]
            assert not ((parts > rounding) & (owner < 0)).any(), f"entries of {node.name()} are said to be nobody's"
        elif node.name() != LEAF and not is_below_mixed:
            counts["mixed"] += 1
            counts["false alarm"] += int(comes_from.sum(0).max() < 2)
    return counts


def check_all(seeds, precision, **options):
    counts = Counter()
    for seed in seeds:
        net = Composition(seed, **options)
        try:
            counts.update(check(net, precision, axis=seed % 2))
        except Exception as error:
            raise AssertionError(f"seed {seed}, {net.sizes}: {', '.join(net.names)}") from error
    return counts


PRECISIONS = [torch.float64, torch.float32, torch.bfloat16]
"""``bfloat16``: autocast."""


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_owned_entries_come_from_their_sample_alone(precision):
    counts = check_all(range(200), precision)
    assert counts["owned"] > 1500


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_owned_entries_come_from_their_sample_alone_in_thousands_of_graphs(precision):
    check_all(range(10_000, 12_000), precision)
    check_all(range(20_000, 20_500), precision, length=20)


def test_hardly_an_edge_is_called_mixed_that_is_not():
    """False alarms cost time. Those that there are come from samples that contribute nothing: rows of zeros."""
    alive = [step for step in STEPS if step not in (dead_rows, masked_rows, masked_entries, sum_of_groups)]
    counts = check_all(range(1000, 1300), torch.float64, allowed=alive)
    assert counts["mixed"] > 300
    assert counts["false alarm"] <= counts["mixed"] / 50


@pytest.mark.parametrize("sizes", [(2000, 1, 2), (400, 2, 2), (300, 2, 3), (17, 17, 17)], ids=str)
def test_owned_entries_come_from_their_sample_alone_in_large_batches(sizes):
    for seed in range(6):
        net = Composition(seed, length=6, sizes=sizes)
        chosen = torch.randperm(sizes[0])[:10]
        assert check(net, torch.float32, samples=chosen)["owned"]


@pytest.mark.parametrize("name", ["Cumsum", "Flip", "Roll", "Softmax", "Sort"])
def test_a_wrong_rule_is_noticed(monkeypatch, name):
    monkeypatch.setitem(RULES, name, RULES["Relu"])
    with pytest.raises(AssertionError) as caught:
        check_all(range(300), torch.float64)
    assert "comes from others as well" in str(caught.value.__cause__)


def test_what_else_reaches_an_edge_changes_no_owner():
    """A penalty on an intermediate result, and another output."""
    for seed in range(100):
        net = Composition(seed)
        out, layout = output_of(net)
        graph, owners = owners_of([get_gradient_edge(out)], layout)
        inner = [edge for edge in owners.owned if edge[0].name() != LEAF]
        beside = GradientEdge(*inner[seed % len(inner)])
        _, more = owners_of([*graph.roots, beside], layout)
        assert more.mixed == owners.mixed and more.owned.keys() == owners.owned.keys(), seed
        assert all(same(found, owners.owned[edge]) for edge, found in more.owned.items()), seed


# Laws of individual gradients


def rows(n, width=3):
    return torch.randn(n, width)


def squares(out):
    return out.square().flatten(1).sum(1)


def unique_rows():
    x = rows(9)
    x[4], x[7] = x[1], x[2]

    def formula(m, x):
        different, places = torch.unique(x, dim=0, return_inverse=True)
        return m.l(different).tanh()[places]

    return Fn(formula, l=nn.Linear(3, 2)), x, squares


def gate_of_one_entry(n):
    model = Fn(lambda m, x: m.b(x) * m.a(x).mean(0).sigmoid(), a=nn.Linear(3, 1), b=nn.Linear(3, 2))
    return model, rows(n), squares


ATTACKS = {
    "mean over the batch, expanded": lambda: (
        Fn(lambda m, x: m.l(x).mean(0, True).expand(5, -1), l=nn.Linear(3, 2)),
        rows(5),
        lambda out: out.sum(1),
    ),
    "table added, equal cotangents": lambda: (
        Fn(lambda m, x: m.l(x) + m.w.tanh().expand(5, -1), l=nn.Linear(3, 2), w=nn.Parameter(torch.randn(1, 2))),
        rows(5),
        lambda out: out.sum(1),
    ),
    "unique rows, gathered": unique_rows,
    "gate of one entry from a batch of 8": lambda: gate_of_one_entry(8),
    "gate of one entry from a batch of 64": lambda: gate_of_one_entry(64),
    "signs through a mean over the batch": lambda: (
        Fn(lambda m, x: m.l(x) + (m.a(x) * 1).mean(0), l=nn.Linear(3, 2), a=nn.Linear(3, 2)),
        rows(4),
        lambda out: out.sum(1) * torch.tensor([1.0, -1.0, 1.0, -1.0]),
    ),
    "samples of 1e-6 to 1e6": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        rows(6),
        lambda out: squares(out) * 10.0 ** torch.arange(-6, 6, 2),
    ),
    "512 samples, rolled": lambda: (
        Fn(lambda m, x: m.b(m.a(x.roll(7, 0)).tanh()).roll(-7, 0), a=nn.Linear(3, 4), b=nn.Linear(4, 2)),
        rows(512),
        squares,
    ),
    "faint mixing through a mean over the batch": lambda: (
        Fn(lambda m, x: (h := m.c(x)) - 0.01 * h.mean((0, 2, 3), True), c=nn.Conv2d(2, 3, 3)),
        torch.randn(16, 2, 8, 8),
        squares,
    ),
}
"""What broke earlier forms of the coded pass: a model, a batch, and the terms of a loss."""


def sizes_of(gradients):
    """The largest entry, sample by sample."""
    return gradients.abs().flatten(1).amax(1)


@pytest.mark.filterwarnings("ignore:Samples are mixed by")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=str)
def test_each_individual_gradient_is_right_by_its_own_size(precision, name, seed):
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(precision)
    try:
        model, x, terms = ATTACKS[name]()
        extend(model)
        parameters = list(model.parameters())
        losses = terms(model(x))
        samples = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        with backpack(BatchGrad()):
            losses.sum().backward()
    finally:
        torch.set_default_dtype(before)
    for parameter, truth in zip(parameters, map(torch.stack, zip(*samples, strict=True)), strict=True):
        assert parameter.grad_batch.shape == truth.shape
        error = sizes_of(parameter.grad_batch - truth)
        assert (error <= 1e4 * torch.finfo(precision).eps * sizes_of(truth)).all()


class Rows(nn.Module):
    """A composition whose output has one axis only of the batch's size."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        out = self.net(x).flatten(1)
        return torch.cat([out, out[:, :1]], 1) if out.shape[1] == len(x) else out


def check_individual_gradients(seed, **options):
    net = Composition(seed, **options)
    model = extend(Rows(net))
    out = model(net.batch())
    loss = (out.tanh() * torch.randn_like(out)).sum()
    truth = through_rows(out, loss, list(net.own))
    if not all(gradients.isfinite().all() for gradients in [out, *truth]):
        return 0
    with backpack(BatchGrad()):
        loss.backward()
    for parameter, gradients in zip(net.own, truth, strict=True):
        found = getattr(parameter, "grad_batch", None)
        if found is None:
            assert not gradients.any()
            continue
        assert found.shape == gradients.shape
        own = sizes_of(gradients)
        rounding = 1e-12 * max(1.0, float(own.max()))  # some gradients are zero but for rounding
        assert (sizes_of(found - gradients) <= 1e-8 * own + rounding).all()
    return 1


def check_all_individual_gradients(seeds, **options):
    count = 0
    for seed in seeds:
        try:
            count += check_individual_gradients(seed, **options)
        except Exception as error:
            net = Composition(seed, **options)
            raise AssertionError(f"seed {seed}, {net.sizes}: {', '.join(net.names)}") from error
    return count


@pytest.mark.filterwarnings("ignore:Samples are mixed by")
def test_individual_gradients_of_random_compositions_are_what_flows_through_their_rows():
    assert check_all_individual_gradients(range(150), length=6) > 140


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Samples are mixed by")
def test_individual_gradients_of_thousands_of_compositions_are_what_flows_through_their_rows():
    check_all_individual_gradients(range(10_000, 12_000), length=6)
    check_all_individual_gradients(range(20_000, 20_300), length=15)
    check_all_individual_gradients(range(30_000, 30_030), length=5, sizes=(40, 2, 2))


class Product(torch.autograd.Function):
    """A linear layer of which nothing is known."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_sample_far_smaller_than_another_keeps_its_gradient(precision):
    model = extend(Fn(lambda m, x: Product.apply(x, m.weight), weight=nn.Parameter(torch.randn(4, 3))))
    model.to(precision)
    x = torch.tensor([[1.0, -2.0, 3.0]], dtype=precision)
    x = torch.cat([x, x * torch.finfo(precision).eps ** 2])
    with backpack(BatchGrad()):
        model(x).sum().backward()
    assert torch.equal(model.weight.grad_batch, x[:, None].expand(2, 4, 3))


def put(h, places, count=None):
    """Rows of zeros to which those of ``h`` are added."""
    return h.new_zeros(count or len(h), *h.shape[1:]).index_add(0, torch.tensor(places, dtype=torch.int64), h)


def experts(m, h, chosen):
    """Rows go through different scalings; none goes through the last one."""
    out = torch.zeros_like(h)
    for k in range(3):
        where = (torch.tensor(chosen) == k).nonzero().flatten()
        out = out.index_add(0, where, h[where] * m.v * (k + 1))
    return out


SPECIAL = {
    "an expert without rows": (5, lambda m, h: experts(m, h, [0, 1, 1, 0, 1])),
    "one sample, and an expert without rows": (1, lambda m, h: experts(m, h, [0])),
    "a mask that selects nothing": (5, lambda m, h: h + (h * m.v)[h.detach() > 99].sum()),
    "samples without rows": (5, lambda m, h: put(h[[0, 0, 3]] * m.v, [0, 0, 3], 5)),
    "no sample of its own": (5, lambda m, h: (m.w * m.v).expand(5, 4) + 0 * h),
    "a scalar of each sample": (3, lambda m, h: torch.stack([h[k, 0] * m.w for k in range(3)]).unsqueeze(1)),
    "a scalar, expanded": (3, lambda m, h: torch.cat([(h[k, 1] * m.w).view(1).expand(2)[None] for k in range(3)])),
    "rows written one by one": (5, lambda m, h: torch.stack([(h * m.v)[4 - k].cumsum(0) for k in range(5)])),
    "spectra, permuted": (5, lambda m, h: torch.fft.fft(h * m.v)[[3, 2, 1, 0, 4]].abs()),
    "conjugates": (5, lambda m, h: (torch.complex(h, h.sin()).conj()[[3, 2, 1, 0, 4]] * m.v).real),
    "hfft": (5, lambda m, h: torch.fft.hfft(h * m.v)[[3, 0, 1, 2, 4]]),
    "best rows only": (
        6,
        lambda m, h: h.index_copy(0, torch.arange(3), h[h.sum(1).topk(3).indices] * m.v),
    ),
    "renorm along rows": (6, lambda m, h: torch.renorm(h * m.v, 2, 0, 1.0)),
    "renorm along columns": (6, lambda m, h: torch.renorm(h * m.v, 2, 1, 1.0)),
    "clamped by parameters": (6, lambda m, h: torch.clamp(h, -m.v.abs(), m.v.abs())),
    "clamped by others": (6, lambda m, h: torch.clamp(h, max=h.mean(0))),
    "distances of all pairs": (6, lambda m, h: torch.cdist(h * m.v, h)[:, :5]),
    "diagonal of a Gram matrix": (6, lambda m, h: torch.diagonal((h * m.v) @ h.T)[:, None]),
    "pairs of columns": (3, lambda m, h: torch.einsum("ni,nj->nij", h, h * m.v)),
    "windows over rows": (6, lambda m, h: put((h * m.v).unfold(0, 2, 1).flatten(1), range(5), 6)),
    "strided rows": (6, lambda m, h: (h * m.v).as_strided((6, 2), (4, 2))),
    "bags": (
        5,
        lambda m, h: m.v * F.embedding_bag(torch.tensor([0, 1, 1, 2, 3]), h, torch.arange(5), mode="sum"),
    ),
    "some rows replaced by a parameter": (5, lambda m, h: torch.where((torch.arange(5) > 2)[:, None], m.v, h)),
    "pooling over the batch": (6, lambda m, h: F.max_pool2d((h * m.v)[None], (2, 1))[0].repeat(2, 1)),
    "flip of one factor": (6, lambda m, h: (h * m.v).reshape(2, 3, 4).flip(1).reshape(6, 4)),
    "groups of rows, normalized": (6, lambda m, h: F.group_norm((h * m.v)[None], 2)[0]),
    "rows as channels, normalized by instance": (6, lambda m, h: F.instance_norm((h * m.v)[None])[0]),
    "rows as channels, normalized by the batch": (
        6,
        lambda m, h: F.batch_norm((h * m.v)[None], None, None, training=True)[0],
    ),
    "all normalized": (6, lambda m, h: F.layer_norm(h * m.v, h.shape)),
    "attention over rows": (6, lambda m, h: F.scaled_dot_product_attention(*([(h * m.v)[None, None]] * 3))[0, 0]),
    "running sum of all entries": (6, lambda m, h: (h * m.v).flatten().cumsum(0).reshape(6, 4)),
    "all entries rolled by a row": (6, lambda m, h: (h * m.v).roll(4)),
    "all entries rolled by less than a row": (6, lambda m, h: (h * m.v).roll(3)),
    "pixels shuffled": (6, lambda m, h: F.pixel_shuffle((h * m.v)[:, :, None, None], 2).flatten(1)),
    "columns sorted": (6, lambda m, h: (h * m.v).gather(1, h.argsort(1))),
    "rows sorted, column by column": (6, lambda m, h: (h * m.v).take_along_dim(h.argsort(0), 0)),
    "all entries taken backwards": (6, lambda m, h: (h * m.v).take(torch.arange(24).flip(0)).reshape(6, 4)),
    "grid sampling": (
        2,
        lambda m, h: F.grid_sample((h * m.v).reshape(2, 1, 2, 2), h.reshape(2, 1, 2, 2).tanh(), align_corners=True)[
            :, 0, 0
        ],
    ),
    "means of groups": (6, lambda m, h: torch.zeros(6, 4).index_reduce(0, torch.arange(6) // 2, h * m.v, "mean")),
    "maxima of groups": (
        6,
        lambda m, h: torch.zeros(6, 4).scatter_reduce(0, (torch.arange(6) // 2)[:, None].expand(6, 4), h * m.v, "amax"),
    ),
    "block diagonal": (2, lambda m, h: torch.block_diag(h[:1] * m.v, h[1:])),
    "gradients by vmap": (5, lambda m, h: torch.vmap(torch.func.grad(lambda row: (row * m.v).sin().prod()))(h)),
    "Jacobians by vmap": (5, lambda m, h: torch.vmap(torch.func.jacrev(lambda row: (row * m.v).tanh()))(h).flatten(1)),
}
"""Functions of a linear layer's output ``h``, ``[n, 4]``: what was wrong once, or could be."""


def special(formula, n):
    """A linear layer, a function of its output, and a batch, in float64."""
    torch.manual_seed(0)
    layer, v, w = nn.Linear(3, 4), nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(()))
    model = Fn(lambda m, x: formula(m, m.l(x)), l=layer, v=v, w=w).double()
    return model, torch.randn(n, 3, dtype=torch.float64)


def check_what_flows_through_rows(model, x, tolerance=1e-12):
    extend(model)
    out = model(x)
    loss = (out.tanh() * torch.randn_like(out)).sum()
    parameters = list(model.parameters())
    truth = through_rows(out, loss, parameters)
    with backpack(BatchGrad()):
        loss.backward()
    for parameter, gradients in zip(parameters, truth, strict=True):
        found = getattr(parameter, "grad_batch", torch.zeros_like(gradients))
        torch.testing.assert_close(
            found, gradients, rtol=tolerance, atol=tolerance * max(1, float(gradients.abs().max()))
        )


@pytest.fixture
def in_float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.filterwarnings("ignore:Samples are mixed by", "ignore:index_reduce.. is in beta")
@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", SPECIAL)
def test_what_flows_through_rows_is_right_for(name):
    n, formula = SPECIAL[name]
    check_what_flows_through_rows(*special(formula, n))


@pytest.mark.filterwarnings("ignore:Samples are mixed by")
@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    "places",
    [
        [0, 1, 2, 3],
        [3, 2, 1, 0],
        [0, 0, 3, 3],
        [1, 1, 2, 2],
        [3, 0, 1, 1],
    ],
    ids=str,
)
def test_rows_that_move_or_get_nothing_do_not_turn_a_square_output(places):
    """Its rows are the samples, also where the input's rows went elsewhere."""
    check_what_flows_through_rows(*special(lambda m, h: put(h * m.v, places), 4))


@pytest.mark.parametrize("n", [3, 4, 6, 40])
def test_two_samples_that_cancel_by_accident_are_seen_as_mixed(n):
    """In low precision, random contributions of two samples to one entry add up to zero now and then."""
    generator = torch.Generator()
    index = torch.arange(n)
    index[1] = 0
    node = torch.zeros(n, 1, dtype=torch.bfloat16, requires_grad=True)[index].grad_fn
    assert not any(coded(node, [Layout(n)], generator)[0] for _ in range(2000))


@pytest.mark.parametrize(
    "precision",
    [torch.float64, torch.float32, torch.bfloat16],
    ids=str,
)
def test_entries_that_cancel_by_accident_keep_their_sample(precision):
    """A row is taken twice, and its two random contributions add up to zero now and then. Owners are found exactly."""

    def formula(m, x):
        h = m.l(x)
        h = h[torch.arange(len(x)).repeat_interleave(2)].unflatten(0, (-1, 2)).sum(1)
        out = torch.zeros_like(h)
        for row in range(len(x)):
            out[row] = h[row]
        return out

    torch.manual_seed(0)
    model, x = Fn(formula, l=nn.Linear(3, 400, bias=False)).to(precision), torch.ones(64, 3, dtype=precision)
    extend(model)
    with backpack(BatchGrad()):
        model(x).sum().backward()
    assert (model.l.weight.grad_batch == 2).all()
