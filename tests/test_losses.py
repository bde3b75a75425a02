"""Every loss with every reduction and option, against Hessians by automatic differentiation."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot
from truths import close
from truths.second_order import explicit

from backpack import backpack, extend, verify
from backpack.curvature.losses import ROOTS
from backpack.curvature.losses.denominators import denominator
from backpack.extensions import (
    EKFAC,
    HBP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchGrad,
    DiagGGNExact,
    DiagHessian,
    SqrtGGNExact,
    SqrtGGNMC,
)

N, C = 4, 3
LABELS = torch.tensor([0, 2, 1, 2])
WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


def values(*shape):
    return torch.rand(shape, dtype=torch.float64)


def cross_entropy(**options):
    return lambda reduction: (nn.CrossEntropyLoss(reduction=reduction, **options), (LABELS,))


def soft_targets(**options):
    return lambda reduction: (nn.CrossEntropyLoss(reduction=reduction, **options), (values(N, C).softmax(1),))


def of_values(loss, *others, draw=values, **options):
    return lambda reduction: (loss(reduction=reduction, **options), (draw(N, C), *(o() for o in others)))


def bits(*shape):
    return values(*shape).round()


def counts(*shape):
    return (3 * values(*shape)).round()


LOSSES = {
    "cross_entropy": cross_entropy(),
    "cross_entropy_weighted": cross_entropy(weight=WEIGHT),
    "cross_entropy_ignoring": cross_entropy(ignore_index=2),
    "cross_entropy_smoothed": cross_entropy(label_smoothing=0.3),
    "cross_entropy_all": cross_entropy(weight=WEIGHT, ignore_index=1, label_smoothing=0.3),
    "soft_targets": soft_targets(),
    "soft_targets_all": soft_targets(weight=WEIGHT, label_smoothing=0.3),
    "mse": of_values(nn.MSELoss),
    "bce_logits": of_values(nn.BCEWithLogitsLoss, draw=bits),
    "bce_logits_soft": of_values(nn.BCEWithLogitsLoss),
    "bce_logits_weighted": of_values(nn.BCEWithLogitsLoss, draw=bits, weight=WEIGHT),
    "bce_logits_positive": of_values(nn.BCEWithLogitsLoss, draw=bits, pos_weight=WEIGHT),
    "huber": of_values(nn.HuberLoss, delta=0.4),
    "smooth_l1": of_values(nn.SmoothL1Loss, beta=0.7),
    "poisson": of_values(nn.PoissonNLLLoss, draw=counts),
    "poisson_full": of_values(nn.PoissonNLLLoss, draw=counts, full=True),
    "gaussian": of_values(nn.GaussianNLLLoss, lambda: values(N, C) + 0.5),
    "gaussian_common": of_values(nn.GaussianNLLLoss, lambda: values(N, 1) + 0.5, full=True),
    "gaussian_number": of_values(nn.GaussianNLLLoss, lambda: 0.7),
    "soft_margin": of_values(nn.SoftMarginLoss, draw=lambda *shape: 2 * bits(*shape) - 1),
}
POSITIVE = {
    "bce": of_values(nn.BCELoss, draw=bits),
    "bce_weighted": of_values(nn.BCELoss, weight=WEIGHT),
    "poisson_rates": of_values(nn.PoissonNLLLoss, draw=counts, log_input=False),
}
"""Losses of outputs between zero and one."""


class Weighted(nn.Module):
    """A loss that is not reduced, followed by the user's weights."""

    def __init__(self, loss):
        super().__init__()
        self.loss, self.weights = loss, None

    def forward(self, out, *rest):
        value = self.loss(out, *rest)
        if self.loss.reduction != "none":
            return value
        if self.weights is None:
            self.weights = values(*value.shape)
        return (value * self.weights).sum()


def check(model, X, lossfunc, rest, n=N):
    diagonals, ggn = explicit(model, X, lambda out, _: lossfunc(out, *rest), None, n)
    extend(model)
    extend(lossfunc.loss)
    plain = torch.autograd.grad(lossfunc(model(X), *rest), list(model.parameters()))
    loss = lossfunc(model(X), *rest)
    with backpack(DiagGGNExact(subsampling=range(min(n, 2))), BatchDiagGGNExact(), SqrtGGNExact()):
        loss.backward()
    roots = torch.cat([p.sqrt_ggn_exact.flatten(2) for p in model.parameters()], 2).flatten(0, 1)
    assert ggn.any()
    assert close(roots.T @ roots, ggn, rtol=1e-9)
    for parameter, grad, truth in zip(model.parameters(), plain, diagonals, strict=True):
        assert torch.equal(parameter.grad, grad)
        size = 1e-6 * ggn.abs().max()
        assert close(parameter.diag_ggn_exact, truth[:2].sum(0), size, 1e-9)
        assert close(parameter.diag_ggn_exact_batch, truth, size, 1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", [*LOSSES, *POSITIVE])
def test_roots_are_those_of_the_loss_as_it_is_reduced(name, reduction):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)).double()
    if name in POSITIVE:
        model.append(nn.Sigmoid())
    lossfunc, rest = (LOSSES | POSITIVE)[name](reduction)
    check(model, values(N, 4), Weighted(lossfunc), rest)


@pytest.mark.parametrize("name", [*LOSSES, *POSITIVE])
def test_each_of_these_losses_has_a_rule_and_is_divided_by_what_its_mean_divides_by(name):
    mean, rest = (LOSSES | POSITIVE)[name]("mean")
    assert type(mean) in ROOTS, "its root is that of the dense Hessian"
    total, out = copy.deepcopy(mean), values(N, C)
    total.reduction = "sum"
    assert close(total(out, *rest) / denominator(mean, out, rest[0]), mean(out, *rest))


class Grid(nn.Module):
    def __init__(self, axes):
        super().__init__()
        self.linear, self.axes = nn.Linear(4, C), axes

    def forward(self, x):
        return self.linear(x).movedim(-1, self.axes)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_of_pixels(reduction, soft):
    target = torch.randint(0, C, (N, 2, 3))
    options = {"weight": WEIGHT, "label_smoothing": 0.2}
    if soft:
        target = one_hot(target, C).double().movedim(-1, 1) * 0.5 + 0.1
    else:
        target[0, 1, 1] = target[3, 0] = 1
        options["ignore_index"] = 1
    lossfunc = Weighted(nn.CrossEntropyLoss(reduction=reduction, **options))
    check(Grid(1).double(), values(N, 2, 3, 4), lossfunc, (target,))


@pytest.mark.parametrize("shape", [(N,), (N, 1), (N, 2, 3), (N, N, 2)])
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.MSELoss(reduction="none")])
def test_losses_of_entries_take_any_shape(loss, shape):
    model = nn.Sequential(
        nn.Linear(4, math.prod(shape[1:])), nn.Unflatten(1, shape[1:]) if shape[1:] else nn.Flatten(0)
    )
    check(model.double(), values(N, 4), Weighted(loss), (bits(*shape),))


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (nn.NLLLoss(), LABELS),
        (nn.L1Loss(), values(N, C)),
        (nn.KLDivLoss(reduction="batchmean"), values(N, C)),
        (nn.KLDivLoss(reduction="sum", log_target=True), values(N, C)),
    ],
)
def test_losses_without_curvature_give_zeros_and_say_so(loss, target):
    model = extend(nn.Sequential(nn.Linear(4, C), nn.LogSoftmax(1)).double())
    with pytest.warns(UserWarning, match="linear in its input"), backpack(DiagGGNExact()):
        extend(loss)(model(values(N, 4)), target).backward()
    assert not any(p.diag_ggn_exact.any() for p in model.parameters())


def draws(lossfunc, rest, count, weights=None):
    """Columns that are drawn for outputs ``[N, C]``, ``[count, N, C]``, without their factor; and the outputs."""
    model = extend(nn.Linear(2, C).double())
    out = model(values(N, 2))
    loss = extend(lossfunc)(out, *rest)
    with backpack(SqrtGGNMC(count)):
        (loss if weights is None else (loss * weights).sum()).backward()
    return model.bias.sqrt_ggn_mc * count**0.5, out.detach()


def frequencies_fit(drawn, probability):
    """Hoeffding: a frequency of ``drawn[k]`` is off by more than this with a probability of less than 1e-6."""
    bound = (math.log(2e6 * probability.numel()) / (2 * len(drawn))) ** 0.5
    return bool(((drawn.double().mean(0) - probability).abs() < bound).all())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_draws_labels_from_the_softmax(reduction):
    columns, out = draws(nn.CrossEntropyLoss(reduction=reduction), (LABELS,), 3000)
    p = out.softmax(1)
    labels = columns.argmin(2)
    scale = N**-0.5 if reduction == "mean" else 1
    assert close(columns, scale * (p - one_hot(labels, C)))
    assert frequencies_fit(one_hot(labels, C), p)


def test_binary_cross_entropy_draws_labels_from_bernoulli_distributions():
    columns, out = draws(nn.BCEWithLogitsLoss(), (bits(N, C),), 3000)
    p, labels = out.sigmoid(), (columns < 0).double()
    assert close(columns, (p - labels) / (N * C) ** 0.5)
    assert frequencies_fit(labels, p)


def test_poisson_loss_draws_counts():
    columns, out = draws(nn.PoissonNLLLoss(), (counts(N, C),), 3000)
    rate = out.exp()
    labels = rate - columns * (N * C) ** 0.5
    assert close(labels, labels.round(), rtol=1e-9) and labels.round().min() >= 0
    for count in range(4):
        probability = (count * out - rate - math.lgamma(count + 1)).exp()
        assert frequencies_fit(labels.round() == count, probability)


@pytest.mark.parametrize("loss", ["mse", "gaussian"])
def test_losses_of_normal_distributions_draw_normal_targets(loss):
    lossfunc, rest = LOSSES[loss]("mean")
    columns, out = draws(lossfunc, rest, 3000)
    variance = rest[1] if loss == "gaussian" else torch.full_like(out, 0.5)
    # the gradient at a target y is (f - y) / variance, up to the factor of the mean
    standard = -columns * (N * C) ** 0.5 * variance.sqrt()
    for quantile in (-1.0, 0.0, 0.5, 2.0):
        below = torch.full((), (1 + math.erf(quantile / 2**0.5)) / 2, dtype=torch.float64)
        assert frequencies_fit(standard < quantile, below)


@pytest.mark.parametrize("name", ["huber", "smooth_l1", "soft_margin", "bce_logits_positive", "cross_entropy_all"])
def test_what_is_drawn_averages_to_the_hessian(name):
    """Entry by entry within six standard errors, those of the sample itself."""
    lossfunc, rest = LOSSES[name]("none")
    weights = values(N, C) if not name.startswith("cross") else values(N)
    columns, out = draws(lossfunc, rest, 3000, weights)
    hessian = torch.autograd.functional.hessian(lambda o: (lossfunc(o, *rest) * weights).sum(), out)
    products = columns.unsqueeze(3) * columns.unsqueeze(2)
    error = 6 * products.std(0) / 3000**0.5 + 1e-12
    for n in range(N):
        assert bool(((products.mean(0)[n] - hessian[n, :, n]).abs() <= error[n]).all())


@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_of_one_sample_without_a_batch_axis(soft):
    target = values(C).softmax(0) if soft else LABELS[1]
    lossfunc = Weighted(nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1))
    check(nn.Sequential(nn.Linear(4, C), nn.Flatten(0)).double(), values(1, 4), lossfunc, (target,), 1)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(reduction="none"), nn.MSELoss(reduction="none")])
def test_negative_weights_are_refused(loss):
    model = extend(nn.Linear(4, C).double())
    target = LABELS if isinstance(loss, nn.CrossEntropyLoss) else values(N, C)
    with pytest.raises(ValueError, match="not positive semidefinite"), backpack(DiagGGNExact()):
        (-extend(loss)(model(values(N, 4)), target)).sum().backward()
    assert not any(hasattr(p, "diag_ggn_exact") for p in model.parameters())


def test_a_rescaled_sum_of_losses_is_not_taken_for_a_factor():
    """Weights of a loss that is not reduced belong to the loss: no warning."""
    model = extend(nn.Linear(4, C).double())
    with warnings.catch_warnings(), backpack(DiagGGNExact()):
        warnings.simplefilter("error")
        (0.1 * extend(nn.CrossEntropyLoss(reduction="none"))(model(values(N, 4)), LABELS)).sum().backward()


@pytest.mark.parametrize(
    "make",
    [
        KFRA,
        KFLR,
        DiagGGNExact,
        DiagHessian,
        BatchDiagHessian,
        lambda: HBP("hessian", "sum", "average", "E[J^T E(H) J]"),
    ],
    ids=["KFRA", "KFLR", "DiagGGNExact", "DiagHessian", "BatchDiagHessian", "HBP"],
)
def test_cross_entropy_of_one_class_has_no_curvature(make):
    model, extension = extend(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()), make()
    with backpack(extension):
        extend(nn.CrossEntropyLoss())(model(values(N, 3)), torch.zeros(N, dtype=torch.int64)).backward()
    for p in model.parameters():
        found = vars(p)[extension.savefield]
        assert not (found if isinstance(found, torch.Tensor) else found[0]).any()


class WithVariance(nn.Module):
    """A loss inside of a loss, both arguments of which depend on the model."""

    def __init__(self):
        super().__init__()
        self.inner = nn.GaussianNLLLoss(reduction="sum")

    def forward(self, out, y):
        return self.inner(out[:, :1], y, out[:, 1:].exp())


def test_a_loss_within_a_loss_may_take_the_model_into_further_arguments():
    """Its Hessian is indefinite, which the empirical Fisher matrix need not know."""
    model, X, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), values(5, 3), values(5, 1)
    assert verify(model, WithVariance(), X, y, DiagHessian(), HMP()).passed
    extend(model)
    with backpack(BatchGrad(), KFAC(fisher="empirical"), EKFAC(fisher="empirical")):
        extend(WithVariance())(model(X), y).backward()
    for layer in (model[0], model[2]):
        assert close(layer.bias.kfac[0], layer.bias.grad_batch.T @ layer.bias.grad_batch)
        assert close(layer.weight.kfac[0], layer.bias.kfac[0])
        g = layer.weight.grad_batch.flatten(1)
        assert close(layer.weight.ekfac.eigenvalues.sum(), g.square().sum())
