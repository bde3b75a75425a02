"""Lower precision, scaled losses, recomputed activations: the same results, to what the data type holds."""

import copy
import random

import pytest
import torch
from fuzz.models import model_and_inputs
from models.small import differentiate
from torch import nn
from torch.utils._pytree import tree_leaves
from truths import close
from truths.autograd import individual_gradients
from truths.data_sets import giant, parameters_of, problem
from truths.first_order import clipped, norms_of, quantities
from truths.second_order import hessian_diagonals

from backpack import accumulate, across_processes, backpack, extend
from backpack.extensions import (
    EKFAC,
    KFLR,
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagHessian,
    DiagHessianMC,
    GGNGram,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)
from backpack.nodes.convolution import Convolution

EXTENSIONS = (BatchGrad, BatchL2Grad, SumGradSquared, Variance, DiagGGNExact)


def check(found, truth, rtol):
    """By the size of all parameters' gradients: those of one may be small."""
    largest = max(g.abs().max() for g in truth["individual"].values())
    for name, g in truth["individual"].items():
        expected = {**quantities(g), "diag_ggn_exact": truth["roots"][name].square().sum((0, 1))}
        for field in (extension.savefield for extension in EXTENSIONS):
            size = largest if field == "grad_batch" else largest**2
            assert found[field][name].dtype == torch.float32
            assert close(found[field][name].double(), expected[field], size, rtol), (name, field)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_a_data_set_gives_the_same_in_lower_precision(dtype):
    model, lossfunc, X, y = problem()
    truth = giant(model, lossfunc, X, y, 11)
    model, data = model.float(), [*zip(X.float().split(4), y.split(4), strict=True)]
    with torch.autocast("cpu", dtype=dtype):
        found = accumulate(model, lossfunc, data, *(extension() for extension in EXTENSIONS))
    check(found, truth, 16 * torch.finfo(dtype).eps)


def tiny(factor):
    """Gradients too small for float16."""
    model, _, X, y = problem()

    class Tiny(nn.Module):
        reduction = "sum"

        def forward(self, out, target):
            return (out.float() - target).square().sum() * factor

    y = torch.randn(11, 3, dtype=torch.float64)
    return model, extend(Tiny()), X, y


def check_scaled(found, model, X, y, factor, bound):
    parameters = parameters_of(model)
    terms = (model(X) - y).square().sum(1) * factor
    individual = dict(zip(parameters, individual_gradients(terms, parameters.values()), strict=True))
    assert bound < norms_of(individual).max()
    of_clipped = clipped(individual, bound)
    for name, g in individual.items():
        size, rtol = g.abs().max(), 0.02
        assert close(found["grad_batch"][name].double(), g, rtol=rtol)
        assert close(found["sum_grad_squared"][name].double() * 1e12, g.square().sum(0) * 1e12, rtol=rtol)
        assert close(found["variance"][name].double() * 1e12, g.var(0, correction=0) * 1e12, rtol=rtol)
        assert close(found["grad_clipped"][name].double(), of_clipped[name], size, rtol)
    return individual


def test_results_of_a_scaled_loss_are_unscaled():
    factor, bound = 1e-9, 1e-8
    model, lossfunc, X, y = tiny(factor)
    half = extend(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    half.load_state_dict(model.state_dict())
    x, t = X.float(), y.float()
    extensions = [BatchGrad(), SumGradSquared(), Variance(), ClippedGrad(bound), DiagGGNExact()]
    with torch.autocast("cpu", dtype=torch.float16):
        lost = accumulate(half, lossfunc, [(x, t)], BatchGrad())
        assert not lost["grad_batch"]["0.weight"].any()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        found = accumulate(half, lossfunc, [(x[:6], t[:6]), (x[6:], t[6:])], *extensions, scaler=scaler)
        individual = check_scaled(found, model, X, y, factor, bound)
        loss = lossfunc(half(x), t)
    assert close(found.loss, loss.detach().double(), rtol=1e-3)
    assert all(close(found.grad[name].double(), g.sum(0), rtol=0.02) for name, g in individual.items())
    with across_processes(half, *extensions, samples=11, scaler=scaler):
        scaler.scale(loss).backward()
    loop = {e.savefield: {name: getattr(p, e.savefield) for name, p in half.named_parameters()} for e in extensions}
    check_scaled(loop, model, X, y, factor, bound)
    for name, value in found["diag_ggn_exact"].items():
        assert close(value * 1e6, loop["diag_ggn_exact"][name] * 1e6, rtol=0.02) and value.any()


def test_bases_of_a_data_set_do_not_depend_on_a_gradient_scaler():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    X, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(3, (12,))
    data = [*zip(X.split(4), y.split(4), strict=True)]
    extension = EKFAC(fisher="empirical")  # its first pass computes no gradients that could overflow
    expected = accumulate(model, nn.CrossEntropyLoss(), data, extension)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    found = accumulate(model, nn.CrossEntropyLoss(), data, extension, scaler=scaler)
    for name, eigen in expected["ekfac"].items():
        torch.testing.assert_close(found["ekfac"][name].dense(), eigen.dense())


def test_an_overflow_is_an_error():
    model, lossfunc, X, y = tiny(1.0)
    model = model.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(OverflowError, match="init_scale"):
        accumulate(model, lossfunc, [(X.float(), y.float())], BatchGrad(), scaler=scaler)


def test_sums_over_batches_of_a_bfloat16_model_are_not_rounded_at_each_batch():
    model, lossfunc = nn.Linear(1, 1, bias=False).bfloat16(), nn.MSELoss(reduction="sum")
    nn.init.zeros_(model.weight)
    X, y = torch.ones(600, 1).bfloat16(), -torch.ones(600, 1).bfloat16() / 2
    extensions = SumGradSquared(), EKFAC(fisher="empirical")
    found = accumulate(model, lossfunc, [*zip(X.split(1), y.split(1), strict=True)], *extensions)
    assert found["ekfac"]["weight"].eigenvalues.item() == 600.0
    assert found["sum_grad_squared"]["weight"].item() == 600.0  # in bfloat16, 256 + 1 = 256
    assert found.grad["weight"].item() == 600.0


OTHERS = (SqrtGGNExact, BatchDotGrad, DiagHessian, BatchDiagHessian)


def test_channels_with_a_kernel_each_give_the_same_in_single_precision(monkeypatch):
    """There, and on a CPU, PyTorch's own code for such weights computes individual gradients."""
    torch.manual_seed(0)
    taken, individual = [], Convolution.individual
    monkeypatch.setattr(Convolution, "individual", lambda *a: taken.append(True) or individual(*a))
    model = nn.Sequential(nn.Conv2d(6, 6, 3, 2, 1, groups=6), nn.Tanh(), nn.Flatten(), nn.Linear(96, 4))
    X, y, lossfunc = torch.randn(5, 6, 8, 8), torch.tensor([0, 3, 1, 1, 2]), extend(nn.CrossEntropyLoss())
    found = []
    for dtype in (torch.float32, torch.float64):
        own = extend(copy.deepcopy(model).to(dtype))
        chosen = [cls(subsampling=[4, 0, 0]) for cls in (*EXTENSIONS, *OTHERS)]
        with backpack(*chosen, EKFAC(fisher="empirical")):
            lossfunc(own(X.to(dtype)), y).backward()
        results = {name: value for name, value in vars(own[0].weight).items() if name != "ekfac"}
        found.append({**results, "ekfac": own[0].weight.ekfac.dense()})
        assert bool(taken) == (dtype == torch.float32)
        taken.clear()
    assert len(found[0]) == len(EXTENSIONS) + len(OTHERS) + 1
    assert all(close(found[0][name].double(), value, rtol=1e-5) for name, value in found[1].items())


QUANTITIES = (BatchGrad, SumGradSquared, BatchDotGrad, BatchDiagGGNExact, GGNGram, DiagHessian, BatchDiagHessian, KFLR)


def moved(value, step):
    """A tensor or the parameters of a model, moved by random steps of this relative size."""
    if isinstance(value, nn.Module):
        with torch.no_grad():
            for p in value.parameters():
                p.copy_(moved(p, step))
        return value
    return value + step * value.abs().clamp(min=0.1) * torch.randn_like(value) if value.is_floating_point() else value


@pytest.mark.parametrize("seed", range(60))
def test_single_precision_gives_the_same_up_to_what_its_rounding_does_to_the_parameters(seed):
    """For random models, there are ways of computing that only single precision takes."""
    torch.manual_seed(seed)
    model, X, _, _ = model_and_inputs(random.Random(seed))
    model, X = model.float(), X.float() if X.is_floating_point() else X
    target = torch.rand_like(copy.deepcopy(model)(X).detach())

    def results(dtype, step=0.0):
        own, x = moved(copy.deepcopy(model).to(dtype), step), moved(X.to(dtype) if X.is_floating_point() else X, step)
        extend(own)
        with backpack(*(quantity() for quantity in QUANTITIES)):
            extend(nn.MSELoss(reduction="sum"))(own(x), target.to(dtype)).backward()
        parameters = [p for p in own.parameters() if p.requires_grad and p.numel()]
        found = [[vars(p)[quantity.savefield] for p in parameters] for quantity in QUANTITIES]
        return [torch.cat([part.double().flatten() for part in tree_leaves(own)]) for own in found]

    exact, eps = results(torch.float64), torch.finfo(torch.float32).eps
    changes = [results(torch.float64, eps) for _ in range(4)]
    for quantity, single, true, *others in zip(QUANTITIES, results(torch.float32), exact, *changes, strict=True):
        allowed = 30 * max((other - true).abs().max() for other in others) + 1e-4 * true.abs().max() + 1e-7
        assert (single - true).abs().max() < allowed, quantity


def test_results_can_be_kept_on_another_device():
    """Without a GPU the place is the same, but the way is gone."""
    model, lossfunc, X, y = problem()
    data = [*zip(X.split(4), y.split(4), strict=True)]
    truth = giant(model, lossfunc, X, y, 11)
    found = accumulate(model, lossfunc, data, BatchGrad(), Variance(), offload="cpu")
    for name, g in truth["individual"].items():
        assert close(found["grad_batch"][name], g) and close(found["variance"][name], g.var(0, correction=0))


class Mixed(nn.Module):
    """Layers of float32 and float64 in a random order, with functions of tensors in both between."""

    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        self.kinds = [draw.choice(["chain", "product", "quotient", "sum", "joined"]) for _ in range(3)]
        dtypes = [draw.choice([torch.float32, torch.float64]) for _ in range(7)]
        dtypes[seed % 7] = torch.float32
        self.layers = nn.ModuleList(nn.Linear(3, 3, dtype=dtype) for dtype in dtypes)
        self.scale = nn.Parameter(torch.rand(3, dtype=draw.choice([torch.float32, torch.float64])) + 0.5)

    def forward(self, x):
        for number, kind in enumerate(self.kinds):
            one, other = self.layers[2 * number : 2 * number + 2]
            a, b = one(x.to(one.weight.dtype)).tanh(), other(x.to(other.weight.dtype))
            if kind == "chain":
                x = other(a.to(other.weight.dtype)).sigmoid()
            elif kind == "product":
                x = a * b * self.scale
            elif kind == "quotient":
                x = a / (b.cos() + 2)
            elif kind == "sum":
                x = (a + self.scale * b).sin()
            else:
                x = torch.cat([a, b], 1).softmax(1)[:, 1:4]
        return self.layers[-1](x.to(self.layers[-1].weight.dtype)).double()


@pytest.mark.parametrize("seed", range(12))
def test_the_hessian_of_parts_in_two_precisions_is_that_in_the_higher_one(seed):
    torch.manual_seed(seed)
    model, lossfunc = Mixed(seed), nn.MSELoss()
    X, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    truth = hessian_diagonals(copy.deepcopy(model).double(), X, lossfunc, y)
    differentiate(
        model, lossfunc, X, y, DiagHessian(), BatchDiagHessian(), DiagHessianMC(2), DiagGGNExact(), BatchGrad()
    )
    size = 0.1 * max(t.abs().max() for t in truth)
    for p, expected in zip(model.parameters(), truth, strict=True):
        if p.grad is None:  # it is not used
            continue
        assert p.diag_h.dtype == p.diag_h_batch.dtype == p.diag_h_mc.dtype == p.dtype
        assert p.diag_ggn_exact.dtype == p.grad_batch.dtype == p.dtype
        assert close(p.diag_h_batch.double(), expected, size, 1e-4)
        assert close(p.diag_h.double(), expected.sum(0), size, 1e-4)
        assert p.diag_h_mc.isfinite().all()
