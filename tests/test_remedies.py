"""What the message of an error or a warning recommends works: provoke it, do what it says, see the right result."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from truths import close
from truths.autograd import through_rows
from truths.data_sets import problem
from truths.second_order import hessian_blocks

from backpack import accumulate, backpack, extend, hessianfree
from backpack.extensions import (
    GGNMP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    PCHMP,
    BatchDiagGGNExact,
    BatchGrad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
)
from backpack.utils.kroneckers import inv_kfacs, kfacs_to_mat

F64 = torch.float64


def rand(*shape, dtype=F64):
    return torch.randn(*shape, dtype=dtype)


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)).double()


X, Y, Z = rand(5, 3), torch.arange(5) % 2, rand(5, 2)


def individual_is_right(output, loss, model):
    """``grad_batch`` is there, and is what flows through the rows of the output."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    truth = through_rows(output, loss, parameters)
    size = max(float(rows.abs().max()) for rows in truth)
    return all(close(p.grad_batch, rows, size) for p, rows in zip(parameters, truth, strict=True))


def first_order_works(model, x=X, **block):
    out = model(x)
    loss = out.sin().sum()
    with backpack(BatchGrad(), **block):
        loss.backward(retain_graph=True)
    return individual_is_right(out, loss, model)


def ggn(output, parameters):
    """The diagonal for the mean of the squared error, by a row of the Jacobian for each entry of the output."""
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in output.flatten()]
    return [2 / output.numel() * sum(g.square() for g in own) for own in zip(*rows, strict=True)]


def ggn_works(model, x=X):
    parameters = [p for p in model.parameters() if p.requires_grad]
    out = model(x)
    with backpack(DiagGGNExact()):
        extend(nn.MSELoss())(out, torch.zeros_like(out)).backward(retain_graph=True)
    return all(close(p.diag_ggn_exact, truth) for p, truth in zip(parameters, ggn(out, parameters), strict=True))


def factors_work(model, extension=None, x=X):
    """The one factor of the last bias is its block of the GGN."""
    out = model(x)
    with backpack(extension or KFLR()):
        extend(nn.MSELoss())(out, torch.zeros_like(out)).backward(retain_graph=True)
    last = [p for p in model.parameters() if p.requires_grad][-1]
    jacobian = torch.stack([torch.autograd.grad(entry, last, retain_graph=True)[0] for entry in out.flatten()])
    return close(last.kflr[0], 2 / out.numel() * jacobian.T @ jacobian)


# Extending a model, starting a pass


def test_a_block_without_a_pass():
    model = net()
    with pytest.warns(UserWarning, match=r"Call extend\(model\) before the forward pass, and loss.backward\(\) inside"):
        loss = model(X).sum()
        with backpack(BatchGrad()):
            loss.backward()
    assert first_order_works(extend(model))


def test_an_extended_loss_of_a_model_that_is_not_extended():
    model, lossfunc = net(), extend(nn.CrossEntropyLoss())
    words = r"Call extend\(model\) before the forward pass, and give the model's output to the loss"
    with pytest.warns(UserWarning, match=words), backpack(BatchGrad()):
        lossfunc(model(X), Y).backward()
    out = extend(model)(X)
    loss = lossfunc(out, Y)
    with backpack(BatchGrad()):
        loss.backward(retain_graph=True)
    assert individual_is_right(out, loss, model)


def test_a_class_of_extensions():
    with pytest.raises(ValueError, match=r"write BatchGrad\(\) instead of BatchGrad"):
        backpack(BatchGrad)
    assert first_order_works(extend(net()))


def test_two_extensions_of_one_savefield():
    with pytest.raises(ValueError, match="give one of them another savefield"):
        backpack(BatchGrad(), BatchGrad([0]))
    model = extend(net())
    with backpack(BatchGrad(), BatchGrad([0], savefield="of_the_first")):
        model(X).sin().sum().backward()
    assert all(torch.equal(p.of_the_first, p.grad_batch[:1]) for p in model.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module():
    model = net()
    with pytest.raises(TypeError, match="extend the module that it was made from"):
        extend(torch.jit.trace(model, X))
    assert first_order_works(extend(model))


def test_second_order_of_a_loss_that_is_not_extended():
    model, lossfunc = extend(net()), nn.MSELoss()
    words = r"Write lossfunc = extend\(lossfunc\) before the forward pass, and call backward\(\) on its output"
    with pytest.raises(RuntimeError, match=words), backpack(DiagGGNExact()):
        lossfunc(model(X), Z).backward()
    lossfunc = extend(lossfunc)
    out = model(X)
    loss = lossfunc(out, Z)
    with backpack(DiagGGNExact()):
        loss.backward(retain_graph=True)
    parameters = list(model.parameters())
    assert all(close(p.diag_ggn_exact, d) for p, d in zip(parameters, ggn(out, parameters), strict=True))


class Plain(nn.Module):
    """Holds modules, and is called in one way or another."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs):
        return self.run(self, *inputs)


@pytest.mark.parametrize("remedy", ["call the extended module", "freeze"])
def test_a_parameter_that_is_used_elsewhere(remedy):
    model = extend(Plain(lambda m, x: m.used(x), used=net(), other=nn.Linear(3, 2).double()))
    words = r"the extended module itself, or freeze the parameter with requires_grad_\(False\)"
    with pytest.raises(RuntimeError, match=words), backpack(BatchGrad()):
        (model(X).sum() + nn.functional.linear(torch.ones_like(X), model.other.weight).sum()).backward()
    if remedy == "freeze":
        model.other.requires_grad_(False)
    else:
        model.run = lambda m, x: m.used(x) + m.other(x)
    assert first_order_works(model)


@pytest.mark.parametrize("remedy", ["backward", "grad"])
def test_a_pass_that_ends_early(remedy):
    model = extend(Plain(lambda m, x: m.shared(m.at(m.shared(x))), shared=nn.Linear(3, 3), at=nn.Tanh()).double())
    model.at.register_forward_hook(lambda module, given, output: kept.append(output))
    kept = []
    words = r"Call backward\(\), or autograd.grad with respect to the parameters whose results are wanted"
    with pytest.warns(UserWarning, match=words), backpack(BatchGrad()):
        torch.autograd.grad(model(X).sin().sum(), kept)
    assert not hasattr(model.shared.weight, "grad_batch")
    if remedy == "backward":
        assert first_order_works(model)
        return
    out = model(X)
    loss = out.sin().sum()
    with backpack(BatchGrad()):
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert individual_is_right(out, loss, model)


@pytest.mark.parametrize("remedy", ["backward", "freeze"])
def test_clipping_in_a_pass_that_ends_early(remedy):
    model = extend(net())
    late = list(model[2].parameters())
    words = r"Call backward\(\), or freeze with requires_grad_\(False\) what is to be left out"
    with pytest.raises(RuntimeError, match=words), backpack(ClippedGrad(0.1)):
        model(X).sin().sum().backward(inputs=late)
    if remedy == "freeze":
        model[0].requires_grad_(False)
    out = model(X)
    loss = out.sin().sum()
    with backpack(ClippedGrad(0.1)):
        loss.backward(inputs=late if remedy == "freeze" else None, retain_graph=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = through_rows(out, loss, parameters)
    norms = sum(r.flatten(1).square().sum(1) for r in rows).sqrt()
    assert (norms > 0.1).any()
    for p, r in zip(parameters, rows, strict=True):
        assert close(p.grad_clipped, torch.tensordot((0.1 / norms).clamp(max=1), r, 1))


def test_a_reentrant_checkpoint():
    layers = net()
    model = extend(
        Plain(lambda m, x: m.last(checkpoint(m.layers, x, use_reentrant=m.old)), layers=layers, last=nn.Tanh())
    )
    model.old = True
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"checkpoint\(\.\.\., use_reentrant=False\)"), backpack(BatchGrad()):
        model(x).sum().backward()
    model.old = False
    assert first_order_works(model)


# Which rows are a sample


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x):
        return self.layer(x).mean(-2)


@pytest.mark.parametrize("remedy", ["an axis", "sample_ids"])
def test_an_output_without_an_axis_of_samples(remedy):
    model = extend(Mean())
    words = r"x\[None\] for one sample; or say with sample_ids="
    with pytest.raises(RuntimeError, match=words), backpack(BatchGrad()):
        model(X).sin().sum().backward()
    if remedy == "an axis":
        assert first_order_works(model, X[None])
        assert model.layer.weight.grad_batch.shape == (1, 2, 3)
    else:
        out = model(X)
        with backpack(BatchGrad(), sample_ids=torch.tensor([0, 0])):
            out.sin().sum().backward()
        assert all(close(p.grad_batch, p.grad[None]) for p in model.parameters())


@pytest.mark.parametrize("remedy", ["samples first", "sample_ids"])
def test_an_output_whose_axes_have_one_size(remedy):
    model = extend(Plain(lambda m, x: m.a(x.T), a=nn.Linear(4, 4)).double())
    words = "Let the first axis of inputs and output count the samples; or say with sample_ids= which sample"
    with pytest.raises(RuntimeError, match=words), backpack(BatchGrad()):
        model(rand(4, 4)).sin().sum().backward()
    if remedy == "samples first":
        model.run = lambda m, x: m.a(x)
        assert first_order_works(model, rand(4, 4))
    else:
        assert first_order_works(model, rand(4, 4), sample_ids=torch.arange(4))


def packed(x):
    return pack_padded_sequence(x, torch.tensor([4, 3, 2]), batch_first=True)


def test_a_packed_sequence():
    recurrent, x = nn.RNN(3, 2, batch_first=True).double(), rand(3, 4, 3)
    extend(recurrent)
    with (
        pytest.raises(RuntimeError, match="pad_packed_sequence inside of the module that is extended"),
        backpack(BatchGrad()),
    ):
        recurrent(packed(x))[0].data.sum().backward()
    model = extend(Plain(lambda m, x: pad_packed_sequence(m.r(packed(x))[0], batch_first=True)[0], r=recurrent))
    assert first_order_works(model, x)


def test_parts_of_a_batch_of_different_sizes():
    layer = extend(nn.Linear(3, 2).double())
    with (
        pytest.raises(RuntimeError, match="Let one call of the extended module see the whole batch"),
        backpack(BatchGrad()),
    ):
        (layer(X[:2]).sin().sum() + layer(X[2:]).sin().sum()).backward()
    assert first_order_works(layer)


@pytest.mark.parametrize(
    ("written", "words", "right"),
    [
        ([5], r"valid are -5 to 4", [4]),
        ([-6], r"valid are -5 to 4", [-5]),
        ([True] * 4, "4 entries, but the batch has 5", [True] * 5),
        (slice(5, 9), "selects none of the 5", slice(4, 9)),
    ],
)
def test_a_subset_that_does_not_fit(written, words, right):
    model = extend(net())
    with pytest.raises((IndexError, ValueError), match=words), backpack(BatchGrad(written)):
        model(X).sin().sum().backward()
    out = model(X)
    loss = out.sin().sum()
    with backpack(BatchGrad(right)):
        loss.backward(retain_graph=True)
    rows = torch.arange(5)[torch.tensor(right) if isinstance(right, list) else right]
    for p, truth in zip(model.parameters(), through_rows(out, loss, list(model.parameters())), strict=True):
        assert close(p.grad_batch, truth[rows])


@pytest.mark.parametrize(
    ("written", "words", "right", "rows"),
    [
        ([], "select one sample at least, or pass None for all", [2], [2]),
        ([], "select one sample at least, or pass None for all", None, range(5)),
        ([0.0, 2.0], "integers or booleans", [0, 2], [0, 2]),
        (torch.tensor([[0, 2]]), "one-dimensional", torch.tensor([[0, 2]]).flatten(), [0, 2]),
        ([True, 1], "mixes integers and booleans", [0, 1], [0, 1]),
        (3, "sample numbers, a mask, a slice or a range", range(3), range(3)),
    ],
)
def test_what_is_no_subset(written, words, right, rows):
    with pytest.raises((TypeError, ValueError), match=words):
        BatchGrad(written)
    model = extend(net())
    out = model(X)
    loss = out.sin().sum()
    with backpack(BatchGrad(right)):
        loss.backward(retain_graph=True)
    for p, truth in zip(model.parameters(), through_rows(out, loss, list(model.parameters())), strict=True):
        assert close(p.grad_batch, truth[list(rows)])


@pytest.mark.parametrize(
    ("written", "words", "right"),
    [
        (torch.tensor([0.0, 0, 1, 1, 2]), "integer tensor, with one number for each", torch.tensor([0, 0, 1, 1, 2])),
        (torch.tensor([0, 0, 1, -2, 2]), "from 0, and -1 stands for none", torch.tensor([0, 0, 1, -1, 2])),
        (
            (torch.tensor([1, 1, 2, 2, 3]), 3),
            "there are 3 samples, numbered from 0",
            (torch.tensor([0, 0, 1, 1, 2]), 3),
        ),
        ((torch.tensor([0, 0, 1, 1, 2]), 3.0), "number of samples as an integer", (torch.tensor([0, 0, 1, 1, 2]), 3)),
        (torch.zeros(4, dtype=torch.int64), "one number for each entry along its first axis", torch.zeros(5).long()),
        (torch.full((5,), -1), "gives no entry to a sample", torch.tensor([0, -1, -1, -1, -1])),
    ],
)
def test_numbers_of_samples_that_are_none(written, words, right):
    model = extend(net())
    out = model(X)
    loss = out.sin().sum()
    with pytest.raises((TypeError, ValueError, RuntimeError), match=words), backpack(BatchGrad(), sample_ids=written):
        loss.backward()
    with backpack(BatchGrad(), sample_ids=right):
        loss.backward(retain_graph=True)
    ids = right[0] if isinstance(right, tuple) else right
    for p, rows in zip(model.parameters(), through_rows(out, loss, list(model.parameters())), strict=True):
        truth = torch.stack([rows[ids == number].sum(0) for number in range(int(ids.max()) + 1)])
        assert close(p.grad_batch, truth, rows.abs().max())


# Samples that mix


def normalized(norm):
    return nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2)).double()


WAYS = r"Call \.eval\(\) on layers that normalize by statistics of the batch, or replace them by GroupNorm"
APART = {
    "eval": lambda model: model.eval(),
    "GroupNorm": lambda model: normalized(nn.GroupNorm(2, 4)),
    "LayerNorm": lambda model: normalized(nn.LayerNorm(4)),
}


@pytest.mark.parametrize("remedy", APART)
def test_individual_gradients_of_mixed_samples(remedy):
    model = extend(normalized(nn.BatchNorm1d(4)))
    with pytest.warns(UserWarning, match=WAYS + r".* or let subsampling= select fewer"), backpack(BatchGrad()):
        model(X).sin().sum().backward()
    model = extend(APART[remedy](model))
    assert first_order_works(model)
    loss = model(X[:1]).sin().sum()  # now a sample is what it would be alone
    for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert close(p.grad_batch[0], g)


@pytest.mark.parametrize("remedy", APART)
def test_clipping_of_mixed_samples(remedy):
    model = extend(normalized(nn.BatchNorm1d(4)))
    with pytest.raises(RuntimeError, match=WAYS), backpack(ClippedGrad(0.1)):
        model(X).sin().sum().backward()
    model = extend(APART[remedy](model))
    with backpack(BatchGrad(), ClippedGrad(0.1)):
        model(X).sin().sum().backward()
    norms = sum(p.grad_batch.flatten(1).square().sum(1) for p in model.parameters()).sqrt()
    for p in model.parameters():
        assert close(p.grad_clipped, torch.tensordot((0.1 / norms).clamp(max=1), p.grad_batch, 1))


@pytest.mark.parametrize("remedy", [*APART, "freeze", "diagonal"])
def test_kronecker_factors_of_mixed_samples(remedy):
    model = extend(normalized(nn.BatchNorm1d(4)))
    words = WAYS + r".*or freeze these parameters with requires_grad_\(False\), or take an extension that is diagonal"
    with pytest.raises(RuntimeError, match=words), backpack(KFLR()):
        extend(nn.MSELoss())(model(X), Z).backward()
    if remedy in APART:
        assert factors_work(extend(APART[remedy](model)))
    elif remedy == "freeze":
        model[0].requires_grad_(False)
        assert factors_work(model)
    else:
        with pytest.warns(UserWarning, match="Samples are mixed"), backpack(DiagGGNExact()):
            extend(nn.MSELoss())(model(X), Z).backward()
        out = model(X)
        parameters = list(model.parameters())
        size = max(float(d.abs().max()) for d in ggn(out, parameters))
        assert all(close(p.diag_ggn_exact, d, size) for p, d in zip(parameters, ggn(out, parameters), strict=True))


# Losses


@pytest.mark.parametrize("remedy", ["extend it", "outside"])
def test_a_term_that_is_no_extended_loss(remedy):
    model, lossfunc = extend(net()), extend(nn.MSELoss())
    out = model(X)
    words = r"Module without parameters that takes the model's output, and extend\(\) it; or call backward\(\)"
    with pytest.raises(RuntimeError, match=words), backpack(DiagGGNExact()):
        (lossfunc(out, Z) + 0.5 * out.square().mean()).backward()
    out, factor = model(X), 1.0
    if remedy == "extend it":
        factor = 1.5
        half = extend(Plain(lambda m, output: 0.5 * output.square().mean()))
        loss = lossfunc(out, Z) + half(out)
    else:
        loss = lossfunc(out, Z)
        out.square().mean().backward(retain_graph=True)
    with backpack(DiagGGNExact()):
        loss.backward(retain_graph=True)
    parameters = list(model.parameters())
    assert all(close(p.diag_ggn_exact, factor * d) for p, d in zip(parameters, ggn(out, parameters), strict=True))


def test_a_loss_that_is_multiplied():
    model, lossfunc = extend(net()), extend(nn.MSELoss())
    words = r"Let the loss be a module that multiplies by it, and extend\(\) that"
    with pytest.warns(UserWarning, match=words), backpack(DiagGGNExact()):
        (3 * lossfunc(model(X), Z)).backward()
    tripled = extend(Plain(lambda m, output, target: 3 * m.loss(output, target), loss=nn.MSELoss()))
    out = model(X)
    with backpack(DiagGGNExact()):
        tripled(out, Z).backward(retain_graph=True)
    parameters = list(model.parameters())
    assert all(close(p.diag_ggn_exact, 3 * d) for p, d in zip(parameters, ggn(out, parameters), strict=True))


def test_a_target_that_requires_a_gradient():
    model, lossfunc, target = extend(net()), extend(nn.MSELoss()), Z.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"Give it as \.detach\(\)"), backpack(DiagGGNExact()):
        lossfunc(model(X), target).backward()
    out = model(X)
    with backpack(DiagGGNExact()):
        lossfunc(out, target.detach()).backward(retain_graph=True)
    parameters = list(model.parameters())
    assert all(close(p.diag_ggn_exact, d) for p, d in zip(parameters, ggn(out, parameters), strict=True))


@pytest.mark.parametrize("remedy", ["first order", "sample_ids"])
def test_a_loss_that_couples_samples(remedy):
    model = extend(net())
    coupling = extend(Plain(lambda m, output: output.sum(0).square().sum()))
    words = "Take first-order extensions, or give samples that belong together one number in sample_ids="
    with pytest.raises(ValueError, match=words), backpack(DiagGGNExact()):
        coupling(model(X)).backward()
    out = model(X)
    loss = coupling(out)
    if remedy == "first order":
        with backpack(BatchGrad()):
            loss.backward(retain_graph=True)
        assert individual_is_right(out, loss, model)
        return
    with backpack(DiagGGNExact(), sample_ids=torch.zeros(5, dtype=torch.int64)):
        loss.backward(retain_graph=True)
    for p in model.parameters():  # twice the squares of the Jacobian of the sum
        rows = [torch.autograd.grad(entry, p, retain_graph=True)[0] for entry in out.sum(0)]
        assert close(p.diag_ggn_exact, 2 * sum(g.square() for g in rows))


@pytest.mark.parametrize("remedy", [DiagHessian, HMP])
def test_a_concave_loss(remedy):
    model, concave = extend(net()), extend(Plain(lambda m, output: -output.square().sum()))
    with pytest.raises(ValueError, match="Take DiagHessian, HMP or GGNMP"), backpack(DiagGGNExact()):
        concave(model(X)).backward()
    with backpack(remedy()):
        concave(model(X)).backward()
    for p, block in zip(model.parameters(), hessian_blocks(model, lambda: -model(X).square().sum()), strict=True):
        if remedy is HMP:
            assert close(p.hmp(torch.ones_like(p)).flatten(), block.sum(1), block.abs().max())
        else:
            assert close(p.diag_h.flatten(), block.diagonal(), block.abs().max())


def test_losses_of_different_numbers_of_samples():
    model, one, other = extend(net()), extend(nn.MSELoss()), extend(nn.MSELoss())
    out, further = model(X), model(X[:3])
    with (
        pytest.raises(RuntimeError, match="Call backward\\(\\) for each loss by itself|the whole batch"),
        backpack(DiagGGNExact()),
    ):
        (one(out, Z) + other(further, Z[:3])).backward()
    assert ggn_works(model) and ggn_works(model, X[:3])


# Curvature


class Complex(nn.Module):
    def __init__(self, is_real):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()
        scale = rand(2, dtype=torch.complex128)
        self.scale = nn.Parameter(torch.view_as_real(scale).clone() if is_real else scale)

    def forward(self, x):
        scale = self.scale if self.scale.is_complex() else torch.view_as_complex(self.scale)
        return (self.layer(x) * scale).imag.sin()


@pytest.mark.parametrize("remedy", ["view_as_complex", "freeze", "GGN"])
def test_the_hessian_of_complex_parameters(remedy):
    model, lossfunc = extend(Complex(is_real=False)), extend(nn.MSELoss())
    words = r"torch\.view_as_complex of it in forward\(\); or freeze .*; or take an extension of the GGN"
    with pytest.raises(RuntimeError, match=words), backpack(DiagHessian()):
        lossfunc(model(X), Z).backward()
    if remedy == "GGN":
        with backpack(DiagGGNExact()):
            lossfunc(out := model(X), Z).backward(retain_graph=True)
        rows = [torch.autograd.grad(entry, model.scale, retain_graph=True)[0] for entry in out.flatten()]
        assert close(model.scale.diag_ggn_exact, 2 / out.numel() * sum(g.abs().square() for g in rows))
        return
    if remedy == "freeze":
        model.scale.requires_grad_(False)
    else:
        model = extend(Complex(is_real=True))
    with backpack(DiagHessian()):
        lossfunc(model(X), Z).backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p, block in zip(parameters, hessian_blocks(model, lambda: mse_loss(model(X), Z)), strict=True):
        assert close(p.diag_h.flatten(), block.diagonal(), block.abs().max())


class Distance(nn.Module):
    def forward(self, x):
        return torch.cdist(x.unsqueeze(1), torch.ones(1, 2, 3, dtype=x.dtype), p=3).squeeze(1)


@pytest.mark.parametrize("remedy", ["another function", "GGN"])
def test_a_function_without_second_derivatives(remedy):
    model, lossfunc = extend(nn.Sequential(nn.Linear(3, 3), Distance()).double()), extend(nn.MSELoss())
    words = "Use another function there, or an extension of the Gauss-Newton matrix"
    with pytest.raises(RuntimeError, match=words), backpack(DiagHessian()):
        lossfunc(model(X), Z).backward()
    if remedy == "GGN":
        assert ggn_works(model)
        return
    powers = Plain(lambda m, x: (x.unsqueeze(1) - 1).abs().pow(3).sum(2).pow(1 / 3).expand(-1, 2))
    model = extend(nn.Sequential(model[0], powers))
    with backpack(DiagHessian()):
        lossfunc(model(X), Z).backward()
    for p, block in zip(model.parameters(), hessian_blocks(model, lambda: mse_loss(model(X), Z)), strict=True):
        assert close(p.diag_h.flatten(), block.diagonal(), block.abs().max(), rtol=1e-8)


def attention():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, dtype=F64)
    return nn.Sequential(nn.Dropout(0.5), layer, nn.Flatten(), nn.Linear(12, 2, dtype=F64))


@pytest.mark.parametrize("remedy", ["inside of the block", "evaluation mode"])
def test_fused_attention_with_dropout(remedy):
    model, lossfunc, x, y = extend(attention()), extend(nn.MSELoss()), rand(2, 3, 4), rand(2, 2)
    out = model(x)
    words = r"Run the forward pass inside the backpack\(\.\.\.\) block .* put the model into evaluation mode"
    with pytest.raises(RuntimeError, match=words), backpack(DiagHessian()):
        lossfunc(out, y).backward()
    if remedy == "evaluation mode":
        model.eval()
    with backpack(DiagHessian()):
        lossfunc(out := model(x), y).backward(retain_graph=True)
    weight = model[3].weight
    jacobian = torch.stack([torch.autograd.grad(entry, weight, retain_graph=True)[0] for entry in out.flatten()])
    assert close(weight.diag_h, 2 / out.numel() * jacobian.square().sum(0))  # a linear layer
    if remedy == "evaluation mode":
        own = model[1].self_attn.in_proj_weight
        (block, *_) = hessian_blocks(model, lambda: mse_loss(model(x), y))
        assert close(own.diag_h.flatten(), block.diagonal(), block.abs().max(), rtol=1e-8)


def test_a_product_through_fused_attention():
    model, x = attention().eval(), rand(2, 3, 4)
    parameter = model[1].self_attn.out_proj.bias
    v = torch.arange(4.0, dtype=F64)
    with pytest.raises(RuntimeError, match=r"inside backpack\.hessianfree\.TwiceDifferentiable\(\)"):
        hessianfree.hessian_vector_product(model(x).square().sum(), list(model.parameters()), list(model.parameters()))
    with hessianfree.TwiceDifferentiable():
        loss = model(x).square().sum()
    (found,) = hessianfree.hessian_vector_product(loss, [parameter], [v])
    index = [name for name, _ in model.named_parameters()].index("1.self_attn.out_proj.bias")
    assert close(found, hessian_blocks(model, lambda: model(x).square().sum())[index] @ v, rtol=1e-8)


@pytest.mark.parametrize("remedy", ["freeze", "diagonal"])
def test_a_factor_that_is_too_large(remedy):
    wide = extend(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 32769)).double())
    lossfunc, y = extend(nn.MSELoss()), torch.zeros(2, 32769, dtype=F64)
    wide[1].bias.requires_grad_(False)
    words = r"Freeze the parameter .* for this backward pass, or take an extension that is diagonal"
    with pytest.raises(ValueError, match=words), backpack(KFAC()):
        lossfunc(wide(X[:2]), y).backward()
    if remedy == "freeze":
        wide[1].weight.requires_grad_(False)
        with backpack(KFAC()):
            lossfunc(wide(X[:2]), y).backward()
        assert close(wide[0].weight.kfac[1], X[:2].T @ X[:2] / 2)
    else:
        with backpack(DiagGGNMC()):
            extend(nn.HuberLoss(delta=100))(wide(X[:2]), y).backward()
        h = wide[0](X[:2]).square().sum(0)  # columns have random signs, which drop out of a last layer's squares
        assert close(wide[1].weight.diag_ggn_mc, (h / y.numel()).expand(32769, 2))


def chain():
    return nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)).double()


CHAINS = {
    "no chain": (lambda: Plain(lambda m, x: m.a(x).sin(), a=nn.Linear(3, 2)), "Write it as a Sequential.*or use KFLR"),
    "shared": (lambda: nn.Sequential(layer := nn.Linear(3, 3), nn.Tanh(), layer), "Use KFLR for such a model"),
    "moved": (lambda: nn.Sequential(nn.Linear(3, 2), nn.Unflatten(0, (1, 5)), nn.Flatten(0, 1)), "Use KFLR"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_averaged_curvature_of_what_is_no_chain(name):
    build, words = CHAINS[name]
    model = extend(build().double())
    with pytest.raises(RuntimeError, match=words), backpack(KFRA()):
        out = model(X)
        extend(nn.MSELoss())(out, torch.zeros_like(out)).backward()
    assert factors_work(model)


def test_a_model_that_is_written_as_a_chain():
    model, lossfunc = extend(Plain(lambda m, x: m.a(x).sin(), a=nn.Linear(3, 2)).double()), extend(nn.MSELoss())
    with pytest.raises(RuntimeError, match="Write it as a Sequential, of any modules"), backpack(KFRA()):
        lossfunc(model(X[:1]), Z[:1]).backward()
    written = extend(nn.Sequential(model.a, Plain(lambda m, x: x.sin())))
    with backpack(KFRA(), KFLR()):  # of one sample, they are the same
        lossfunc(written(X[:1]), Z[:1]).backward()
    assert all(close(a, b) for p in written.parameters() for a, b in zip(p.kfra, p.kflr, strict=True))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(0.5)], ids=["statistics", "dropout"])
def test_averaged_curvature_runs_the_model_again(layer):
    model, lossfunc = (
        extend(nn.Sequential(nn.Linear(3, 4), layer, nn.Sigmoid(), nn.Linear(4, 2)).double()),
        extend(nn.MSELoss()),
    )
    model[0].requires_grad_(isinstance(layer, nn.Dropout))  # below what mixes samples, there are no factors
    with pytest.raises(RuntimeError, match=r"[Cc]all eval\(\)"), backpack(KFRA()):
        lossfunc(model(X), Z).backward()
    model.eval()
    with backpack(KFRA()):
        lossfunc(model(X), Z).backward()
    assert close(model[3].bias.kfra[0], 2 / 10 * 5 * torch.eye(2, dtype=F64))


@pytest.mark.parametrize("remedy", ["leave sample_ids out", "KFLR"])
def test_averaged_curvature_of_samples_of_several_rows(remedy):
    model, lossfunc, ids = extend(chain()), extend(nn.MSELoss()), torch.tensor([0, 0, 1, 1, 1])
    with pytest.raises(RuntimeError, match="leave sample_ids out, or use KFLR"), backpack(KFRA(), sample_ids=ids):
        lossfunc(model(X), Z).backward()
    extension = KFRA() if remedy == "leave sample_ids out" else KFLR()
    with backpack(extension, sample_ids=None if isinstance(extension, KFRA) else ids):
        lossfunc(model(X), Z).backward()
    assert close(getattr(model[2].bias, extension.savefield)[0], 2 / 10 * 5 * torch.eye(2, dtype=F64))


def test_averaged_curvature_that_is_to_be_differentiated():
    model, lossfunc = extend(chain()), extend(nn.MSELoss())
    parameters = list(model.parameters())
    with pytest.raises(RuntimeError, match=r"create_graph=True asks for\. Use KFLR"), backpack(KFRA()):
        torch.autograd.grad(lossfunc(model(X), Z), parameters, create_graph=True)
    with backpack(KFLR()):
        torch.autograd.grad(lossfunc(model(X), Z), parameters, create_graph=True)
    weight = model[2].weight
    (found,) = torch.autograd.grad(model[0].bias.kflr[0].sum(), weight)
    slope = (h := model[0](X).sigmoid()) * (1 - h)
    B = 2 / 10 * torch.einsum("ni,ki,kj,nj->ij", slope, weight, weight, slope)
    (truth,) = torch.autograd.grad(B.sum(), weight)
    assert close(found, truth)


@pytest.mark.parametrize("remedy", ["one by one", "KFLR"])
def test_averaged_curvature_of_losses_of_different_inputs(remedy):
    model, one, other = extend(chain()), extend(nn.MSELoss()), extend(nn.MSELoss())
    words = r"Call backward\(\) for each loss by itself, or use KFLR"
    with pytest.raises(RuntimeError, match=words), backpack(KFRA()):
        (one(out := model(X), Z) + other(2 * out, Z)).backward()
    bias, unit = model[2].bias, torch.eye(2, dtype=F64)
    if remedy == "KFLR":
        with backpack(KFLR()):
            (one(out := model(X), Z) + other(2 * out, Z)).backward()
        assert close(bias.kflr[0], (1 + 4) * unit)
    else:
        with backpack(KFRA()):
            one(model(X), Z).backward()
        assert close(bias.kfra[0], unit)


def test_averaged_curvature_of_complex_numbers():
    model, lossfunc = extend(Complex(is_real=False)), extend(nn.MSELoss())
    model = extend(nn.Sequential(model))
    model[0].scale.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"the model has complex ones\. Use KFLR"), backpack(KFRA()):
        lossfunc(model(X), Z).backward()
    assert factors_work(model)


def test_averaged_curvature_of_large_outputs(monkeypatch):
    monkeypatch.setattr("backpack.curvature.averaged.LARGEST", 3)
    model, lossfunc = extend(net()), extend(nn.MSELoss())
    words = r"in the output of Linear, of shape \[5, 4\]: a matrix of 4 rows\. At most 3 are formed\. Use KFAC"
    with pytest.raises(ValueError, match=words), backpack(KFRA()):
        lossfunc(model(X), Z).backward()
    assert factors_work(model, KFAC(fisher="exact", savefield="kflr"))


@pytest.mark.parametrize("remedy", [HMP, GGNMP])
def test_positive_curvature_of_complex_functions(remedy):
    model, lossfunc = (
        extend(Plain(lambda m, x: (m.a(x) * (1 + 1j)).add(1j).abs(), a=nn.Linear(3, 2)).double()),
        nn.MSELoss(),
    )
    extend(lossfunc)
    with pytest.raises(RuntimeError, match="or take the Hessian or the GGN"), backpack(PCHMP()):
        lossfunc(model(X), Z).backward()
        model.a.bias.pchmp(torch.ones(2, dtype=F64))
    v = torch.tensor([1.0, -2.0], dtype=F64)
    with backpack(remedy()):
        lossfunc(out := model(X), Z).backward(retain_graph=True)
    jacobian = torch.stack([torch.autograd.grad(e, model.a.bias, retain_graph=True)[0] for e in out.flatten()])
    block = hessian_blocks(model, lambda: mse_loss(model(X), Z))[1] if remedy is HMP else 2 / 10 * jacobian.T @ jacobian
    assert close(remedy().result(model.a.bias)(v), block @ v)


def test_a_singular_factor():
    factors = [torch.zeros(2, 2, dtype=F64), torch.eye(3, dtype=F64)]
    with pytest.raises(ValueError, match="Give a positive shift"):
        inv_kfacs(factors)
    found = kfacs_to_mat(inv_kfacs(factors, shift=[0.5, 1.0]))
    assert close(found, torch.eye(6, dtype=F64))


# Data sets


def accumulated(data, extension=None, lossfunc=None, **arguments):
    model, own, _, _ = problem()
    return model, accumulate(model, lossfunc or own, data, extension or BatchGrad(), **arguments)


def is_right(model, found, divided=11):
    _, _, x, y = problem()
    out = model(x)
    loss = cross_entropy(out, y, reduction="sum") / divided
    truth = through_rows(out, loss, list(model.parameters()))
    return all(
        close(found["grad_batch"][name], t) for (name, _), t in zip(model.named_parameters(), truth, strict=True)
    )


def halves():
    _, _, x, y = problem()
    return [(x[:4], y[:4]), (x[4:], y[4:])]


def test_batches_of_another_form():
    data = [{"image": x, "digit": y} for x, y in halves()]
    with pytest.raises(
        TypeError, match=r"for batches of other forms, forward=function, a function of the model and a batch"
    ):
        accumulated(data)
    assert is_right(*accumulated(data, forward=lambda model, batch: (model(batch["image"]), batch["digit"])))


class Result:
    """No container that is known."""

    def __init__(self, found):
        self.found = found


@pytest.mark.parametrize("remedy", ["dictionary", "forward"])
def test_a_model_that_returns_something_else(remedy):
    model, lossfunc, _, _ = problem()
    wrapped = Plain(lambda m, x, plain=False: m.inner(x) if plain else Result(m.inner(x)), inner=model)
    words = "Let the model return it in a tuple, a dictionary or a dataclass; or pass forward=function"
    with pytest.raises(TypeError, match=words):
        accumulate(wrapped, lossfunc, halves(), BatchGrad())
    forward = None
    if remedy == "forward":
        forward = lambda m, batch: (m(batch[0], True), batch[1])  # noqa: E731
    else:
        wrapped.run = lambda m, x: {"found": m.inner(x)}
    found = accumulate(wrapped, lossfunc, halves(), BatchGrad(), forward=forward)
    _, plain = accumulated(halves())
    assert all(close(found["grad_batch"][f"inner.{name}"], value) for name, value in plain["grad_batch"].items())


@pytest.mark.parametrize("remedy", ["denominator", "reduction"])
def test_a_loss_of_ones_own(remedy):
    kind = "sum" if remedy == "reduction" else "mean"
    own = Plain(lambda m, output, target: cross_entropy(output, target, reduction=kind))
    words = r"For a mean, pass denominator=function .*For a sum, give the loss an attribute reduction='sum'"
    with pytest.raises(ValueError, match=words):
        accumulated(halves(), lossfunc=own)
    if remedy == "reduction":
        own.reduction = "sum"
        assert is_right(*accumulated(halves(), lossfunc=own), divided=1)
    else:
        assert is_right(*accumulated(halves(), lossfunc=own, denominator=lambda batch: len(batch[1])))


def test_data_that_can_be_read_once():
    with pytest.raises(ValueError, match="pass a DataLoader or a list instead of an iterator"):
        accumulated(iter(halves()), BatchGrad(range(11)))
    assert is_right(*accumulated(list(halves()), BatchGrad(range(11))))


@pytest.mark.parametrize("remedy", ["one batch", "(ids, count)"])
def test_a_sample_in_two_batches(remedy):
    words = r"Put all that belongs to one sample into one batch; or, .* let sample_ids return \(ids, count\)"
    numbers = iter([torch.tensor([0, 1, 1, 2]), torch.tensor([2, 2, 0, 1, 1, 1, 0])])
    with pytest.raises(ValueError, match=words):
        accumulated(halves(), sample_ids=lambda batch: next(numbers))
    if remedy == "one batch":
        numbers = iter([torch.tensor([0, 1, 1, 2]), torch.tensor([3, 3, 4, 5, 5, 5, 4])])
    else:
        numbers = iter([(torch.tensor([0, 1, 1, 2]), 3), (torch.tensor([0, 0, 1, 2, 2, 2, 1]), 3)])
    model, found = accumulated(halves(), sample_ids=lambda batch: next(numbers))
    _, rows = accumulated(halves())
    ids = torch.tensor([0, 1, 1, 2, 3, 3, 4, 5, 5, 5, 4])
    for name, own in rows["grad_batch"].items():
        truth = torch.stack([own[ids == number].sum(0) for number in range(6)])
        assert close(found["grad_batch"][name], truth)


def test_a_first_tensor_that_is_not_the_models():
    data = [(torch.zeros(2, 1), x, y) for x, y in halves()]
    forward = lambda model, batch: (model(batch[1]), batch[2])  # noqa: E731
    with pytest.raises(ValueError, match="let the model's first tensor come first in the batch"):
        accumulated(data, forward=forward)
    data = [(x, extra, y) for extra, x, y in data]
    assert is_right(*accumulated(data, forward=lambda model, batch: (model(batch[0]), batch[2])))


def test_a_loss_that_is_not_reduced():
    with pytest.raises(ValueError, match="must be reduced to a number"):
        accumulated(halves(), lossfunc=nn.CrossEntropyLoss(reduction="none"), denominator=len)
    assert is_right(*accumulated(halves(), lossfunc=nn.CrossEntropyLoss()))


class Stop(Exception):
    pass


@pytest.mark.parametrize("remedy", ["delete", "another file"])
def test_a_checkpoint_of_another_run(remedy, tmp_path):
    def interrupted():
        first, _ = halves()
        yield first
        raise Stop

    class Data:
        def __iter__(self):
            return interrupted()

        def __len__(self):
            return 2

    path = tmp_path / "run.safetensors"
    with pytest.raises(Stop):
        accumulated(Data(), DiagGGNExact(), checkpoint=path)
    with pytest.raises(ValueError, match="Delete the file to begin anew, or give another one"):
        accumulated(halves(), checkpoint=path)
    if remedy == "delete":
        path.unlink()
    else:
        path = tmp_path / "other.safetensors"
    assert is_right(*accumulated(halves(), checkpoint=path))


def test_sequences_of_different_lengths():
    model = nn.Linear(3, 2).double()
    permuted = lambda m, batch: (m(batch[0]).transpose(1, 2), batch[1])  # noqa: E731
    data = [(rand(2, t, 3), torch.zeros(2, t, dtype=torch.int64)) for t in (2, 4)]
    lossfunc = nn.CrossEntropyLoss(reduction="sum")
    with pytest.raises(
        ValueError, match="Give the samples of all batches the same number of positions, or use BatchDiagGGNExact"
    ):
        accumulate(model, lossfunc, data, SqrtGGNExact(), forward=permuted)
    found = accumulate(model, lossfunc, data, BatchDiagGGNExact(), forward=permuted)
    padded = [(torch.nn.functional.pad(x, (0, 0, 0, 4 - x.shape[1])), y) for x, y in data]
    padded = [(x, torch.nn.functional.pad(y, (0, 4 - y.shape[1]), value=-100)) for x, y in padded]
    roots = accumulate(model, lossfunc, padded, SqrtGGNExact(), forward=permuted)
    for name, value in found["diag_ggn_exact_batch"].items():
        assert close(roots["sqrt_ggn_exact"][name].square().sum(0), value)


def test_a_scaled_gradient_that_overflows():
    model, data = nn.Linear(3, 2), [(X.float(), Z.float())]

    def found(scale):
        with torch.autocast("cpu", dtype=torch.float16):
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            return accumulate(model, nn.MSELoss(), data, BatchGrad(), scaler=scaler)

    with pytest.raises(OverflowError, match="give the scaler a smaller init_scale"):
        found(2.0**40)
    small, plain = found(2.0**4), accumulate(model, nn.MSELoss(), data, BatchGrad())
    for name, value in plain.grad_batch.items():
        assert close(small.grad_batch[name], value, rtol=0.01)  # in float16
