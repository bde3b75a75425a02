"""Every extension stores its results under the name that it was given."""

import pytest
import torch
from torch import nn
from truths import close
from truths.options import required

from backpack import accumulate, backpack, extend, extensions, memory_cleanup, verify
from backpack.extensions import HBP

X, Y = torch.rand(6, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])
OF_ONE_BATCH = ("HMP", "GGNMP", "PCHMP", "GaussNewtonStep")
"""Functions and steps do not merge."""


def build(name, **options):
    return getattr(extensions, name)(*required(len(X)).get(name, ()), **options)


def net():
    torch.manual_seed(0)
    return extend(nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)).double())


def tensors(result):
    """All numbers of a result."""
    if callable(result):
        result = result(torch.ones(2, 4, 3, dtype=torch.float64))
    if not isinstance(result, (list, torch.Tensor)):
        result = [*result.bases, result.eigenvalues]
    return result if isinstance(result, list) else [result]


def computed(extension):
    model = net()
    torch.manual_seed(1)
    with backpack(extension):
        extend(nn.CrossEntropyLoss())(model(X), Y).backward()
    return model


@pytest.mark.parametrize("name", extensions.__all__)
def test_results_are_stored_under_the_given_name_and_removed_from_there(name):
    model, usual = computed(build(name, savefield="mine")), computed(build(name))
    field = build(name).savefield
    found, expected = model[0].weight.mine, getattr(usual[0].weight, field)
    assert all(map(torch.equal, tensors(found), tensors(expected)))
    assert all(vars(p).keys() == {"mine"} for p in model.parameters())
    memory_cleanup(model)
    assert not any(vars(p) for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in extensions.__all__ if name not in OF_ONE_BATCH])
def test_data_sets_are_merged_under_the_given_name(name):
    found = []
    for options in ({"savefield": "mine"}, {}):
        model = net()
        extension = build(name, **options)
        torch.manual_seed(1)
        result = accumulate(model, nn.CrossEntropyLoss(), [(X[:2], Y[:2]), (X[2:], Y[2:])], extension)
        assert result.results.keys() == {extension.savefield}
        found.append([tensors(result[extension.savefield][name]) for name, _ in model.named_parameters()])
    assert all(close(a, b) for one, other in zip(*found, strict=True) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", extensions.__all__)
def test_quantities_are_verified_under_the_given_name(name):
    found = verify(net(), nn.CrossEntropyLoss(), X, Y, build(name, savefield="mine"))
    assert {row.verdict for row in found.rows} == {"right"} and {row.quantity for row in found.rows} == {"mine"}, found


@pytest.mark.parametrize("name", extensions.__all__)
def test_two_extensions_of_one_name_and_names_that_tensors_use_are_refused(name):
    with pytest.raises(ValueError, match=r"both write to \.mine"):
        backpack(build(name, savefield="mine"), build(name, savefield="mine"))
    for taken in ("grad", "data", "shape", "requires_grad"):
        with pytest.raises(ValueError, match=f"savefield='{taken}'"):
            build(name, savefield=taken)


def test_a_gram_matrix_of_all_parameters_is_that_of_the_given_name():
    model = computed(extensions.GGNGram(savefield="mine"))
    assert extensions.GGNGram.total(model.parameters(), "mine").shape == (12, 12)
    with pytest.raises(ValueError, match=r"\.ggn_gram"):
        extensions.GGNGram.total(model.parameters())


def test_strategies_are_the_strings_that_hbp_takes():
    from backpack.extensions import curvature

    loss, backprop = curvature.LossHessianStrategy, curvature.BackpropStrategy
    for kind in ("GGN", "HESSIAN", "PCH_ABS", "PCH_CLIP"):
        own = getattr(curvature.Curvature, kind)
        HBP(own, loss.SUM, backprop.BATCH_AVERAGE, curvature.ExpectationApproximation.BOTEV_MARTENS)
