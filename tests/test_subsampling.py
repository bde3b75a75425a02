"""What may be written for ``subsampling``, and what is refused before anything is computed."""

import numpy as np
import pytest
import torch
from torch import nn

from backpack import backpack, extend
from backpack.extensions import (
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    GGNGram,
    SqrtGGNExact,
    Variance,
)


@pytest.fixture
def run():
    model = extend(nn.Linear(3, 2).double())
    X = torch.randn(5, 3, dtype=torch.float64)

    def run(subsampling):
        for parameter in model.parameters():
            parameter.grad = None
        with backpack(BatchGrad(subsampling=subsampling)):
            model(X).square().sum().backward()
        return model.weight.grad_batch

    return run


@pytest.mark.parametrize(
    ("written", "rows"),
    [
        ([0, 3], [0, 3]),
        ((4,), [4]),
        ([-1, 0, -1], [4, 0, 4]),
        (torch.tensor([2, 1]), [2, 1]),
        (np.array([2, 1]), [2, 1]),
        ([True, False, False, True, False], [0, 3]),
        (torch.tensor([False, True, False, False, True]), [1, 4]),
        (np.array([False, True, False, False, True]), [1, 4]),
        (slice(1, 4, 2), [1, 3]),
        (slice(None, None, -1), [4, 3, 2, 1, 0]),
        (range(3), [0, 1, 2]),
        ([np.int64(3)], [3]),
        (None, [0, 1, 2, 3, 4]),
    ],
)
def test_subset_is_those_rows_in_that_order(run, written, rows):
    everything = run(None).clone()
    assert torch.equal(run(written), everything[rows])


EXTENSIONS = [BatchGrad, BatchL2Grad, Variance, DiagGGNExact, DiagGGNMC, BatchDiagGGNExact, SqrtGGNExact, GGNGram]


@pytest.mark.parametrize(
    ("written", "error", "words"),
    [
        ([5], IndexError, "5 is out of range for a batch of 5"),
        ([0, -6], IndexError, "-6 is out of range for a batch of 5"),
        ([True, False], IndexError, "mask has 2 entries, but the batch has 5"),
        (torch.ones(4, dtype=torch.bool), IndexError, "mask has 4 entries, but the batch has 5"),
        ([False] * 5, ValueError, "selects none of the 5"),
        (slice(5, 9), ValueError, "selects none of the 5"),
    ],
)
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_subset_that_does_not_fit_is_refused_before_any_extension_stores_a_result(extension, written, error, words):
    model = extend(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double())
    lossfunc, X, y = extend(nn.CrossEntropyLoss()), torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 2
    others = [DiagGGNExact(), BatchGrad(subsampling=[0]), SqrtGGNExact(subsampling=[1])]
    others = [other for other in others if type(other) is not extension]
    with pytest.raises(error, match=words), backpack(*others, extension(subsampling=written)):
        lossfunc(model(X), y).backward()
    assert all(p.grad is None and not vars(p) for p in model.parameters())
    with backpack(extension(subsampling=[0])):
        lossfunc(model(X), y).backward()
    assert all(hasattr(p, extension.savefield) for p in model.parameters())


@pytest.mark.parametrize(
    ("written", "error"),
    [([], ValueError), ([0.5], TypeError), ("01", TypeError), (3, TypeError), ([[0, 1]], TypeError),
     (torch.zeros(2, 2, dtype=torch.int64), ValueError), (torch.tensor([0.5]), TypeError), ([True, 1], TypeError),
     (torch.zeros(2, 2), (TypeError, ValueError)), ({}, (TypeError, ValueError)), ([None], TypeError)],
)  # fmt: skip
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_what_is_no_subset_is_refused_at_once(extension, written, error):
    with pytest.raises(error, match="subsampling"):
        extension(subsampling=written)
