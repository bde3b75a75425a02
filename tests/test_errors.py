"""Bad input: an error that says what is wrong, where and what to do, and nothing half-done."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from truths import close
from truths.autograd import through_rows

from backpack import backpack, extend
from backpack.extensions import (
    EKFAC,
    KFAC,
    KFLR,
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    GGNGram,
    SqrtGGNExact,
    Variance,
)

SECOND_ORDER = [DiagGGNExact, DiagGGNMC, BatchDiagGGNExact, SqrtGGNExact, GGNGram]
EXTENSIONS = [BatchGrad, BatchL2Grad, Variance, *SECOND_ORDER]


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()


def batch(n=5):
    return torch.randn(n, 3, dtype=torch.float64), torch.arange(n) % 2


def refused(model, extensions, error, words, loss=None, batch=batch, lossfunc=None):
    """The error comes, no parameter has a result, and the next pass is right."""
    lossfunc = extend(nn.CrossEntropyLoss()) if lossfunc is None else lossfunc
    X, y = batch()
    with pytest.raises(error, match=words), backpack(*extensions):
        (lossfunc(model(X), y) if loss is None else loss(model, X, y)).backward()
    fields = [extension.savefield for extension in extensions]
    assert not [name for name, p in model.named_parameters() for field in fields if hasattr(p, field)]


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_loss_of_a_tensor_that_no_extended_model_made_is_warned_of(extension):
    (X, y), lossfunc, model = batch(), extend(nn.CrossEntropyLoss()), net()
    for start in (lambda loss, x: loss.backward(), torch.autograd.grad):
        with pytest.warns(UserWarning, match=r"extend\(model\)"), backpack(extension()):
            x = X.clone().requires_grad_()
            start(lossfunc(model(x), y), x)


class Functional(nn.Module):
    """Its frozen parameters are used outside of its layers too."""

    def __init__(self):
        super().__init__()
        self.first, self.scale = nn.Linear(3, 2), nn.Parameter(torch.rand(2))

    def forward(self, x):
        return self.first(x) * self.scale


FROZEN = {
    "layer": lambda: nn.Linear(3, 2),
    "chain": net,
    "without parameters": lambda: nn.Sequential(nn.Tanh()),
    "normalized": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)),
    "functional": Functional,
}


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("name", FROZEN)
def test_the_gradient_by_the_input_of_a_frozen_model_is_as_in_plain_pytorch(name, extension):
    (X, y), lossfunc, model = batch(), nn.CrossEntropyLoss(), FROZEN[name]().double()
    expected, found = X.clone().requires_grad_(), X.clone().requires_grad_()
    lossfunc(model(expected), y).backward()
    extend(model).requires_grad_(False)
    for loss in (extend(nn.CrossEntropyLoss()), nn.CrossEntropyLoss()):
        with backpack(extension()):
            loss(model(found), y).backward()
        assert torch.equal(found.grad, expected.grad)
        with backpack(extension()):
            (grad,) = torch.autograd.grad(loss(model(found), y), found)
        assert torch.equal(grad, expected.grad)
        found.grad = None
    assert not any(vars(p) for p in model.parameters())


def test_a_loss_that_is_no_scalar_is_refused():
    model = extend(net())
    lossfunc = extend(nn.CrossEntropyLoss(reduction="none"))
    for extension in (BatchGrad(), DiagGGNExact()):
        refused(model, [extension], RuntimeError, "scalar outputs", lossfunc=lossfunc)


class Lost(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.rest = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.rest(torch.cat([self.first(x[:1]).expand(len(x), -1), x[1:] * 0])[: len(x)])


def test_a_row_that_all_samples_take_belongs_to_each_of_them():
    exact(extend(Lost().double()), "Samples are mixed by Expand")


class Centered(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


MIXING = [nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False), Centered()]


def mixed(mixing):
    return extend(nn.Sequential(nn.Linear(3, 4), mixing, nn.Linear(4, 2)).double())


@pytest.mark.parametrize("extension", [KFAC, KFLR, EKFAC])
@pytest.mark.parametrize("mixing", MIXING)
def test_kronecker_factors_of_a_model_that_mixes_samples_are_refused_again_and_again(extension, mixing):
    for _ in range(2):
        words = r"samples are mixed.*as 0\.weight.*not defined.*\.eval\(\)"
        refused(mixed(mixing), [extension()], RuntimeError, words)


def exact(model, notice):
    """Individual gradients are what flows through the rows of the output; ``notice``: what is told, and only once."""
    X, y = batch()
    for told in (notice, ""):
        out = model(X)
        loss = nn.functional.cross_entropy(out, y)
        expected = through_rows(out, loss, list(model.parameters()))
        with (
            pytest.warns(UserWarning, match=told) if told else nullcontext(),
            backpack(BatchGrad(), BatchL2Grad(subsampling=[3, 0]), Variance()),
        ):
            loss.backward()
        size = max(rows.abs().max() for rows in expected)
        for p, rows in zip(model.parameters(), expected, strict=True):
            assert close(p.grad_batch, rows, size)
            assert close(p.batch_l2, rows[[3, 0]].flatten(1).square().sum(1), size**2)
            assert close(p.variance, rows.var(0, correction=0), size**2)


@pytest.mark.parametrize("mixing", MIXING)
def test_samples_that_are_mixed_have_what_flows_through_their_rows(mixing):
    exact(mixed(mixing), "Samples are mixed by (NativeBatchNorm|Sub).*5 samples.*eval")


@pytest.mark.parametrize("mixing", MIXING)
def test_clipping_is_refused_in_every_pass_where_samples_are_mixed(mixing):
    model = mixed(mixing)
    for _ in range(3):
        refused(model, [ClippedGrad(0.1)], RuntimeError, r"ClippedGrad: samples are mixed by .*eval")
    model.eval()
    if not isinstance(mixing, Centered):
        with backpack(ClippedGrad(0.1)):
            model(batch()[0]).square().sum().backward()


def test_clipping_is_refused_where_frozen_layers_feed_what_mixes_samples():
    model = mixed(nn.BatchNorm1d(4))
    model[0].requires_grad_(False)
    refused(model, [ClippedGrad(0.1)], RuntimeError, "samples are mixed by NativeBatchNorm")


def test_a_model_that_stops_mixing_samples_is_as_any_other():
    model = mixed(nn.BatchNorm1d(4, affine=False))
    exact(model, "Samples are mixed")
    exact(model.eval(), "")


@pytest.mark.parametrize("extension", [DiagGGNExact, DiagGGNMC, SqrtGGNExact, GGNGram])
def test_second_order_needs_an_extended_loss(extension):
    refused(extend(net()), [extension()], RuntimeError, r"extend\(lossfunc\)", lossfunc=nn.CrossEntropyLoss())


@pytest.mark.parametrize("extension", [DiagGGNExact, DiagGGNMC, SqrtGGNExact, GGNGram])
def test_a_concave_loss_leaves_no_results(extension):
    class Concave(nn.Module):
        def forward(self, out, target):
            return -out.square().mean()

    model, lossfunc, (X, y) = extend(net()), extend(Concave()), batch()
    refused(model, [extension(), BatchGrad()], ValueError, "not positive semidefinite", lossfunc=lossfunc)
    with backpack(BatchGrad()):  # nothing is left half-done
        lossfunc(model(X), y).backward()


def test_a_target_that_requires_a_gradient_is_refused():
    model = extend(net())
    target = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    refused(
        model,
        [DiagGGNExact()],
        RuntimeError,
        r"\[5, 2\], requires a gradient",
        loss=lambda model, X, y: extend(nn.MSELoss())(model(X), target),
    )


@pytest.mark.parametrize("extension", [BatchGrad, DiagGGNExact])
def test_a_parameter_that_is_used_unseen_leaves_no_results(extension):
    lossfunc = extend(nn.CrossEntropyLoss())
    model = extend(nn.ModuleDict({"seen": net(), "unseen": nn.Linear(1, 1).double()}))
    model.forward = lambda X: model["seen"](X)  # the other is used outside
    words = r"unseen\.weight of shape \[1, 1\].*requires_grad_\(False\)"
    refused(
        model,
        [extension()],
        RuntimeError,
        words,
        loss=lambda model, X, y: lossfunc(model(X), y) + (torch.ones_like(X[:, :1]) @ model["unseen"].weight).sum(),
    )


@pytest.mark.parametrize("factor", [2.0, 0.5, -1.0])
def test_a_factor_of_the_loss_is_warned_of_and_ignored_in_every_reduction(factor):
    X, y = batch()
    for reduction in ("mean", "sum"):
        model, lossfunc = extend(net()), extend(nn.CrossEntropyLoss(reduction=reduction))
        with backpack(DiagGGNExact()):
            lossfunc(model(X), y).backward()
        expected = [p.diag_ggn_exact for p in model.parameters()]
        words = f"CrossEntropyLoss was multiplied by a factor.*{factor:.3g}"
        with pytest.warns(UserWarning, match=words), backpack(DiagGGNExact()):
            (factor * lossfunc(model(X), y)).backward()
        assert all(close(p.diag_ggn_exact, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_a_part_that_is_switched_alone_and_mixes_samples_is_found():
    model = extend(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh(), nn.Linear(4, 2)).eval())
    lossfunc, X = extend(nn.MSELoss()), torch.randn(4, 3)
    for extension in (ClippedGrad(0.1), KFLR()):
        out = model(X)
        with backpack(extension):
            lossfunc(out, torch.zeros_like(out)).backward()
    model[1].train()
    for extension in (ClippedGrad(0.1), KFLR()):
        out = model(X)
        with pytest.raises(RuntimeError, match="samples are mixed"), backpack(extension):
            lossfunc(out, torch.zeros_like(out)).backward()


@pytest.mark.parametrize("extension", [BatchDiagGGNExact(), DiagHessian()])
def test_samples_that_are_mixed_before_the_loss_are_found(extension):
    model, lossfunc, X = extend(nn.Linear(3, 2)), extend(nn.CrossEntropyLoss()), torch.randn(4, 3)
    for centered in (False, True):
        out = model(X)
        loss = lossfunc(out - out.mean(0) if centered else out + 1, torch.tensor([0, 1, 1, 0]))
        if centered:
            with pytest.raises(RuntimeError, match="mix samples"), backpack(extension):
                loss.backward()
        else:
            with backpack(extension):
                loss.backward()
