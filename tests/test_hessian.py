"""The diagonal of the Hessian against the explicit Hessian in float64."""

import copy
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from models.curved import NETWORKS, Concave, Nonlinear, TiedWords
from models.small import Fn, differentiate, rand
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from truths import close
from truths.second_order import Truth, block, hessian_blocks, hessian_diagonals

from backpack import backpack, extend
from backpack.curvature.replacements.attention import attention as replaced_attention
from backpack.extensions import (
    EKFAC,
    HMP,
    KFAC,
    KFLR,
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchGrad,
    DiagGGNExact,
    DiagHessian,
    DiagHessianMC,
    SqrtGGNExact,
)
from backpack.hessianfree import TwiceDifferentiable, hessian_vector_product
from backpack.modules.thread_state import HERE


class Written(nn.Module):
    """What PyTorch cannot differentiate twice, in functions that it can."""

    def forward(self, x):
        inner = (x + 3).clamp(0, 6)
        sixth = float(torch.tensor(1 / 6, dtype=torch.float32))  # the slope that PyTorch's hardsigmoid has in float64
        return (inner / 6).detach() + (inner - inner.detach()) * sixth


def written(model):
    return nn.Sequential(*[Written() if isinstance(m, nn.Hardsigmoid) else m for m in model])


def check(model, X, lossfunc, y, chunk=None, twin=None):
    """Both extensions, all samples and some, in one backward pass and with a gradient that is PyTorch's."""
    truth = hessian_diagonals(model if twin is None else twin, X, lossfunc, y)
    parameters = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad(lossfunc(model(X), y), parameters)
    extend(model), extend(lossfunc)
    last = [len(X) - 1, 0]
    for first, second in (
        (DiagHessian(chunk_size=chunk), BatchDiagHessian(subsampling=last)),
        (BatchDiagHessian(), DiagHessian(subsampling=[0])),
    ):
        for parameter in parameters:
            parameter.grad = None
        loss = lossfunc(model(X), y)
        with backpack(first, second, BatchGrad()):
            loss.backward()
        size = 1e-4 * max(t.abs().max() for t in truth)
        for parameter, grad, expected in zip(parameters, plain, truth, strict=True):
            assert torch.equal(parameter.grad, grad)
            whole, each = (expected.sum(0), expected[last]) if first.savefield == "diag_h" else (expected[0], expected)
            assert close(parameter.diag_h, whole, size, 1e-8)
            assert close(parameter.diag_h_batch, each, size, 1e-8)


ACTIVATIONS = [
    nn.CELU(), nn.ELU(0.7), nn.GELU(), nn.GELU("tanh"), nn.GLU(), nn.Hardshrink(0.1), nn.Hardsigmoid(), nn.Hardswish(),
    nn.Hardtanh(), nn.LeakyReLU(), nn.LogSigmoid(), nn.LogSoftmax(1), nn.Mish(), nn.PReLU(), nn.ReLU(), nn.ReLU6(),
    nn.RReLU().eval(), nn.SELU(), nn.SiLU(), nn.Sigmoid(), nn.Softmax(1), nn.Softmin(1), nn.Softplus(2.0),
    nn.Softshrink(0.1), nn.Softsign(), nn.Tanh(), nn.Tanhshrink(), nn.Threshold(0.1, 0.0), nn.SiLU(inplace=True),
    nn.ELU(inplace=True), nn.Softmax2d(),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_the_diagonal_is_exact_for_every_activation(activation):
    if isinstance(activation, nn.Softmax2d):
        model = nn.Sequential(nn.Conv2d(1, 2, 2), activation, nn.Flatten(), nn.Linear(8, 3))
        X = rand(3, 1, 3, 3)
    else:
        width = 2 if isinstance(activation, nn.GLU) else 4
        model, X = (
            nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(width, 3), activation, nn.Linear(3, 3)),
            rand(3, 3),
        )
        if isinstance(activation, nn.GLU):
            model[2] = nn.Linear(2, 6)
    check(model.double(), X, nn.CrossEntropyLoss(), torch.tensor([0, 2, 1]), twin=written(model))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_diagonal_is_exact_for_networks(name):
    build, shape = NETWORKS[name]
    model = build().double()
    if name == "data_as_weights":
        warnings.filterwarnings("ignore", "(?s).*entry by entry")
    for parameter in model.parameters():
        if parameter.dim() <= 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    check(model, rand(*shape), nn.CrossEntropyLoss(), torch.tensor([0, 2, 1])[: shape[0]], chunk=3)


def test_the_diagonal_is_exact_behind_frozen_attention():
    build, shape = NETWORKS["attention"]
    model = Fn(lambda m, x: m.rest(m.first(x)), first=nn.Linear(4, 4), rest=build()).double()
    model.rest.a.requires_grad_(False)
    check(model, rand(*shape), nn.CrossEntropyLoss(), torch.tensor([0, 2]))


def test_the_diagonal_is_exact_for_a_tied_embedding():
    check(TiedWords().double(), torch.randint(0, 5, (2, 3)), nn.CrossEntropyLoss(), torch.tensor([0, 4]))


def test_the_diagonal_is_exact_for_parameters_that_enter_nonlinearly():
    check(Nonlinear().double(), rand(3, 3), nn.CrossEntropyLoss(), torch.tensor([0, 2, 1]))


def test_what_takes_as_long_as_a_hundred_steps_is_said_once_with_its_causes(monkeypatch):
    monkeypatch.setattr("backpack.curvature.hessian_cost.MOMENT", 0)
    entries = extend(nn.utils.parametrizations.weight_norm(nn.Linear(60, 50)).double())
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1), nn.Sigmoid(), nn.Flatten()
    columns = extend(nn.Sequential(*layers, nn.Linear(8 * 144, 3)).double())
    lossfunc, y = extend(nn.CrossEntropyLoss()), torch.tensor([0, 2, 1])
    for model, X, message in (
        (entries, rand(3, 60), "costs 3050 derivatives of second order.*weight.original1.*DiagHessianMC"),
        (columns, rand(3, 1, 12, 12), "columns are pulled back.*Sigmoid of shape .3, 8, 12, 12.*DiagHessianMC"),
    ):
        with pytest.warns(UserWarning, match=message), backpack(DiagHessian()):
            lossfunc(model(X), y).backward()
        with backpack(DiagHessian()):
            lossfunc(model(X), y).backward()
        with backpack(DiagHessianMC(), BatchGrad()):
            lossfunc(model(X), y).backward()


def test_samples_without_a_gradient_have_no_residual_at_all():
    """Not one that cancels up to rounding: their targets are ignored, and their loss is constant."""
    model, lossfunc = (
        nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Linear(4, 3)),
        nn.CrossEntropyLoss(ignore_index=0),
    )
    extend(model.double()), extend(lossfunc)
    with backpack(DiagHessian(subsampling=[0, 2])):
        lossfunc(model(rand(3, 3)), torch.tensor([0, 2, 0])).backward()
    assert not any(p.diag_h.any() for p in model.parameters())


LOSSES = {
    "cross_entropy": (nn.CrossEntropyLoss(label_smoothing=0.1), torch.tensor([0, 2, 1])),
    "nll": (nn.NLLLoss(), torch.tensor([0, 2, 1])),
    "mse": (nn.MSELoss(), torch.rand(3, 3, dtype=torch.float64)),
    "bce_logits": (nn.BCEWithLogitsLoss(), torch.rand(3, 3, dtype=torch.float64)),
    "l1": (nn.L1Loss(), torch.rand(3, 3, dtype=torch.float64)),
    "smooth_l1": (nn.SmoothL1Loss(), torch.rand(3, 3, dtype=torch.float64)),
    "huber": (nn.HuberLoss(delta=0.1), torch.rand(3, 3, dtype=torch.float64)),
    "poisson": (nn.PoissonNLLLoss(), torch.rand(3, 3, dtype=torch.float64)),
    "soft_margin": (nn.SoftMarginLoss(), torch.rand(3, 3, dtype=torch.float64).sub(0.5).sign()),
    "kl_div": (nn.KLDivLoss(reduction="batchmean", log_target=True), torch.rand(3, 3, dtype=torch.float64)),
    "probabilities": (nn.CrossEntropyLoss(), torch.rand(3, 3, dtype=torch.float64)),
    "bce": (nn.BCELoss(), torch.rand(3, 3, dtype=torch.float64)),
    "bce_weighed": (
        nn.BCEWithLogitsLoss(torch.tensor([0.5, 1.0, 2.0]), pos_weight=torch.tensor(3.0)).double(),
        torch.rand(3, 3, dtype=torch.float64),
    ),
    "poisson_of_rates": (nn.PoissonNLLLoss(log_input=False), torch.rand(3, 3, dtype=torch.float64)),
    "margin": (nn.MultiLabelSoftMarginLoss(), torch.tensor([[0.0, 1.0, 1.0]] * 3, dtype=torch.float64)),
    "indefinite": (Concave(), torch.rand(3, 3, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_diagonal_is_exact_for_losses(name):
    last = nn.Sigmoid() if name in ("bce", "poisson_of_rates") else nn.LogSoftmax(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), last).double()
    check(model, rand(3, 3), *LOSSES[name])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["classes", "normal"])
def test_the_diagonal_is_exact_for_losses_that_weigh_samples(kind, reduction):
    """By class, with an ignored one, or by a variance: with the mean's denominator of the whole batch."""
    model, X = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), rand(4, 3)
    if kind == "classes":
        weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
        lossfunc = nn.CrossEntropyLoss(weight, reduction=reduction, ignore_index=1)
        args, total = (torch.tensor([0, 2, 1, 2]),), 4.5
    else:
        lossfunc, args, total = nn.GaussianNLLLoss(reduction=reduction), (rand(4, 3), rand(4, 3).square() + 0.5), 12
    scale = total if reduction == "mean" else 1
    term = type(lossfunc)(*([weight] if kind == "classes" else []), reduction="sum")
    if kind == "classes":
        term.ignore_index = 1
    found = [
        hessian_blocks(model, lambda n=n: term(model(X[n : n + 1]), *(a[n : n + 1] for a in args)) / scale)
        for n in range(4)
    ]
    extend(model), extend(lossfunc)
    with backpack(DiagHessian(), BatchDiagHessian()):
        lossfunc(model(X), *args).backward()
    for p, expected in zip(model.parameters(), map(torch.stack, zip(*found, strict=True)), strict=True):
        each = expected.diagonal(dim1=1, dim2=2)
        size = 1e-4 * float(expected.abs().max())
        assert close(p.diag_h_batch.flatten(1), each, size, 1e-8)
        assert close(p.diag_h.flatten(), each.sum(0), size, 1e-8)


def test_an_indefinite_loss_is_refused_by_what_needs_a_root_before_anything_is_computed():
    model, lossfunc = extend(nn.Linear(3, 3).double()), extend(Concave())
    with pytest.raises(ValueError, match="not positive semidefinite"), backpack(DiagHessian(), DiagGGNExact()):
        lossfunc(model(rand(3, 3)), rand(3, 3)).backward()
    assert not hasattr(model.weight, "diag_h")


def test_a_piecewise_linear_network_has_the_diagonal_of_the_ggn():
    model = extend(
        nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)).double()
    )
    lossfunc = extend(nn.CrossEntropyLoss())
    with backpack(DiagHessian(), DiagGGNExact()):
        lossfunc(model(rand(4, 1, 5, 5)), torch.tensor([0, 1, 2, 0])).backward()
    assert all(close(p.diag_h, p.diag_ggn_exact) for p in model.parameters())


class Centered(nn.Module):
    def forward(self, x):
        h = x.T.tanh().T
        return h - h.mean(0, keepdim=True)


MIXING = {
    "centered": (lambda: nn.Sequential(nn.Linear(3, 3), Centered(), nn.Linear(3, 3)), (3, 3)),
    "batch_norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)),
        (4, 3),
    ),
    "branch": (
        lambda: Fn(
            lambda m, x: m.out(m.a(x) + m.norm(m.b(x)).tanh()),
            a=nn.Linear(3, 4),
            b=nn.Linear(3, 4),
            norm=nn.BatchNorm1d(4),
            out=nn.Linear(4, 3),
        ),
        (4, 3),
    ),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(8, 3)
        ),
        (3, 1, 4, 4),
    ),
}


@pytest.mark.filterwarnings("ignore:Samples are mixed by")
@pytest.mark.parametrize("subsampling", [None, [2, 0, 2]])
@pytest.mark.parametrize("name", list(MIXING))
def test_where_samples_are_mixed_curvature_is_that_of_their_terms(name, subsampling):
    """The Hessian of each term of the loss, and its Gauss-Newton matrix, by the Jacobian of its row."""
    build, shape = MIXING[name]
    model, X = build().double(), rand(*shape)
    y = torch.arange(len(X)) % 3
    chosen = list(range(len(X))) if subsampling is None else subsampling
    truth = Truth(model, [model(X)], [lambda z: cross_entropy(z, y)])
    extend(model)
    lossfunc = extend(nn.CrossEntropyLoss())
    s = {"subsampling": subsampling}
    with backpack(
        DiagHessian(**s), BatchDiagHessian(**s), DiagGGNExact(**s), BatchDiagGGNExact(**s), SqrtGGNExact(**s)
    ):
        lossfunc(model(X), y).backward()
    for name, p in model.named_parameters():
        hessian, ggn = truth.diag_hessian[name][chosen], truth.diag_ggn[name][chosen]
        assert close(p.diag_h_batch, hessian, rtol=1e-8) and close(p.diag_h, hessian.sum(0), rtol=1e-8)
        assert close(p.diag_ggn_exact_batch, ggn, rtol=1e-8) and close(p.diag_ggn_exact, ggn.sum(0), rtol=1e-8)
        assert close(p.sqrt_ggn_exact.square().sum(0), ggn, rtol=1e-8)


@pytest.mark.parametrize("extension", [KFAC, KFLR, EKFAC])
def test_kronecker_factors_below_what_mixes_samples_are_an_error_and_those_above_are_right(extension):
    model, X, y = MIXING["batch_norm"][0]().double(), rand(4, 3), torch.tensor([0, 2, 1, 0])
    extend(model)
    lossfunc = extend(nn.CrossEntropyLoss())
    words = r"mixed by NativeBatchNorm.*0\.weight, 0\.bias, Kronecker"
    with pytest.raises(RuntimeError, match=words), backpack(extension()):
        lossfunc(model(X), y).backward()
    assert not any(p.grad is not None for p in model.parameters())
    model[0].requires_grad_(False)
    with backpack(KFLR()):
        lossfunc(model(X), y).backward()
    head = extend(nn.Linear(4, 3).double())
    head.load_state_dict(model[3].state_dict())
    with backpack(KFLR()):
        lossfunc(head(model[:3](X).detach()), y).backward()
    assert all(close(a, b) for a, b in zip(model[3].weight.kflr, head.weight.kflr, strict=True))


def test_a_function_without_second_derivatives_is_an_error_that_names_it():
    class Distance(nn.Module):
        def forward(self, x):
            return torch.cdist(x.unsqueeze(1), torch.ones(1, 2, 3, dtype=x.dtype), p=3).squeeze(1)

    model, lossfunc = extend(nn.Sequential(nn.Linear(3, 3), Distance()).double()), extend(nn.MSELoss())
    with pytest.raises(RuntimeError, match="second derivatives of CdistBackward0"), backpack(DiagHessian()):
        lossfunc(model(rand(3, 3)), rand(3, 2)).backward()
    with backpack(DiagGGNExact()):  # nothing is left half-done
        lossfunc(model(rand(3, 3)), rand(3, 2)).backward()


def small():
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.GroupNorm(1, 3), nn.ReLU(), nn.Linear(3, 3)).double()


def small_lstm():
    return Fn(lambda m, x: m.out(m.a(x.unsqueeze(1))[0][:, -1]), a=nn.LSTM(2, 1, batch_first=True), out=nn.Linear(1, 3))


DIFFERENTIATED = {
    "sequential": small,
    "lstm": lambda: small_lstm().double(),
    "tied": lambda: Fn(lambda m, x: m.a(m.a(x).sin()).exp() @ torch.eye(2, 3).double(), a=nn.Linear(2, 2)).double(),
    "linear": lambda: nn.Linear(2, 3).double(),
}


pytestmark = pytest.mark.filterwarnings("ignore:(?s)Using backward.. with create_graph=True")


@pytest.mark.filterwarnings("ignore:(?s).*entry by entry")
@pytest.mark.parametrize("subsampling", [None, [2, 0, 2]])
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_results_of_create_graph_are_differentiable(name, subsampling):
    model, X, y, lossfunc = DIFFERENTIATED[name](), rand(3, 2), torch.tensor([0, 2, 1]), nn.CrossEntropyLoss()
    point = {name: p.detach() for name, p in model.named_parameters()}
    chosen = subsampling or range(3)

    def of_sample(own, key, rest, n):
        out = torch.func.functional_call(model, {**rest, key: own}, (X[n : n + 1],))
        return lossfunc(out, y[n : n + 1]) / len(X)

    def diagonals(point):
        found = {}
        for key, p in point.items():
            with sdpa_kernel(SDPBackend.MATH):
                hessians = [torch.func.jacrev(torch.func.jacrev(of_sample))(p, key, point, n) for n in chosen]
            found[key] = torch.stack([h.reshape(p.numel(), -1).diagonal().reshape(p.shape) for h in hessians])
        return found

    weights = {key: rand(len(chosen), *p.shape) for key, p in point.items()}
    truth = diagonals(point)
    rate = torch.func.grad(lambda at: sum((d * weights[key]).sum() for key, d in diagonals(at).items()))(point)
    total_rate = torch.func.grad(lambda at: sum(d.sum() for d in diagonals(at).values()))(point)
    extend(model), extend(lossfunc)
    with backpack(DiagHessian(subsampling=subsampling), BatchDiagHessian(subsampling=subsampling)):
        lossfunc(model(X), y).backward(create_graph=True)
    parameters = dict(model.named_parameters())
    for key, p in parameters.items():
        assert close(p.diag_h_batch, truth[key]) and close(p.diag_h, truth[key].sum(0))
    total = sum((p.diag_h_batch * weights[key]).sum() for key, p in parameters.items())
    alone = sum(p.diag_h.sum() for p in parameters.values())
    with backpack(DiagHessian(subsampling=subsampling)):
        lossfunc(model(X), y).backward(create_graph=True)
    again = sum(p.diag_h.sum() for p in parameters.values())
    for value, expected in ((total, rate), (alone, total_rate), (again, total_rate)):
        found = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
        for key, own in zip(parameters, found, strict=True):
            assert close(torch.zeros_like(expected[key]) if own is None else own, expected[key])


def test_create_graph_says_what_it_costs_and_leaves_gradients_as_they_are():
    model, lossfunc, X, y = small(), nn.CrossEntropyLoss(), rand(3, 2), torch.tensor([0, 2, 1])
    expected = torch.autograd.grad(lossfunc(model(X), y), list(model.parameters()), create_graph=True)
    extend(model), extend(lossfunc)
    with pytest.warns(UserWarning, match="costs 27 derivatives"), backpack(DiagHessian()):
        lossfunc(model(X), y).backward(create_graph=True)
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_create_graph_is_refused_where_third_derivatives_of_pytorch_are_wrong():
    model, lossfunc = extend(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).double()), extend(nn.MSELoss())
    with pytest.raises(RuntimeError, match="third derivatives of NativeLayerNorm,"), backpack(DiagHessian()):
        lossfunc(model(rand(3, 3)), rand(3, 3)).backward(create_graph=True)
    assert not any(hasattr(p, "diag_h") for p in model.parameters())


def test_the_estimate_with_create_graph_is_unbiased_and_differentiable():
    model, lossfunc, X, y = small(), nn.CrossEntropyLoss(), rand(3, 2), torch.tensor([0, 2, 1])
    truth = hessian_diagonals(model, X, lossfunc, y)
    extend(model), extend(lossfunc)
    with backpack(DiagHessianMC(300)):
        lossfunc(model(X), y).backward(create_graph=True)
    for p, expected, matrix in zip(
        model.parameters(), truth, hessian_blocks(model, lambda: lossfunc(model(X), y)), strict=True
    ):
        # The variance of r * H r is that of sums over the other entries of a row, each of it its square.
        deviation = ((matrix.square().sum(1) - matrix.diagonal().square()) / 300).sqrt().reshape(p.shape)
        assert bool(((p.diag_h_mc - expected.sum(0)).abs() <= 6 * deviation + 1e-12).all())
    assert torch.autograd.grad(model[0].weight.diag_h_mc.sum(), model[0].weight)[0].any()


class Dropping(nn.Module):
    """Dropout before a fused layer, and a buffer that counts forward passes."""

    def __init__(self):
        super().__init__()
        self.drop, self.layer = nn.Dropout(0.5), nn.TransformerEncoderLayer(3, 1, 4, dropout=0.0, batch_first=True)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return self.layer(self.drop(x))


def test_dropout_before_a_fused_layer_asks_for_a_forward_pass_inside_the_block():
    model, lossfunc, X, y = Dropping().double(), nn.MSELoss(), rand(2, 3, 3), rand(2, 3, 3)
    torch.manual_seed(1)
    dropped = model.drop(X)
    torch.manual_seed(1)
    plain = torch.autograd.grad(lossfunc(model(X), y), list(model.parameters()))
    state = torch.get_rng_state()
    truth = hessian_diagonals(model.layer, dropped, lossfunc, y)
    extend(model), extend(lossfunc)
    loss = lossfunc(model(X), y)
    with pytest.raises(RuntimeError, match="forward pass inside the backpack"), backpack(DiagHessian()):
        loss.backward()
    model.zero_grad()
    torch.manual_seed(1)
    with backpack(DiagHessian()):
        lossfunc(model(X), y).backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.count == 3  # the model has run more often than that
    for p, grad, expected in zip(model.parameters(), plain, truth, strict=True):
        assert torch.equal(p.grad, grad)
        assert close(p.diag_h, expected.sum(0), 1e-4, 1e-8)


class Carrying(nn.Module):
    """A state of all samples that is kept from call to call."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.state = layer(2, 2, batch_first=True), None

    def forward(self, x):
        out, state = self.layer(x, self.state)
        self.state = state.detach()
        return out


def test_samples_of_a_model_with_a_state_of_all_are_selected_in_the_graph_of_all():
    model, lossfunc, X, y = Carrying(nn.GRU).double(), nn.MSELoss(), rand(3, 2, 2), rand(3, 2, 2)
    model(X)
    state = model.state
    out = model(X)
    size = y.numel()
    expected = []
    for p in model.parameters():
        rows = [torch.autograd.grad(entry, p, retain_graph=True)[0] for entry in out[[2, 0]].flatten()]
        expected.append(2 / size * torch.stack(rows).square().sum(0))
    model.state = state
    differentiate(model, lossfunc, X, y, DiagGGNExact(subsampling=[2, 0]))
    assert all(close(p.diag_ggn_exact, e) for p, e in zip(model.parameters(), expected, strict=True))
    model.state = state
    term = (model(X)[0] - y[0]).square().sum() / size
    with backpack(DiagHessian(subsampling=[0])):
        model.state = state
        lossfunc(model(X), y).backward()
    for p, grad in zip(
        model.parameters(), torch.autograd.grad(term, list(model.parameters()), create_graph=True), strict=True
    ):
        rows = [torch.autograd.grad(e, p, retain_graph=True)[0].flatten()[k] for k, e in enumerate(grad.flatten())]
        assert close(p.diag_h.flatten(), torch.stack(rows))
    model.state = state
    with backpack(HMP(subsampling=[0])):
        lossfunc(model(X), y).backward()
    for p, diagonal in zip(model.parameters(), [p.diag_h for p in model.parameters()], strict=True):
        units = torch.eye(p.numel(), dtype=p.dtype).reshape(-1, *p.shape)
        assert close(p.hmp(units).flatten(1).diagonal(), diagonal.flatten())


class Two(nn.Module):
    """An attention and a recurrent layer, with an output each."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.MultiheadAttention(2, 1, batch_first=True), nn.GRU(2, 2, batch_first=True)

    def forward(self, x):
        return self.a(x, x, x, need_weights=False)[0], self.b(x)[0]


@pytest.mark.parametrize("inside", [True, False])
def test_fused_functions_may_lie_anywhere_before_the_loss(inside):
    """In two models, with functions that are not linear between them and behind them."""
    models = nn.ModuleList([Two(), nn.TransformerEncoderLayer(2, 1, 2, dropout=0.0, batch_first=True)]).double()
    X, y, lossfunc = rand(2, 3, 2), rand(2, 2), nn.MSELoss()
    parameters = list(models.parameters())

    def forward(x):
        a, b = models[0](x)
        h = (a * b).tanh() + x
        return models[1](h).square().mean(1) + h.mean(1)

    samples = [hessian_blocks(models, lambda n=n: lossfunc(forward(X[n : n + 1]), y[n : n + 1]) / 2) for n in range(2)]
    truth = [first + second for first, second in zip(*samples, strict=True)]
    plain = torch.autograd.grad(lossfunc(forward(X), y), parameters)
    for module in (*models, lossfunc):
        extend(module)
    loss = lossfunc(forward(X), y)
    with backpack(DiagHessian(), HMP()):
        (lossfunc(forward(X), y) if inside else loss).backward(retain_graph=True)
    size = 1e-4 * max(float(t.abs().max()) for t in truth)
    for p, grad, expected in zip(parameters, plain, truth, strict=True):
        assert torch.equal(p.grad, grad)
        assert close(p.diag_h.flatten(), expected.diagonal(), size, 1e-8)
        vector = rand(*p.shape)
        assert close(p.hmp(vector).flatten(), expected @ vector.flatten(), size, 1e-8)


@pytest.mark.parametrize("name", ["residual", "unrolled", "attention"])
def test_the_estimate_averages_to_the_diagonal(name):
    """Within five standard errors, estimated from means of independent draws."""
    build, shape = NETWORKS[name]
    model, X, y = build().double(), rand(*shape), torch.tensor([0, 2, 1])[: shape[0]]
    truth = hessian_diagonals(model, X, nn.CrossEntropyLoss(), y)
    extend(model), (lossfunc := extend(nn.CrossEntropyLoss()))
    draws = {p: [] for p in model.parameters()}
    for _ in range(20):
        with backpack(DiagHessianMC(100)):
            lossfunc(model(X), y).backward()
        for p, found in draws.items():
            found.append(p.diag_h_mc)
    for found, expected in zip(draws.values(), truth, strict=True):
        found = torch.stack(found)
        error = found.std(0) / len(found) ** 0.5
        assert bool(((found.mean(0) - expected.sum(0)).abs() <= 7 * error + 1e-10).all())


# Attention whose rows may have no key at all


def masks(seed, tokens, samples):
    """A mask of a random kind, with rows that have no key; as booleans, and as what is given to attention."""
    torch.manual_seed(seed)
    seen = torch.rand(samples, 1, tokens, tokens) < 0.6
    seen[torch.arange(samples) % 2 == seed % 2, :, :, 0] = False
    seen[0, :, seed % tokens] = False
    if seed % 4 == 3:
        seen[-1] = False  # a sample without any
    if seed % 2:
        return torch.where(seen, torch.zeros((), dtype=torch.float64), -torch.inf)
    return seen


class Attending(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask, self.a, self.v = mask, nn.Linear(2, 8), nn.Linear(2, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x, rows=None):
        n, mask = len(x), self.mask if rows is None else self.mask[rows]
        q, k = self.a(x).unflatten(-1, (2, 4)).transpose(1, 2).chunk(2, -1)
        v = self.v(x).unflatten(-1, (2, 2)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        return self.last(attended.reshape(n, -1, 4).tanh().sum(1))


@pytest.mark.parametrize("seed", range(8))
def test_the_diagonal_is_exact_for_attention_with_rows_that_have_no_key(seed):
    X, y, lossfunc = rand(3, 4, 2), torch.tensor([0, 2, 1]), nn.CrossEntropyLoss()
    model = Attending(masks(seed, 4, 3)).double()
    parameters = list(model.parameters())
    truth = [[] for _ in parameters]
    for n in range(3):
        with sdpa_kernel(SDPBackend.MATH):
            value = lossfunc(model(X[n : n + 1], [n]), y[n : n + 1]) / 3
        grads = torch.autograd.grad(value, parameters, create_graph=True)
        for p, g, rows in zip(parameters, grads, truth, strict=True):
            rows.append(block(g, p).diagonal().reshape(p.shape))
    plain = torch.autograd.grad(lossfunc(model(X), y), parameters)
    differentiate(model, lossfunc, X, y, DiagHessian(), BatchDiagHessian(), DiagHessianMC())
    size = 1e-4 * max(torch.stack(t).abs().max() for t in truth)
    for p, expected, grad in zip(parameters, truth, plain, strict=True):
        assert torch.equal(p.grad, grad)
        assert close(p.diag_h_batch, torch.stack(expected), size, 1e-8)
        assert close(p.diag_h, sum(expected), size, 1e-8)
        assert p.diag_h_mc.isfinite().all()


@pytest.mark.parametrize("seed", range(8))
def test_attention_with_second_derivatives_is_pytorchs_in_first_order(seed):
    mask = masks(seed, 4, 3)
    inputs = [rand(3, 2, 4, 2).requires_grad_() for _ in range(3)]
    weights = rand(3, 2, 4, 2)
    for dtype, rtol in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        given = [t.to(dtype) for t in inputs]
        own = mask if mask.dtype == torch.bool else mask.to(dtype)
        out = [function(*given, attn_mask=own) for function in (F.scaled_dot_product_attention, replaced_attention)]
        grads = [torch.autograd.grad((o * weights).sum(), inputs, retain_graph=True) for o in out]
        assert close(out[1], out[0], rtol=rtol)
        for fused, replaced in zip(*grads, strict=True):
            assert fused.isfinite().all()
            assert close(replaced, fused, 1e-2, rtol)


# Memory formats


def convolutional(seed, dims):
    """A random net of convolutions, normalizations, activations and poolings."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    conv, pool = (nn.Conv2d, nn.MaxPool2d) if dims == 2 else (nn.Conv3d, nn.MaxPool3d)
    norms = [
        lambda: nn.GroupNorm(2, 4),
        lambda: nn.GroupNorm(1, 4),
        lambda: nn.GroupNorm(4, 4, affine=False),
        lambda: (nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d)(4, affine=True),
        lambda: (nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d)(4).eval(),
        nn.Identity,
    ]
    activations = [nn.SiLU, nn.Tanh, nn.ReLU, nn.Softplus, lambda: nn.Softmax(1)]
    layers = [conv(1, 4, 2), draw.choice(norms)(), draw.choice(activations)()]
    layers += [
        conv(4, 4, 2, padding=1, groups=draw.choice([1, 2, 4])),
        draw.choice(norms)(),
        draw.choice(activations)(),
    ]
    layers += [pool(2) if draw.random() < 0.5 else nn.Identity(), nn.Flatten()]
    model = nn.Sequential(*layers)
    shape = (2, 1, *([4] * dims)) if dims == 2 else (2, 1, 3, 3, 3)
    return nn.Sequential(*layers, nn.Linear(model(torch.randn(shape)).shape[1], 2)).double(), rand(*shape)


class InOrder(nn.Module):
    def forward(self, x):
        return x.new_empty(x.shape).copy_(x)  # of one channel, both forms count as contiguous


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_the_diagonal_is_exact_for_channels_last(seed, dims):
    model, X = convolutional(seed, dims)
    form = torch.channels_last if dims == 2 else torch.channels_last_3d
    twin = nn.Sequential(InOrder(), copy.deepcopy(model))  # of the other form PyTorch's own derivatives crash
    model, X, y = model.to(memory_format=form), X.to(memory_format=form), torch.tensor([1, 0])
    check(model, X, nn.CrossEntropyLoss(), y, twin=twin)
    vectors = [torch.randn_like(p) for p in model.parameters()]
    lossfunc = nn.CrossEntropyLoss()
    expected = [
        h @ v.flatten() for h, v in zip(hessian_blocks(twin, lambda: lossfunc(twin(X), y)), vectors, strict=True)
    ]
    with backpack(HMP()):
        extend(lossfunc)(model(X), y).backward()
    for p, v, product in zip(model.parameters(), vectors, expected, strict=True):
        assert close(p.hmp(v).flatten(), product, 1e-3, 1e-8)


def test_columns_that_cannot_be_pulled_back_together_are_pulled_back_one_by_one(monkeypatch):
    monkeypatch.setattr("backpack.curvature.spliced_graph.turns", lambda nodes: [])
    layers = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(16, 2)
    model = nn.Sequential(*layers).double().to(memory_format=torch.channels_last)
    X = rand(2, 1, 4, 4).to(memory_format=torch.channels_last)
    monkeypatch.setattr("backpack.curvature.double_backward.is_reordered", lambda node: False)
    twin = nn.Sequential(InOrder(), copy.deepcopy(model).to(memory_format=torch.contiguous_format))
    check(model, X, nn.CrossEntropyLoss(), torch.tensor([1, 0]), twin=twin)


def test_columns_go_by_turns_through_what_cannot_take_them_together(monkeypatch):
    monkeypatch.setattr("backpack.curvature.double_backward.is_reordered", lambda node: False)
    monkeypatch.setattr("backpack.curvature.hessian.HessianPass._together_or_not", lambda self, pull: pull())
    model, X = convolutional(2, 2)
    twin = nn.Sequential(InOrder(), copy.deepcopy(model))
    model, X = model.to(memory_format=torch.channels_last), X.to(memory_format=torch.channels_last)
    check(model, X, nn.CrossEntropyLoss(), torch.tensor([1, 0]), twin=twin)


# What is shown, and what is left when it is interrupted


class Interrupting(torch.autograd.Function):
    """Raises in the backward pass that is counted."""

    left = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Interrupting.left -= 1
        if Interrupting.left == 0:
            raise KeyboardInterrupt
        return grad.clone()


def state_of(model):
    return [
        (dict(m._forward_hooks), dict(m._backward_hooks), sorted(vars(m)), {k: id(p) for k, p in m._parameters.items()})
        for m in model.modules()
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_an_interrupt_leaves_everything_as_it_was(tied):
    first, second = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    second = first if tied else second
    model = Fn(lambda m, x: m.c(Interrupting.apply(m.b(m.a(x).tanh())).sigmoid()), a=first, b=second, c=nn.Linear(3, 2))
    model, lossfunc, X, y = extend(model.double()), extend(nn.CrossEntropyLoss()), rand(2, 3), torch.tensor([0, 1])
    loss = lossfunc(model(X), y)
    with backpack(DiagHessian(), BatchDiagHessian(), BatchGrad()):
        loss.backward(retain_graph=True)
    expected = {name: (p.grad.clone(), p.diag_h, p.diag_h_batch) for name, p in model.named_parameters()}
    before, grads = state_of(model), {name: p.grad for name, p in model.named_parameters()}
    interrupted = 0
    for number in range(1, 40):
        Interrupting.left = number
        try:
            with backpack(DiagHessian(), BatchDiagHessian()):
                loss.backward(retain_graph=True)
        except KeyboardInterrupt:
            interrupted += 1
            assert state_of(model) == before
            if number < 5:  # before PyTorch's own pass
                assert all(p.grad is grads[name] for name, p in model.named_parameters())
                assert all(torch.equal(p.grad, expected[name][0]) for name, p in model.named_parameters())
            results = [(vars(p).get("diag_h"), expected[name][1]) for name, p in model.named_parameters()]
            assert all(found is None or found is earlier for found, earlier in results)
            assert not HERE.muted and HERE.inner is None
            assert torch.equal(torch.vmap(torch.sin)(X), X.sin())
        model.zero_grad()
        Interrupting.left = 0
        loss.backward(retain_graph=True)
        assert all(torch.equal(p.grad, expected[name][0]) for name, p in model.named_parameters())
        grads = {name: p.grad for name, p in model.named_parameters()}
    assert interrupted > 3
    model.zero_grad()
    with backpack(DiagHessian(), BatchDiagHessian()):
        loss.backward()
    for name, p in model.named_parameters():
        assert all(map(torch.equal, (p.grad, p.diag_h, p.diag_h_batch), expected[name]))


def test_a_bar_on_a_terminal_shows_how_far_it_is(monkeypatch):
    shown = []

    class Bar:
        def __init__(self, total, **kwargs):
            shown.append([total, kwargs["delay"], 0])

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def update(self, count=1):
            shown[-1][2] += count

    monkeypatch.setattr("tqdm.tqdm", Bar)
    model, lossfunc = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3)),
        extend(nn.CrossEntropyLoss()),
    )
    models = [model, nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))]
    for own in map(extend, models):
        for terminal in (True, False):
            monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
            with backpack(DiagHessian()):
                lossfunc(own.double()(rand(2, 3)), torch.tensor([0, 1])).backward()
    assert len(shown) == 2
    for total, delay, done in shown:
        assert total == done > 0
        assert delay > 1


NORMALIZED = {
    "layer norm": lambda p: F.layer_norm(p, (4,)),
    "rms norm": lambda p: F.rms_norm(p, (4,)),
    "group norm": lambda p: F.group_norm(p, 2),
    "instance norm": lambda p: F.instance_norm(p[None])[0],
    "batch norm": lambda p: F.batch_norm(p * torch.tensor([1.0, 2, 4]).double()[:, None], None, None, training=True),
}


@pytest.mark.parametrize("name", NORMALIZED)
def test_what_normalizes_parameters_is_not_linear_in_them(name):
    torch.manual_seed(0)

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift, self.last = nn.Parameter(rand(3, 4)), nn.Linear(4, 2).double()

        def forward(self, x):
            return self.last(x.unsqueeze(1) + NORMALIZED[name](self.shift)).sin().sum(1)

    model, X, y = Shifted(), rand(5, 4), rand(5, 2)
    truth = hessian_blocks(model, lambda: F.mse_loss(model(X), y))
    differentiate(model, nn.MSELoss(), X, y, DiagHessian())
    for p, H in zip(model.parameters(), truth, strict=True):
        assert close(p.diag_h.flatten(), H.diagonal(), 1e-3, 1e-9)


class GivenWeight(nn.Module):
    """A normalized weight is an argument, or is computed in the forward pass."""

    def __init__(self):
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.rand(2, 1))

    def normalized(self):
        return torch._weight_norm(self.v, self.g, 0)

    def forward(self, x, weight=None):
        return F.linear(x, self.normalized() if weight is None else weight).tanh()


def test_a_normalized_weight_that_was_computed_before_is_an_error_and_the_remedies_work():
    """PyTorch's second derivatives of weight normalization are wrong."""
    torch.manual_seed(0)
    model = GivenWeight().double()
    X, y, lossfunc = torch.rand(5, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1]), extend(nn.CrossEntropyLoss())
    truth, parameters = hessian_diagonals(model, X, lossfunc, y), list(model.parameters())
    extend(model)
    loss = lossfunc(model(X, model.normalized()), y)
    with pytest.raises(RuntimeError, match="weight normalization are wrong.*inside"), backpack(DiagHessian()):
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="wrong: run the forward pass inside backpack.hessianfree.TwiceDiff"):
        hessian_vector_product(loss, parameters, [torch.ones_like(p) for p in parameters])
    for is_argument in (False, True):
        with TwiceDifferentiable():
            weight = model.normalized() if is_argument else None
        with backpack(DiagHessian(), HMP()):
            lossfunc(model(X, weight), y).backward()
        for p, diagonal in zip(parameters, truth, strict=True):
            assert close(p.diag_h, diagonal.sum(0))
            with TwiceDifferentiable():
                (product,) = hessian_vector_product(lossfunc(model(X), y), p, torch.ones_like(p))
            assert close(p.hmp(torch.ones_like(p)[None])[0], product)


def test_a_scale_below_batch_normalization_in_training_has_second_derivatives():
    torch.manual_seed(1)
    model = nn.Sequential(nn.RMSNorm(3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    X, y = rand(3, 3), rand(3, 2)
    truth = hessian_blocks(model, lambda: F.mse_loss(model(X), y))
    extend(model)
    with warnings.catch_warnings(), backpack(DiagHessian()):
        warnings.simplefilter("ignore")
        extend(nn.MSELoss())(model(X), y).backward()
    for p, H in zip(model.parameters(), truth, strict=True):
        assert close(p.diag_h.flatten(), H.diagonal(), rtol=1e-7)


@pytest.mark.parametrize("ending", [lambda out: out[torch.tensor([2, 0])], lambda out: out.mean(1), torch.tanh])
@pytest.mark.parametrize("inside", [True, False])
def test_fused_attention_whose_output_nobody_keeps_runs_again(inside, ending):
    torch.manual_seed(0)

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.attention(x, x, x, need_weights=False)[0])

    model, X = Attending().double(), rand(3, 2, 4)
    y = rand(*ending(model(X)).shape)
    truth = hessian_blocks(model, lambda: F.mse_loss(ending(model(X)), y))
    extend(model), (lossfunc := extend(nn.MSELoss()))
    if inside:
        with backpack(DiagHessian(), HMP()):
            lossfunc(ending(model(X)), y).backward()
    else:
        loss = lossfunc(ending(model(X)), y)
        with backpack(DiagHessian(), HMP()):
            loss.backward()
        del loss
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    for p, H in zip(model.parameters(), truth, strict=True):
        assert close(p.diag_h.flatten(), H.diagonal(), H.abs().max(), 1e-9)
        units = torch.eye(p.numel(), dtype=p.dtype).reshape(-1, *p.shape)
        assert close(p.hmp(units).reshape(H.shape), H, rtol=1e-9)
