"""Batches without a sample, as Poisson sampling draws them, and inputs without an axis of samples."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from backpack import backpack, extend
from backpack import extensions as E

F64 = {"dtype": torch.float64}

MODELS = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(3, 4, **F64), nn.Tanh(), nn.Linear(4, 3, **F64)), (3,)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3, **F64),
            nn.GroupNorm(1, 2, **F64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8, 3, **F64),
        ),
        (1, 6, 6),
    ),
    "statistics of other data": (
        lambda: nn.Sequential(nn.Linear(3, 4, **F64), nn.BatchNorm1d(4, **F64), nn.Linear(4, 3, **F64)).eval(),
        (3,),
    ),
    "attention": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, **F64),
            nn.Flatten(),
            nn.Linear(12, 3, **F64),
        ),
        (3, 4),
    ),
}

WITH_ROWS = [E.BatchGrad, E.BatchDiagGGNExact, E.BatchDiagGGNMC, E.BatchDiagHessian]
WITH_ROWS_BEHIND_COLUMNS = {E.SqrtGGNExact: 3, E.SqrtGGNMC: 1}
SUMS = [E.SumGradSquared, E.Variance, E.DiagGGNExact, E.DiagGGNMC, E.DiagHessian, E.DiagHessianMC]
FACTORS = [E.KFAC, E.KFLR, E.KFRA, E.EKFAC]


def differentiate(model, shape, *extensions, reduction="sum", **options):
    """The gradients of a copy that is not extended, and the model with its results."""
    plain, x, y = deepcopy(model), torch.zeros(0, *shape, **F64), torch.zeros(0, dtype=torch.int64)
    nn.functional.cross_entropy(plain(x), y, reduction=reduction).backward()
    extend(model)
    with backpack(*extensions, **options):
        extend(nn.CrossEntropyLoss(reduction=reduction))(model(x), y).backward()
    return [parameter.grad for parameter in plain.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_results_of_samples_have_no_rows_and_sums_are_zero(name):
    make, shape = MODELS[name]
    model = make()
    extensions = [cls() for cls in (*WITH_ROWS, *WITH_ROWS_BEHIND_COLUMNS, *SUMS)]
    more = [
        E.BatchL2Grad(),
        E.BatchDotGrad(),
        E.GGNGram(),
        E.ClippedGrad(1.0),
        E.GaussNewtonStep(0.1),
        E.HMP(),
        E.GGNMP(),
    ]
    grads = differentiate(model, shape, *extensions, *more)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)
        for cls in WITH_ROWS:
            assert vars(p)[cls.savefield].shape == (0, *p.shape)
        for cls, columns in WITH_ROWS_BEHIND_COLUMNS.items():
            assert vars(p)[cls.savefield].shape == (columns, 0, *p.shape)
        for cls in SUMS:
            assert torch.equal(vars(p)[cls.savefield], torch.zeros_like(p)), cls
        assert p.batch_l2.shape == (0,) and p.batch_dot.shape == p.ggn_gram.shape == (0, 0)
        assert torch.equal(p.grad_clipped, torch.zeros_like(p)) and not p.gauss_newton_step.any()
        vector = torch.randn(2, *p.shape, **F64)
        assert torch.equal(p.hmp(vector), torch.zeros_like(vector)) and not p.ggnmp(vector[0]).any()


@pytest.mark.parametrize("extension", FACTORS, ids=lambda cls: cls.__name__)
def test_factors_that_average_over_samples_are_refused_and_leave_nothing(extension):
    make, shape = MODELS["perceptron"]
    model = make()
    with pytest.raises(RuntimeError, match="averages over samples"):
        differentiate(model, shape, E.BatchGrad(), extension())
    for p in model.parameters():
        assert p.grad is None and not hasattr(p, "grad_batch")


def test_a_mean_over_no_sample_leaves_the_gradient_to_pytorch():
    make, shape = MODELS["perceptron"]
    model = make()
    for p, grad in zip(model.parameters(), differentiate(model, shape, E.BatchGrad(), reduction="mean"), strict=True):
        torch.testing.assert_close(p.grad, grad, equal_nan=True, rtol=0, atol=0)


def test_a_subset_of_no_sample_is_out_of_range():
    make, shape = MODELS["perceptron"]
    with pytest.raises(IndexError, match="batch of 0 samples"):
        differentiate(make(), shape, E.BatchGrad([0]))


def test_batches_with_and_without_samples_may_alternate():
    make, shape = MODELS["perceptron"]
    model, x, y = make(), torch.randn(2, 3, **F64), torch.tensor([0, 2])
    for _ in range(2):
        differentiate(model, shape, E.BatchGrad())
        assert all(p.grad_batch.shape == (0, *p.shape) for p in model.parameters())
        with backpack(E.BatchGrad()):
            extend(nn.CrossEntropyLoss(reduction="sum"))(model(x), y).backward()
        assert all(p.grad_batch.shape == (2, *p.shape) for p in model.parameters())


WITHOUT_AN_AXIS = {
    "vector": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(3)),
    "vector of as many entries": (lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), torch.randn(3)),
    "image": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()), torch.randn(2, 5, 5)),
    "word": (lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)), torch.tensor(1)),
}


@pytest.mark.parametrize("name", WITHOUT_AN_AXIS)
def test_an_input_without_an_axis_of_samples_is_an_error_that_says_what_to_write(name):
    make, x = WITHOUT_AN_AXIS[name]
    model = extend(make())
    with pytest.raises(RuntimeError, match=r"x\[None\]"), backpack(E.BatchGrad()):
        model(x).square().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    with backpack(E.BatchGrad()):
        model(x[None]).square().sum().backward()
    for p in model.parameters():
        torch.testing.assert_close(p.grad_batch, p.grad[None])


def test_rows_of_an_output_can_be_told_to_be_samples():
    model, x = extend(nn.Linear(3, 4)), torch.randn(3)
    with backpack(E.BatchGrad(), sample_ids=torch.arange(4)):
        model(x).square().sum().backward()
    torch.testing.assert_close(model.weight.grad_batch.sum(0), model.weight.grad)


def test_cross_entropy_of_a_vector_tells_that_it_is_of_one_sample():
    make, _ = MODELS["perceptron"]
    model, x, lossfunc = extend(make()), torch.randn(3, **F64), extend(nn.CrossEntropyLoss())
    with backpack(E.BatchGrad(), E.BatchDiagGGNExact()):
        lossfunc(model(x), torch.tensor(2)).backward()
    whole = [(p.grad_batch, p.diag_ggn_exact_batch) for p in model.parameters()]
    with backpack(E.BatchGrad(), E.BatchDiagGGNExact()):
        lossfunc(model(x[None]), torch.tensor([2])).backward()
    for p, (grad, diagonal) in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(grad, p.grad_batch)
        torch.testing.assert_close(diagonal, p.diag_ggn_exact_batch)


def test_cross_entropy_of_one_row_is_that_of_its_sample():
    make, _ = MODELS["perceptron"]
    model, x, lossfunc = extend(make()), torch.randn(4, 3, **F64), extend(nn.CrossEntropyLoss())
    with backpack(E.BatchGrad(), E.BatchDiagGGNExact()):
        lossfunc(model(x)[2], torch.tensor(1)).backward()
    found = [(p.grad_batch, p.diag_ggn_exact_batch) for p in model.parameters()]
    with backpack(E.BatchGrad(), E.BatchDiagGGNExact()):
        lossfunc(model(x[2:3]), torch.tensor([1])).backward()
    for p, results in zip(model.parameters(), found, strict=True):
        for result, own in zip(results, (p.grad_batch, p.diag_ggn_exact_batch), strict=True):
            assert not result[[0, 1, 3]].any()
            torch.testing.assert_close(result[2:3], own)


def test_no_result_of_an_earlier_pass_stays_on_parameters_that_a_batch_without_samples_does_not_reach():
    make, _ = MODELS["perceptron"]
    model, x = extend(make()), torch.randn(2, 3, **F64)
    with backpack(E.BatchGrad()):
        model(x).square().sum().backward()
    model[2].requires_grad_(False)
    with backpack(E.BatchGrad()):
        model(x[:0]).square().sum().backward()
    assert model[0].weight.grad_batch.shape == (0, 4, 3)
    assert not hasattr(model[2].weight, "grad_batch")
