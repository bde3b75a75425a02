"""A parameter that is used outside of the extended model as well is named."""

import copy
import warnings

import pytest
import torch
from torch import nn

from backpack import backpack, extend
from backpack.extensions import BatchGrad, BatchL2Grad, DiagGGNExact

WORDS = "have a part that belongs to no sample"


def net(dtype=torch.float64):
    return extend(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype))


def penalty(parameters, factor=1e-3):
    return factor / 2 * sum(p.square().sum() for p in parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("extension", [BatchGrad(), BatchL2Grad(subsampling=[1])])
def test_a_penalty_is_warned_of_once_and_left_out(dtype, extension):
    model, X = net(dtype), torch.randn(5, 3, dtype=dtype)
    with pytest.warns(UserWarning, match=rf"2\.weight, 0\.weight {WORDS}"), backpack(extension):
        (model(X).square().mean() + penalty([model[0].weight, model[2].weight])).backward()
    with backpack(extension):
        (model(X).square().mean() + penalty([model[0].weight, model[2].weight])).backward()
    model.eval()
    with pytest.warns(UserWarning, match=WORDS), backpack(extension):
        (model(X).square().mean() + penalty(model.parameters())).backward()


def test_individual_gradients_are_those_without_the_penalty():
    model, X = net(), torch.randn(5, 3, dtype=torch.float64)
    expected = torch.autograd.grad(model(X).square().mean(), list(model.parameters()))
    with pytest.warns(UserWarning, match=WORDS), backpack(BatchGrad()):
        (model(X).square().mean() + penalty(model.parameters())).backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p.grad_batch.sum(0), grad, rtol=1e-12, atol=1e-15)
        assert torch.allclose(p.grad, grad + 1e-3 * p, rtol=1e-12, atol=1e-15)


def test_a_functional_use_elsewhere_belongs_to_the_samples_whose_inputs_it_reads():
    model, X = net(), torch.randn(5, 3, dtype=torch.float64)

    def value(x):
        return model(x).square().sum() + nn.functional.linear(x, model[0].weight).sin().sum()

    expected = [torch.stack([torch.autograd.grad(value(x[None]), p)[0] for x in X]) for p in model.parameters()]
    with backpack(BatchGrad()):
        value(X).backward()
    for p, rows in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p.grad_batch, rows, rtol=1e-12, atol=1e-14)


def test_a_functional_use_of_other_data_is_warned_of():
    model, X = net(), torch.randn(5, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match=rf"0\.weight {WORDS}"), backpack(BatchGrad()):
        (model(X).square().sum() + nn.functional.linear(X + 1, model[0].weight).sum()).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_terms_that_cancel_are_no_reason_to_warn(dtype):
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(40, 4))
    model = extend(nn.Sequential(model, nn.LayerNorm(4)).to(dtype))
    with warnings.catch_warnings(), backpack(BatchGrad()):
        warnings.simplefilter("error")
        model(torch.randn(16, 3, 12).to(dtype)).sum().backward()


def test_second_order_is_that_of_the_loss_alone():
    model, lossfunc, X = net(), extend(nn.MSELoss()), torch.randn(5, 3, dtype=torch.float64)
    results = []
    for factor in (0.0, 1.0):
        out = model(X)
        with backpack(DiagGGNExact()):
            (lossfunc(out, torch.zeros_like(out)) + penalty(model.parameters(), factor)).backward()
        results.append([p.diag_ggn_exact for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("extension", [BatchGrad(), BatchL2Grad(), DiagGGNExact()])
def test_a_penalty_on_parameters_that_the_pass_does_not_use_leaves_them_without_results(extension):
    model, head = net(), nn.Linear(4, 2).double()
    model.append(head)  # of another task
    loss, X, y = extend(nn.MSELoss()), torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, 2, dtype=torch.float64)
    weights = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    extend(model)
    plain = copy.deepcopy(model)

    def value(model):
        anchored = sum((weights[name] * (p - 1) ** 2).sum() for name, p in model.named_parameters())
        return loss(model[:3](X), y) + anchored

    value(plain).backward()
    with warnings.catch_warnings(), backpack(extension):
        warnings.simplefilter("ignore")  # that is said, as of every penalty
        value(model).backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
        assert hasattr(p, extension.savefield) == (not name.startswith("3"))


def test_another_use_of_such_a_parameter_is_an_error():
    model, X = net(), torch.randn(5, 3, dtype=torch.float64)
    spare = nn.Linear(4, 2).double()
    model.append(spare)
    extend(model)
    with pytest.raises(RuntimeError, match="none of its uses was seen"), backpack(BatchGrad()):
        (model[:3](X).sum() + nn.functional.linear(torch.ones(5, 4).double(), spare.weight).sum()).backward()
