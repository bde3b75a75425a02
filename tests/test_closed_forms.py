"""Each reduction that a use has a closed form for: against plain autograd, beside the generic definition."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd.graph import GradientEdge, get_gradient_edge
from truths import close

from backpack.backward.arrivals import Arrival
from backpack.backward.collector import Collector, Prepared
from backpack.backward.plan import make_plan
from backpack.graph import count_outputs, read
from backpack.memory import AT_A_TIME
from backpack.nodes import GeneralUse, PlacedUse
from backpack.nodes.convolution import Convolution
from backpack.nodes.products import grad_rows_of, rows_of
from backpack.samples import Layout, Rows, Subset, found_layout
from backpack.samples.owners import find_owners
from backpack.uses import (
    Cotangents,
    Dense,
    DenseUse,
    Derived,
    ElementwiseUse,
    Explicit,
    Individual,
    Lookup,
    LookupUse,
    Parts,
    StackedUse,
    arrive_in_groups,
    join,
)
from backpack.uses.dense_gradients import SummedGroups
from backpack.uses.ragged import Ragged
from backpack.uses.windows import Windows

QUICK = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
N, T = 5, 3


def reductions(dense, weights, other):
    """What the methods of the same name return, from individual gradients ``[v, n, *p]`` and those of another."""
    counted = dense.square()
    weighted = counted if weights is None else torch.einsum("vn,vn...->vn...", weights, counted)
    flat, right = dense.flatten(2), other.flatten(2)
    return {
        "dense": dense,
        "total": dense.sum((0, 1)),
        "sum_squares": weighted.sum((0, 1)),
        "sample_squares": weighted.sum(0),
        "norms": counted.flatten(2).sum(2),
        "dots": torch.einsum("vnp,wmp->vnwm", flat, right),
        "sample_dots": (flat * right).sum(2),
    }


def laws(make, dense, other, other_dense, weights=None, sizes=None):
    """The methods of what ``make`` returns and their generic definitions, each on a fresh object, against the truth.

    ``sizes`` bound what is summed in ``dense`` and ``other_dense``, where terms may cancel.
    """
    truth = reductions(dense, weights, other_dense)
    first, second = (a.abs().max().expand_as(a) for a in (dense, other_dense)) if sizes is None else sizes
    bounds = reductions(first, None if weights is None else weights.abs(), second)

    def fresh():
        return make() if weights is None else make().weighted(weights)

    for name, expected in truth.items():
        arguments = (other(),) if name in ("dots", "sample_dots") else ()
        generic = getattr(Individual, name) if arguments else lambda a, name=name: Individual._sweep(a, [name])[name]
        assert close(getattr(fresh(), name)(*arguments), expected, bounds[name].max(), 1e-12), name
        if name != "dense":
            assert close(generic(fresh(), *arguments), expected, bounds[name].max(), 1e-12), f"generic {name}"
    alone, size = fresh(), first.flatten(2).norm(dim=2).max() ** 2
    assert close(alone.dots(alone), reductions(dense, None, dense)["dots"], size, 1e-12), "dots with itself"
    for known in ((), ("dense",)):  # several at once, also of what is stored already
        together = fresh()
        together.prepare([*known, "norms", "total", "sample_squares", "sum_squares"])
        for name in ("norms", "total", "sample_squares", "sum_squares"):
            assert close(getattr(together, name)(), truth[name], bounds[name].max(), 1e-12), f"{name} with others"
    v, n = dense.shape[:2]
    assert fresh().size == (v, n) and fresh().shape == dense.shape[2:]
    assert close(make().narrow(1, 3).dense(), dense[:, 1:3], first.max(), 1e-12)
    factor = torch.arange(1.0, n + 1, dtype=dense.dtype)
    assert close(make().scaled(factor).norms(), truth["norms"] * factor**2, n**2 * bounds["norms"].max(), 1e-12)


@pytest.fixture(params=[2**20, 1], ids=["whole", "chunks"])
def scratch(request, monkeypatch):
    """Of which use is made at a time: of all that fits into a bounded scratch, or of one sample."""
    for what in AT_A_TIME:
        monkeypatch.setitem(AT_A_TIME, what, request.param)
    monkeypatch.setattr("backpack.uses.dense_gradients.SMALL", request.param)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def index(*shape):
    return torch.randint(0, 4, shape)


CALLS = {
    # function, data, parameters (in the order of the call, or behind the data), options, axis of the samples
    "linear": (F.linear, lambda: (randn(N, 4), randn(3, 4), randn(3)), {}, 0),
    "linear_positions": (F.linear, lambda: (randn(N, T, 4), randn(3, 4), randn(3)), {}, 0),
    "linear_many_positions": (F.linear, lambda: (randn(N, 2, 9, 2), randn(2, 2)), {}, 0),
    "linear_sequence_first": (F.linear, lambda: (randn(T, N, 4), randn(3, 4), randn(3)), {}, 1),
    "matmul": (torch.matmul, lambda: (randn(N, T, 4), randn(4, 3)), {}, 0),
    "bilinear": (F.bilinear, lambda: (randn(N, T, 2), randn(N, T, 3), randn(4, 2, 3), randn(4)), {}, 0),
    "convolution": (F.conv2d, lambda: (randn(N, 4, 3, 4), randn(6, 4, 3, 3), randn(6)), {"padding": 1}, 0),
    "pixels": (F.conv2d, lambda: (randn(N, 64, 4, 4), randn(8, 64, 3, 3)), {"padding": 1}, 0),
    "pixels_apart": (
        F.conv1d,
        lambda: (randn(N, 64, 16), randn(16, 32, 5)),
        {"padding": 4, "dilation": 2, "groups": 2},
        0,
    ),
    "groups": (F.conv1d, lambda: (randn(N, 4, 9), randn(6, 2, 3)), {"groups": 2, "stride": 2}, 0),
    "depthwise": (F.conv1d, lambda: (randn(N, 4, 9), randn(4, 1, 3)), {"groups": 4}, 0),
    "transposed": (F.conv_transpose2d, lambda: (randn(N, 4, 2, 3), randn(4, 3, 2, 2)), {"stride": 2}, 0),
    "transposed_groups": (F.conv_transpose1d, lambda: (randn(N, 4, 5), randn(4, 3, 2)), {"groups": 2}, 0),
    "embedding": (F.embedding, lambda: (index(N, 6), randn(4, 3)), {"padding_idx": 2}, 0),
    "bag": (F.embedding_bag, lambda: (index(N, 6), randn(4, 3)), {"mode": "mean"}, 0),
    "layer_norm": (F.layer_norm, lambda: (randn(N, T, 4), [4], randn(4), randn(4)), {}, 0),
    "sum": (torch.add, lambda: (randn(N, T, 4), randn(T, 1)), {}, 0),
    "product": (torch.mul, lambda: (randn(N, T, 4), randn(4)), {}, 0),
}


class Arrivals(Collector):
    """What the cotangents of a call's output bring to its parameters, taken from the graph."""

    def completed(self, leaf, contributions):
        raise AssertionError("Nothing is to be computed.")

    def at(self, out, cotangents, leaf, generic):
        """Those at a parameter; ``generic``: of the general form."""
        for node, uses in self.plan.uses.items():
            own = [planned for planned in uses if planned.leaf is get_gradient_edge(leaf).node]
            arrived = Cotangents(self.cotangents(out, cotangents, node) if own else {})
            for planned in own:
                if generic:
                    layouts = [self.owners.owned.get((node, number)) for number in range(count_outputs(node))]
                    yield Arrival(GeneralUse(node, planned.k, layouts), arrived, planned.layout, planned.turned)
                else:
                    yield self.arrival(node, planned, arrived)

    def cotangents(self, out, cotangents, node):
        """At a node below."""
        places = [number for number in range(count_outputs(node)) if (node, number) in self.owners.owned]
        edges = [GradientEdge(node, number) for number in places]
        rows = [torch.autograd.grad(out, edges, seed, retain_graph=True) for seed in cotangents]
        return {number: torch.stack(found) for number, found in zip(places, zip(*rows, strict=True), strict=True)}


def bound(name, seeds, chosen, generic=False):
    """For each parameter of a call: what makes its individual gradients, and the truth by autograd."""
    function, arguments, options, axis = CALLS[name]
    args = arguments()
    leaves = [
        argument.requires_grad_()
        for argument in args
        if isinstance(argument, torch.Tensor) and N not in argument.shape[axis : axis + 1]
    ]
    out = function(*args, **options)
    edge, layout = get_gradient_edge(out), Layout(N, axis)
    graph, begin = read([edge]), {(edge.node, edge.output_nr): layout}
    owners = find_owners(graph, begin, torch.Generator())
    plan = make_plan(graph, owners, N, {get_gradient_edge(leaf).node for leaf in leaves})
    assert not plan.entries and len(plan.expected) == len(leaves)
    arrivals = Arrivals(Prepared(graph, begin, owners, plan))
    cotangents = randn(seeds, *out.shape)
    samples = range(N) if chosen is None else chosen
    own = layout.owners(out.shape, out.device)
    for leaf in leaves:

        def make(leaf=leaf):
            found = list(arrivals.at(out, cotangents, leaf, generic))
            return join([arrival.individual(Subset(chosen), leaf.shape, leaf.dtype) for arrival in found])

        for arrival in arrivals.at(out, cotangents, leaf, generic):
            assert isinstance(arrival.use, (GeneralUse, PlacedUse)) == generic, "all of these have closed forms"
        truth = [
            torch.autograd.grad(out, leaf, seed * (own == n), retain_graph=True)[0].to_dense()
            for seed in cotangents
            for n in samples
        ]
        yield make, torch.stack(truth).unflatten(0, (seeds, len(samples))).detach()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chosen", [None, [3, 1, 3, 4]], ids=["all", "some"])
@pytest.mark.parametrize("name", CALLS)
def test_closed_forms_of_each_function_agree_with_autograd(name, chosen, weighted, scratch):
    pairs = zip(bound(name, 3, chosen), bound(name, 3, chosen), strict=True)
    for (make, dense), (other, other_dense) in pairs:
        weights = randn(*dense.shape[:2]) if weighted else None
        with torch.no_grad():
            laws(make, dense, other, other_dense, weights)


@pytest.mark.parametrize("name", CALLS)
def test_the_general_form_gives_the_same_as_the_normal_form(name, scratch):
    pairs = zip(bound(name, 2, None, generic=True), bound(name, 2, None), strict=True)
    for (make, dense), (other, other_dense) in pairs:
        laws(make, dense, other, other_dense)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("ids", [[0, 1, 2, 0, 1, 2], [2, 0, 0, 1, 1, 1], [0, 0, 0, 0, 2, 2]], ids=str)
def test_rows_of_each_matrix_of_a_stack_are_used_by_themselves(ids, flipped, scratch):
    """PyTorch's product, ``grouped_mm``, has no float64."""
    ends, experts, samples = [2, 2, 6], [0, 0, 2, 2, 2, 2], 3

    def drawn():
        x, grad = randn(6, 4), randn(2, 6, 5)
        truth = torch.zeros(2, samples, 3, *((4, 5) if flipped else (5, 4)), dtype=torch.float64)
        for row, (sample, expert) in enumerate(zip(ids, experts, strict=True)):
            outer = torch.einsum("vo,i->voi", grad[:, row], x[row])
            truth[:, sample, expert] += outer.transpose(1, 2) if flipped else outer
        rows = Rows(found_layout(samples, torch.tensor(ids)[:, None], exactly=True))
        use = StackedUse(x, ends, rows_of, grad_rows_of, flipped)
        return lambda: use.arrive(Cotangents({0: grad}), rows, truth.shape[2:], torch.float64), truth

    (make, truth), (other, other_truth) = drawn(), drawn()
    for weights in (None, randn(2, samples)):
        with torch.no_grad():
            laws(make, truth, other, other_truth, weights)


@pytest.mark.parametrize("chosen", [None, [4, 0, 0, 2]], ids=["all", "some"])
@pytest.mark.parametrize("kind", ["linear", "lookup", "shift"])
def test_samples_of_very_different_lengths_are_computed_in_groups(kind, chosen, scratch, monkeypatch):
    monkeypatch.setattr("backpack.uses.ragged.SMALL", 0)
    ids = torch.tensor([0] * 9 + [1, 2, 3, 3, 5])[torch.randperm(14)]  # and sample 4 has no row
    index = None if chosen is None else torch.tensor(chosen)

    def drawn():
        x, rows, grad = randn(14, 4), torch.randint(0, 3, (14,)), randn(2, 14, 5)
        uses = {
            "linear": (DenseUse((x,), rows_of, grad_rows_of), (5, 4), torch.einsum("vro,ri->vroi", grad, x)),
            "lookup": (LookupUse(rows), (3, 5), torch.einsum("vro,rk->vrko", grad, F.one_hot(rows, 3).double())),
            "shift": (ElementwiseUse((1, 5)), (5,), grad),
        }
        use, shape, of_rows = uses[kind]
        truth = torch.zeros(2, 6, *shape, dtype=torch.float64).index_add(1, ids, of_rows)
        own = Rows(found_layout(6, ids[:, None], exactly=True), index)

        def make():
            found = arrive_in_groups(use, Cotangents({0: grad}), own, torch.Size(shape), torch.float64)
            assert isinstance(found, Ragged)
            return found

        return make, truth if index is None else truth[:, index]

    (make, truth), (other, other_truth) = drawn(), drawn()
    for weights in (None, randn(*truth.shape[:2])):
        with torch.no_grad():
            laws(make, truth, other, other_truth, weights)


@QUICK
@given(data=st.data())
def test_dot_products_of_patches_follow_from_those_of_pixels(data):
    torch.manual_seed(0)
    n, images, groups, channels = (data.draw(st.integers(1, 2)) for _ in range(4))
    options = [[data.draw(st.integers(low, 3)) for _ in range(2)] for low in (1, 1, 0, 1)]
    kernel, stride, padding, dilation = options
    x = randn(n * images, groups * channels, 7, 8)
    out = F.conv2d(x, randn(1, groups * channels, *kernel), None, stride, padding, dilation).shape[2:]
    columns = F.unfold(x, kernel, dilation, padding, stride).unflatten(0, (n, images)).unflatten(2, (groups, -1))
    truth = torch.einsum("nkgis,nlgit->ngkslt", columns, columns).flatten(4).flatten(2, 3)
    x, pads = x.unflatten(0, (n, images)), [p for p in reversed(padding) for _ in range(2)]
    found = Windows(kernel, out, stride, pads, dilation).gram(x if images > 1 else x[:, 0], groups)
    assert close(found, truth, columns.square().sum(), 1e-12)


@QUICK
@given(data=st.data())
def test_individual_gradients_of_small_kernels_one_for_each_channel(data):
    torch.manual_seed(0)
    n, channels = (data.draw(st.integers(1, 3)) for _ in range(2))
    kernel, stride, padding, dilation = ([data.draw(st.integers(low, 3)) for _ in range(2)] for low in (1, 1, 0, 1))
    x, weight = randn(n, channels, 7, 8), randn(channels, 1, *kernel).requires_grad_()
    options = [tuple(option) for option in (stride, padding, dilation)]
    out = F.conv2d(x, weight, None, *options, channels)
    grad = randn(*out.shape)
    rows = [torch.autograd.grad(out[k], weight, grad[k], retain_graph=True)[0] for k in range(n)]
    own = Convolution.of(x.shape, weight.shape, out.shape, *options, channels)
    assert own.is_small_depthwise
    found = own.individual(x, own.channels(grad[None])[0])
    assert close(found.reshape(n, *weight.shape), torch.stack(rows), 1.0, 1e-12)


@pytest.mark.parametrize("small", [(0, 0), (2**19, 2**26)], ids=["what they share", "one product"])
@QUICK
@given(data=st.data())
def test_second_moments_of_patches_are_those_of_unfolded_images(small, data):
    torch.manual_seed(0)
    options = [[data.draw(st.integers(low, 3)) for _ in range(2)] for low in (1, 1, 0, 1)]
    kernel, stride, padding, dilation = options
    x = randn(data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)), 7, 8)
    columns = F.unfold(x, kernel, dilation, padding, stride)
    out = F.conv2d(x, randn(1, x.shape[1], *kernel), None, stride, padding, dilation).shape[2:]
    windows = Windows(kernel, out, stride, [p for p in reversed(padding) for _ in range(2)], dilation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backpack.uses.windows.SMALL", small)
        found = windows.moments(x, 0.5)
    assert close(found, torch.einsum("nis,njs->ij", columns, columns) / 2, columns.square().sum(), 1e-12)


def dense(v, n, s, g, o, i):
    """Factors of individual gradients, and these themselves from the factors or their absolute values."""
    x, grad = randn(n, g, s, i), randn(v, n, g, s, o)
    return x, grad, [torch.einsum("vngso,ngsi->vngoi", f(grad), f(x)) for f in (torch.Tensor.clone, torch.abs)]


KINDS = ("rows", "columns", "sums", "lookup", "stored", "parts", "computed")


def individual(kind, v, n, s, g, r, c):
    """A use of a parameter ``[r, c]``, its individual gradients, and bounds of what is summed in them."""
    if kind == "rows":
        x, grad, found = dense(v, n, s, g, r // g, c)
        return lambda: Dense((x,), grad, torch.Size((r, c))), *(a.flatten(2, 3) for a in found)
    if kind == "columns":
        x, grad, found = dense(v, n, s, g, c, r // g)
        whole = (a.transpose(3, 4).flatten(2, 3) for a in found)
        return lambda: Dense((x,), grad, torch.Size((r, c)), flipped=True), *whole
    if kind == "sums":
        x, grad, found = dense(v, n, s, g, r, c // g)
        return lambda: SummedGroups((x,), grad, torch.Size((r, c))), *(a.transpose(2, 3).flatten(3) for a in found)
    if kind == "lookup":
        rows, grad, mask = torch.randint(0, r, (n, s)), randn(v, n, s, c), torch.rand(n, s) < 0.8
        grad = grad * mask[..., None]
        places = F.one_hot(rows, r).double()
        found = (torch.einsum("nsr,vnsc->vnrc", places, a) for a in (grad, grad.abs()))
        return lambda: Lookup(rows, grad, torch.Size((r, c)), mask), *found
    if kind == "stored":
        value = randn(v, n, r, c)
        return lambda: Explicit(value), value, value.abs()
    if kind == "parts":
        value, places = randn(v, n, 2, c), [int(place) for place in torch.randperm(r)[:2]]
        found = torch.zeros(v, n, r, c, dtype=value.dtype)
        found[:, :, places] = value[:, :, : len(places)]
        parts = {place: value[:, :, k] for k, place in enumerate(places)}
        whole = torch.Size((r, c))
        return lambda: Parts({place: Explicit(own) for place, own in parts.items()}, whole), found, found.abs()
    left, parameter, (inner, *found) = randn(r, r), randn(r, c), individual("rows", v, n, s, 1, r, c)
    return lambda: Derived(inner(), parameter, left.T.__matmul__), left.T @ found[0], left.T.abs() @ found[1]


@QUICK
@given(data=st.data())
def test_closed_forms_agree_with_stored_gradients_whatever_the_shapes(scratch, data):
    """Of one use, of one beside another, and of several of one parameter."""
    torch.manual_seed(0)
    size = st.integers(1, 4)
    v, n, g = data.draw(size), data.draw(size), data.draw(st.sampled_from([1, 2]))
    r, c = (g * data.draw(size) for _ in range(2))
    kinds = st.sampled_from(KINDS)

    def draw():
        drawn = data.draw(st.lists(kinds, min_size=1, max_size=3))
        parts = [individual(kind, v, n, data.draw(st.integers(1, 9)), g, r, c) for kind in drawn]
        makes, found, sizes = zip(*parts, strict=True)
        return lambda: join([make() for make in makes]), sum(found), sum(sizes)

    make, truth, bounds = draw()
    other, other_truth, other_bounds = draw()
    weights = randn(v, n) if data.draw(st.booleans()) else None
    with torch.no_grad():
        laws(make, truth, other, other_truth, weights, (bounds, other_bounds))
