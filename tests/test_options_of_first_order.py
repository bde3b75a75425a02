"""Projections, directions, weights and ways to clip, against individual gradients by a loop over samples."""

import copy

import numpy
import pytest
import torch
from models.layers import CASES as MODELS
from models.layers import build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset
from truths.autograd import individual_gradients
from truths.data_sets import LOSSES, giant, problem, targets
from truths.first_order import norms_of, subsets
from truths.options import Product, check_all, make_all

from backpack import accumulate, backpack, extend, verify
from backpack.extensions import (
    EKFAC,
    KFAC,
    KFLR,
    BatchDotGrad,
    BatchGrad,
    ClippedGrad,
    DiagGGNMC,
    ProjectedGrad,
    WeightedGrad,
)
from backpack.utils.kroneckers import (
    Eigen,
    apply_kfac_mat_prod,
    eigh_kfacs,
    inv_kfacs,
    inv_sqrt_kfacs,
    kfacs_to_mat,
)


def parameters_of(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def on_parameters(model):
    return lambda extension: {name: extension.result(p) for name, p in parameters_of(model).items() if vars(p)}


@pytest.mark.parametrize("name", MODELS)
def test_each_follows_from_individual_gradients(name):
    problem = build(name)
    keys = list(subsets(problem.n))
    given, rows = subsets(problem.n)[keys[sum(map(ord, name)) % len(keys)]]
    truth = problem.individual_gradients()
    made = make_all(truth, given, rows)
    extend(problem.model)
    with backpack(*made.values()):
        problem.loss().backward()
    check_all(on_parameters(problem.model), made, truth, given, rows)


@pytest.mark.parametrize("rows", [None, [7, 2, -1, 2]])
@pytest.mark.parametrize("kind", ["mean", "sum", "weighted", "mse"])
def test_a_data_set_gives_what_one_batch_of_all_samples_would(kind, rows, tmp_path):
    lossfunc, divided = LOSSES[kind]
    model, lossfunc, X, _ = problem(copy.deepcopy(lossfunc))
    y = targets(kind)
    truth = giant(model, lossfunc, X, y, divided(y))["individual"]
    chosen = list(range(11))[:] if rows is None else rows
    data = DataLoader(TensorDataset(X, y), batch_size=4)
    for where in ({}, {"stream": tmp_path}):
        made = make_all(truth, rows, chosen)
        found = accumulate(model, lossfunc, data, *made.values(), **where)
        check_all(lambda extension: found[extension], made, truth, rows, chosen)  # noqa: B023
        check_all(on_parameters(model), made, truth, rows, chosen)
    shared = made["projected across the model"].savefield
    assert (tmp_path / f"{shared}.npy").exists() and not list(tmp_path.glob(f"{shared}.*.npy"))
    numbers = numpy.load(tmp_path / f"samples.{shared}.npy")
    assert numbers.tolist() == [row % 11 for row in chosen]


@pytest.mark.parametrize("subsampling", [None, [3, 0, 3]])
def test_verify_compares_each_and_finds_what_is_wrong(subsampling, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(12, 3))
    batch = torch.rand(4, 2, 4, 4), torch.tensor([0, 2, 1, 2])
    rows = list(range(4)) if subsampling is None else subsampling
    shaped = {name: torch.randn(4, *p.shape) for name, p in model.named_parameters()}
    made = [*make_all(shaped, subsampling, rows).values(), ClippedGrad(0.1, subsampling, per_sample=True)]
    outcome = verify(model, nn.CrossEntropyLoss(), *batch, *made)
    assert {row.verdict for row in outcome.rows} == {"right"} and len(outcome.rows) == 4 * len(made), outcome
    for cls in (WeightedGrad, BatchDotGrad, ProjectedGrad):
        own = [extension for extension in made if isinstance(extension, cls)]
        with monkeypatch.context() as changed:
            changed.setattr(cls, "compute", lambda self, grads, before=cls.compute: 1.01 * before(self, grads))
            changed.setattr(cls, "measure", cls.compute)
            outcome = verify(model, nn.CrossEntropyLoss(), *batch, *own)
        found = {row.quantity for row in outcome.rows if row.verdict == "wrong"}
        assert found == {extension.savefield for extension in own}, outcome


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("subsampling", [None, [5, 1, 1]])
def test_per_sample_bounds_the_gradients_of_the_samples_own_losses(reduction, subsampling):
    model, lossfunc, X, y = problem(nn.CrossEntropyLoss(reduction=reduction))
    divided = 11 if reduction == "mean" else 1
    rows = list(range(11)) if subsampling is None else subsampling
    truth = {name: g[rows] for name, g in giant(model, lossfunc, X, y, divided)["individual"].items()}
    norms = divided * norms_of(truth)
    bound = float(norms.median())
    clipped = ClippedGrad(bound, subsampling, per_sample=True)
    extend(model)
    with backpack(clipped):
        extend(lossfunc)(model(X), y).backward()
    assert torch.allclose(clipped.norms, norms, rtol=1e-9)
    data = DataLoader(TensorDataset(X, y), batch_size=4)
    found = accumulate(model, lossfunc, data, ClippedGrad(bound, subsampling, "over_data", per_sample=True))
    for name, parameter in parameters_of(model).items():
        expected = torch.einsum("n,n...->...", (bound / norms).clamp(max=1), truth[name])
        assert torch.allclose(parameter.grad_clipped, expected, rtol=1e-9, atol=1e-15)
        assert torch.allclose(found["over_data"][name], expected, rtol=1e-9, atol=1e-15)


def test_norms_are_given_for_each_group():
    model, lossfunc, X, y = problem()
    truth = giant(model, lossfunc, X, y, 11)["individual"]
    extend(model)
    groups = [model[0].parameters(), ["2.weight", model[2].bias]]
    made = [
        ClippedGrad(1.0),
        ClippedGrad([0.01, 1.0], per=groups, savefield="b"),
        ClippedGrad(1.0, None, "c", "parameter"),
    ]
    with pytest.raises(AttributeError, match="no norms yet"):
        _ = made[0].norms
    with backpack(*made):
        extend(lossfunc)(model(X), y).backward()
    assert torch.allclose(made[0].norms, norms_of(truth))
    for number, own in enumerate(made[1].norms):
        members = {name: g for name, g in truth.items() if name.startswith(str(2 * number))}
        assert torch.allclose(own, norms_of(members))
        for name, g in members.items():
            factors = ([0.01, 1.0][number] / own).clamp(max=1)
            found = made[1].result(model.get_parameter(name))
            assert torch.allclose(found, torch.einsum("n,n...->...", factors, g))
    assert made[2].norms.keys() == truth.keys()
    assert all(torch.allclose(made[2].norms[name], norms_of({name: g})) for name, g in truth.items())


def projected_norms(shape, kind, dim, seeds):
    """Dot products of projections of two vectors, their sum and their difference, with many seeds."""
    torch.manual_seed(0)
    u, v = torch.randn(2, *shape, dtype=torch.float64)
    model = extend(Product("weight", u))
    found = []
    for seed in range(seeds):
        with backpack(ProjectedGrad(dim, kind, seed)):
            model(torch.stack([u, v, u + v, u - v])).sum().backward()
        found.append(model.weight.grad_projected @ model.weight.grad_projected.T)
    return u, v, torch.stack(found)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "sparse"])
@pytest.mark.parametrize("shape", [(40,), (12, 15), (6, 2, 3, 3), (3, 8, 9), (1, 7, 11), ()])
def test_projections_keep_norms_and_dot_products_as_their_dimension_says(kind, shape):
    """Johnson-Lindenstrauss: the mean over seeds, and the variance, within what their number allows."""
    seeds, dim = 600, 16
    u, v, grams = projected_norms(shape, kind, dim, seeds)
    bound = (1 + 2 / 4) ** 2 - 1 if len(shape) > 1 else 2 / 16
    for place, vector in ((0, u), (1, v)):
        ratios = grams[:, place, place] / vector.square().sum()
        assert abs(ratios.mean() - 1) < 6 * (bound / seeds) ** 0.5
        assert ratios.var() < 2 * bound
    both = (2 * bound * sum(w.square().sum() ** 2 for w in (u + v, u - v)) / 16) ** 0.5
    assert abs(grams[:, 0, 1].mean() - (u * v).sum()) < 6 * both / seeds**0.5


def test_projections_across_the_model_keep_dot_products_of_whole_gradients():
    model, lossfunc, X, y = problem()
    truth = giant(model, lossfunc, X, y, 11)["individual"]
    flat = torch.cat([g.flatten(1) for g in truth.values()], 1)
    seeds, dim, found = 400, 64, []
    extend(model), extend(lossfunc)
    for seed in range(seeds):
        with backpack(ProjectedGrad(dim, seed=seed, across="model")):
            lossfunc(model(X), y).backward()
        projected = model[0].bias.grad_projected
        assert projected.shape == (11, dim) and all(p.grad_projected is projected for p in model.parameters())
        found.append(projected @ projected.T)
    mean, true = torch.stack(found).mean(0), flat @ flat.T
    error = torch.stack(found).std(0) / seeds**0.5
    assert ((mean - true).abs() < 6 * error + 1e-12).all()
    assert (error * seeds**0.5 < 0.7 * true.diagonal().max()).all()


def test_matrices_are_the_same_in_all_batches_and_depend_on_seed_and_name():
    model, lossfunc, X, y = problem()
    extend(model), extend(lossfunc)
    found = []
    for seed in (0, 0, 1):
        with backpack(ProjectedGrad(4, seed=seed)):
            lossfunc(model(X), y).backward()
        found.append(model[0].weight.grad_projected)
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


def test_drawn_matrices_do_not_depend_on_the_machine():
    """Signs that were drawn once: integers of PyTorch's generator on the CPU, which is one for all machines."""
    model = extend(Product("layer.weight", torch.zeros(6, 5, dtype=torch.float64)))
    units = torch.eye(30, dtype=torch.float64).reshape(30, 6, 5)
    torch.manual_seed(17)  # it does not matter
    with backpack(ProjectedGrad(9, "rademacher", 3)):
        model(units).sum().backward()
    (parameter,) = model.parameters()
    signs = (parameter.grad_projected[::4, 0] > 0).int().tolist()
    assert signs == [0, 1, 0, 0, 0, 1, 0, 0]


SCALES = {
    "entries": (lambda p: torch.rand_like(p) + 0.5, lambda s, g: g * s),
    "factors": (
        lambda p: [torch.randn(size, size, dtype=p.dtype) for size in (p.shape if p.dim() < 3 else (p.numel(),))],
        lambda s, g: apply_kfac_mat_prod(s, g.flatten(1).T).T.reshape(g.shape),
    ),
    "eigen": (
        lambda p: eigh_kfacs([(a := torch.randn(size, size, dtype=p.dtype)) + a.T for size in p.shape]),
        lambda s, g: (s.dense() @ g.flatten(1).T).T.reshape(g.shape),
    ),
}


@pytest.mark.parametrize("form", SCALES)
def test_gradients_are_multiplied_before_they_are_projected(form):
    """With all dimensions kept, what is projected can be read."""
    model, lossfunc, X, y = problem()
    truth = giant(model, lossfunc, X, y, 11)["individual"]
    make, multiplied = SCALES[form]
    scale = {name: make(p.detach()) for name, p in model.named_parameters()}
    assert form != "eigen" or all(isinstance(own, Eigen) for own in scale.values())
    extend(model)
    with backpack(ProjectedGrad(10**4, scale=scale)):
        extend(lossfunc)(model(X), y).backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad_projected, multiplied(scale[name], truth[name]).flatten(1), atol=1e-12)


def net():
    return extend(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double())


WRONG = {
    "no directions": (
        lambda: BatchDotGrad(against={"0.weight": torch.ones(2, 5, 4)}),
        "no directions for parameter 2.bias",
    ),
    "other shape": (
        lambda: BatchDotGrad(against={n: torch.ones(2, *p.shape, 1) for n, p in net().named_parameters()}),
        r"2.bias of shape \[3\] .*\['V', 3\].*\[2, 3, 1\]",
    ),
    "other number": (
        lambda: BatchDotGrad(against={n: torch.ones(p.dim(), *p.shape) for n, p in net().named_parameters()}),
        "as many directions for all",
    ),
    "other row": (lambda: BatchDotGrad(against=[7]), "index 7 is out of range"),
    "weights": (lambda: WeightedGrad([1.0, 2.0]), "2 weights for 6 samples"),
    "axes": (lambda: WeightedGrad(torch.ones(6, 1)), r"one axis.*\[6, 1\]"),
    "no group": (lambda: ClippedGrad(1.0, per=[["0.weight", "0.bias", "2.weight"]]), "2.bias .* is in 0 of the groups"),
    "two groups": (
        lambda: ClippedGrad(1.0, per=[["0.weight", "0.bias", "2.weight", "2.bias"]] * 2),
        "2.bias .* is in 2 of",
    ),
    "neither": (ClippedGrad, "either max_norm"),
    "both": (lambda: ClippedGrad(1.0, rule=torch.ones_like), "either max_norm"),
    "no rule": (lambda: ClippedGrad(rule=3), "rule must be a function"),
    "per": (lambda: ClippedGrad(1.0, per="layer"), "per must be"),
    "bounds": (lambda: ClippedGrad([1.0, 2.0]), "2 bounds"),
    "zero": (lambda: ClippedGrad([1.0, 0.0], per=[[], []]), "must be positive"),
    "factors": (lambda: ClippedGrad(rule=lambda norms: norms[:2]), r"rule must take norms of shape \[6\]"),
    "unknown loss": (lambda: ClippedGrad(1.0, per_sample=True), "must know whether the loss is a mean"),
    "dim": (lambda: ProjectedGrad(0), "dim must be positive"),
    "kind": (lambda: ProjectedGrad(3, "uniform"), "kind must be one of"),
    "across": (lambda: ProjectedGrad(3, across="layer"), "across must be"),
    "scale": (lambda: ProjectedGrad(3, scale=[1]), "scale must map names"),
    "nothing": (lambda: ProjectedGrad(3, scale={"0.weight": torch.ones(5, 4)}), "nothing for parameter 2.bias"),
    "shape": (lambda: ProjectedGrad(3, scale={"2.bias": torch.ones(4)}), r"2.bias has shape \[4\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_an_error_and_leaves_nothing(case):
    make, message = WRONG[case]
    model, X = net(), torch.rand(6, 4, dtype=torch.float64)
    out = model(X).square().mean()
    with pytest.raises((ValueError, TypeError, IndexError, RuntimeError), match=message), backpack(make()):
        out.backward()
    model.zero_grad()
    with backpack(BatchGrad()):
        model(X).square().mean().backward()
    assert all(vars(p).keys() == {"grad_batch"} for p in model.parameters())


def test_parts_that_were_extended_by_themselves_have_no_projection_as_their_names_are_not_their_own():
    first, second = extend(nn.Linear(4, 5)), extend(nn.Linear(5, 3))
    with pytest.raises(ValueError, match="several parameters have the name"), backpack(ProjectedGrad(3)):
        second(first(torch.rand(6, 4))).sum().backward()


def test_names_are_those_in_the_whole_model_also_if_a_part_was_extended_first():
    model, lossfunc, X, y = problem()
    data = [*zip(X.split(4), y.split(4), strict=True)]
    quantities = [ProjectedGrad(4), BatchDotGrad(against=[3]), EKFAC(fisher="exact")]
    expected = accumulate(copy.deepcopy(model), lossfunc, data, *quantities)
    extend(model[0])
    found = accumulate(model, lossfunc, data, *quantities)
    for name in parameters_of(model):
        assert torch.equal(found.grad_projected[name], expected.grad_projected[name])
        assert torch.equal(found.batch_dot[name], expected.batch_dot[name])
        assert torch.equal(found.ekfac[name].eigenvalues, expected.ekfac[name].eigenvalues)


class Adapted(nn.Module):
    """A frozen linear layer with a trained correction of low rank, as LoRA adds it."""

    def __init__(self, inputs, outputs, rank):
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Shapes(TorchDispatchMode):
    """Notes the shapes of all tensors that are computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen.update(tuple(t.shape) for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        return result


@pytest.mark.parametrize("positions", [(), (6,)])
def test_adapters_of_frozen_layers_are_right_and_what_is_frozen_costs_nothing(positions):
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(13, 17, 2), nn.Tanh(), Adapted(17, 11, 3)).double()
    X, y = torch.randn(5, *positions, 13, dtype=torch.float64), torch.randn(5, *positions, 11, dtype=torch.float64)
    lossfunc = nn.MSELoss()
    parameters = parameters_of(model)
    terms = [lossfunc(model(X[n : n + 1]), y[n : n + 1]) / 5 for n in range(5)]
    grads = individual_gradients(terms, list(parameters.values()))
    truth = dict(zip(parameters, grads, strict=True))
    made = make_all(truth, None, list(range(5)))
    extend(model), extend(lossfunc)
    loss = lossfunc(model(X), y)
    with Shapes() as plain:
        loss.backward(retain_graph=True)
    with Shapes() as ours, backpack(*made.values(), KFAC(approx="expand"), DiagGGNMC()):
        loss.backward()
    check_all(on_parameters(model), made, truth, None, list(range(5)))
    frozen = {shape for m in model if isinstance(m, Adapted) for shape in [tuple(m.base.weight.shape)]}
    frozen |= {shape[::-1] for shape in frozen} | {(13, 13), (17, 17), (11, 11)} - {
        tuple(factor.shape) for p in parameters.values() for factor in p.kfac
    }
    assert not {shape[-2:] for shape in ours.seen - plain.seen} & frozen


@pytest.mark.parametrize("form", ["ekfac", "kflr"])
def test_dot_products_of_scaled_gradients_are_those_with_the_inverse_curvature(form):
    """Of transposed convolutions, too, whose factors refer to the weight with its first two axes exchanged."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 2, 2), nn.Tanh(), nn.ConvTranspose2d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)
    ).double()
    X, y, lossfunc = torch.rand(5, 2, 4, 4, dtype=torch.float64), torch.arange(5) % 3, nn.CrossEntropyLoss()
    extend(model), extend(lossfunc)
    with backpack(KFLR(), EKFAC(fisher="exact"), BatchGrad()):
        lossfunc(model(X), y).backward()
    scale, matrices, grads = {}, {}, {}
    for name, p in model.named_parameters():
        eigen, shifts = p.ekfac, [0.1] * len(p.kflr)
        scale[name] = eigen.power(-0.5, 0.1) if form == "ekfac" else inv_sqrt_kfacs(p.kflr, shifts)
        matrices[name] = eigen.power(-1, 0.1).dense() if form == "ekfac" else kfacs_to_mat(inv_kfacs(p.kflr, shifts))
        grads[name] = (p.grad_batch.transpose(1, 2) if name == "2.weight" else p.grad_batch).flatten(1)
    with backpack(ProjectedGrad(10**5, scale=scale)):
        lossfunc(model(X), y).backward()
    for name, p in model.named_parameters():
        expected = grads[name] @ matrices[name] @ grads[name].T
        assert torch.allclose(p.grad_projected @ p.grad_projected.T, expected, rtol=1e-9, atol=1e-14), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
@pytest.mark.parametrize("subsampling", [None, [3, 0]])
@pytest.mark.parametrize("channels", [2, 5, 24])
def test_clipped_sums_of_layers_with_many_positions(channels, subsampling, dtype, tolerance):
    """Their individual gradients are kept for the sum, or made again, as they are small or large beside the images."""
    layers = [nn.Conv2d(2, channels, 3, padding=1), nn.GroupNorm(1, channels), nn.Tanh()]
    layers += [nn.Conv2d(channels, 2 * channels, 3), nn.Flatten(2), nn.Linear(100, 3), nn.Flatten()]
    model, lossfunc = extend(nn.Sequential(*layers).to(dtype)), nn.CrossEntropyLoss()
    X, y = torch.randn(5, 2, 12, 12, dtype=dtype), torch.randint(3, (5,))
    truth = individual_gradients(
        [lossfunc(model(X[n : n + 1]), y[n : n + 1]) / 5 for n in range(5)], model.parameters()
    )
    norms = torch.stack([own.flatten(1).square().sum(1) for own in truth]).sum(0).sqrt()
    bound, chosen = float(norms.mean()), list(range(5)) if subsampling is None else subsampling
    with backpack(ClippedGrad(bound, subsampling=subsampling)):
        lossfunc(model(X), y).backward()
    factor = (bound / norms).clamp(max=1)
    for parameter, own in zip(model.parameters(), truth, strict=True):
        expected = torch.einsum("n,n...->...", factor[chosen], own[chosen])
        torch.testing.assert_close(
            parameter.grad_clipped, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        )
