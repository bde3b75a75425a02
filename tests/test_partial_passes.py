"""A backward pass that ends before all parameters leaves right results, none, or old ones of other models only."""

import pytest
import torch
from models.of_others import problem
from torch import nn
from truths import close
from truths.autograd import individual_gradients

from backpack import backpack, extend
from backpack.extensions import BatchGrad, ClippedGrad, DiagGGNExact, SumGradSquared

X = torch.arange(15, dtype=torch.float64).reshape(5, 3).sin()
Y = torch.tensor([0, 2, 1, 1, 0])


class Model(nn.Module):
    """The first layer is used twice, before and behind the state ``h``."""

    def __init__(self):
        super().__init__()
        self.shared, self.early, self.late = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        self.h = self.early(self.shared(x).tanh())
        return self.late(self.shared(self.h).tanh())


def build():
    torch.manual_seed(0)
    return extend(Model().double()), extend(nn.CrossEntropyLoss())


def rows(model, parameter):
    return individual_gradients(nn.functional.cross_entropy(model(X), Y, reduction="none") / len(X), [parameter])[0]


def with_results(model):
    return {name for name, p in model.named_parameters() if hasattr(p, "grad_batch")}


def right(model):
    return all(close(p.grad_batch, rows(model, p)) for p in model.parameters() if hasattr(p, "grad_batch"))


@pytest.mark.parametrize("before", [False, True])
def test_parameters_that_are_not_reached_have_no_results_nor_old_ones(before):
    model, lossfunc = build()
    if before:
        with backpack(BatchGrad(), SumGradSquared()):
            lossfunc(model(2 * X), Y).backward()
    loss = lossfunc(model(X), Y)
    with (
        pytest.warns(UserWarning, match=r"ended before .* shared.weight.* no results of BatchGrad"),
        backpack(BatchGrad()),
    ):
        torch.autograd.grad(loss, model.h)
    assert with_results(model) == {"early.weight", "early.bias", "late.weight", "late.bias"} and right(model)
    assert all(hasattr(p, "sum_grad_squared") == before for p in model.parameters())


def test_the_parameters_asked_for_have_results_and_others_right_ones_or_none():
    model, lossfunc = build()
    with backpack(BatchGrad()):
        lossfunc(model(X), Y).backward(inputs=[model.early.weight])
    assert {"early.weight", "late.weight"} <= with_results(model) and right(model)
    assert "shared.weight" not in with_results(model)  # one of its uses was reached
    with backpack(BatchGrad()):
        torch.autograd.grad(lossfunc(model(X), Y), [model.shared.bias])
    assert "shared.bias" in with_results(model) and right(model)


def test_calls_of_the_parts_of_a_model():
    model, lossfunc = build()
    for p in model.parameters():
        p.grad_batch = "old"
    h = model.shared(X).tanh()
    with pytest.warns(UserWarning, match="ended before"), backpack(BatchGrad()):
        torch.autograd.grad(lossfunc(model.late(model.shared(model.early(h)).tanh()), Y), h)
    assert with_results(model) == {"early.weight", "early.bias", "late.weight", "late.bias"} and right(model)


@pytest.mark.parametrize("kept", [False, True])
def test_a_pass_that_ends_at_an_extended_part_goes_on_to_its_parameters(kept):
    model, lossfunc = build()
    h = model.early(model.shared(X).tanh())  # the other use of the shared layer is above
    with backpack(BatchGrad()):
        torch.autograd.grad(lossfunc(model.late(model.shared(h).tanh()), Y), h, retain_graph=kept)
    assert len(with_results(model)) == 6 and right(model)


class State(nn.Module):
    """Returns what its last layer reads, too."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))

    def forward(self, x):
        h = self.first(x)
        return h, self.last(h.tanh())


@pytest.mark.parametrize("through", ["h", "out", "both"])
def test_outputs_of_which_one_is_computed_from_the_other(through):
    torch.manual_seed(0)
    model = extend(State().double())

    def value(h, out):
        return {"h": h.square().sum(), "out": out.sin().sum(), "both": (h * out).sin().sum()}[through]

    rows = [torch.autograd.grad(value(*model(x[None])), model.first.weight)[0] for x in X]
    outputs = model(X)
    asked = [o for o, name in zip(outputs, ("h", "out"), strict=True) if through in (name, "both")]
    with backpack(BatchGrad()):
        torch.autograd.grad(value(*outputs), asked)
    assert close(model.first.weight.grad_batch, torch.stack(rows))
    assert hasattr(model.last.bias, "grad_batch") == (through != "h")


def test_several_calls_of_a_model_at_the_outputs_of_which_a_pass_ends():
    model, _ = build()
    rows = [torch.autograd.grad((model(x[None]) * model(x[None].cos())).sum(), model.late.weight)[0] for x in X]
    outputs = model(X), model(X.cos())
    with backpack(BatchGrad()):
        torch.autograd.grad((outputs[0] * outputs[1]).sum(), outputs)
    assert close(model.late.weight.grad_batch, torch.stack(rows))


def test_what_a_pass_without_the_gradient_shows():
    model, lossfunc = build()
    seen, done = [], []
    model.late.weight.grad = torch.ones_like(model.late.weight)
    model.late.weight.register_hook(seen.append)
    out = model(X)
    model.h.retain_grad()
    model.h.register_hook(seen.append)
    with backpack(BatchGrad(), ClippedGrad(1e-2), DiagGGNExact(), extension_hook=done.append):
        torch.autograd.grad(lossfunc(out, Y), out)
    assert not seen and model.h.grad is None and model.late.weight.grad.eq(1).all()
    assert right(model) and all(hasattr(p, "grad_clipped") for p in model.parameters())
    assert set(done) >= {model.shared, model.early, model.late}


def test_a_failure_below_the_output_leaves_nothing():
    model, lossfunc = build()

    def fail(module):
        raise ValueError("as a user's hook may")

    out = model(X)
    with pytest.raises(ValueError, match="user's hook"), backpack(BatchGrad(), extension_hook=fail):
        torch.autograd.grad(lossfunc(out, Y), out)
    assert not with_results(model)
    with backpack(BatchGrad()):
        lossfunc(model(X), Y).backward()
    assert len(with_results(model)) == 6 and right(model)


def test_results_without_the_gradient_are_differentiable():
    model, _ = build()
    found = []
    for alone in (True, False):
        out = model(X)
        with backpack(BatchGrad()):
            torch.autograd.grad(out.sin().sum(), [out] if alone else list(model.parameters()), create_graph=True)
        total = sum(p.grad_batch.square().sum() for p in model.parameters())
        found.append(torch.autograd.grad(total, list(model.parameters()), allow_unused=True))
    assert all(close(a, b) for a, b in zip(*found, strict=True))


def test_curvature_has_results_for_all_without_a_warning():
    model, lossfunc = build()
    out = model(X)
    with backpack(DiagGGNExact()):
        torch.autograd.grad(lossfunc(out, Y), out)
    found = [p.diag_ggn_exact for p in model.parameters()]
    with backpack(DiagGGNExact()):
        lossfunc(model(X), Y).backward()
    assert all(close(p.diag_ggn_exact, f) for p, f in zip(model.parameters(), found, strict=True))


def test_what_depends_on_all_parameters_is_refused():
    model, lossfunc = build()
    with pytest.raises(RuntimeError, match="ClippedGrad depends on all .* requires_grad_"), backpack(ClippedGrad(1e-2)):
        lossfunc(model(X), Y).backward(inputs=[model.late.weight])
    assert not any(hasattr(p, "grad_clipped") for p in model.parameters())


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.heads = nn.Linear(3, 3), nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    def forward(self, x):
        return [head(self.trunk(x).tanh()) for head in self.heads]


def test_results_of_a_head_are_gone_when_the_other_has_its_pass():
    torch.manual_seed(0)
    model, lossfunc = extend(Heads().double()), extend(nn.CrossEntropyLoss())
    with backpack(BatchGrad()):
        lossfunc(model(X)[0], Y).backward()
        lossfunc(model(X)[1], Y).backward()
    for head, is_there in zip([model.trunk, *model.heads], [True, False, True], strict=True):
        assert all(hasattr(p, "grad_batch") == is_there for p in head.parameters())


@pytest.mark.parametrize("name", ["vit", "convnext", "mixer"])
def test_with_respect_to_inputs_all_parameters_have_results(name):
    given = problem(name, n=2)
    (x,) = given.inputs
    x.requires_grad_()
    loss, found = extend(nn.CrossEntropyLoss()), []
    extend(given.model)
    for whole in (True, False):
        out = loss(given.output(), torch.tensor([1, 0]))
        with backpack(SumGradSquared()):
            out.backward() if whole else torch.autograd.grad(out, x)
        found.append([p.sum_grad_squared for p in given.model.parameters() if p.grad is not None])
    assert all(close(a, b) for a, b in zip(*found, strict=True))
