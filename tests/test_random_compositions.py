"""Random compositions of layers: individual gradients, the GGN, the Hessian's diagonal and products with both."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from models.compositions import LOSSES, problems, targets
from truths import close
from truths.first_order import check_first_order, subsets
from truths.second_order import hessian_entries, jacobians, twice_differentiable

from backpack import backpack, extend
from backpack.extensions import (
    GGNMP,
    HMP,
    BatchDiagGGNExact,
    BatchDiagHessian,
    DiagGGNExact,
    DiagHessian,
    GGNGram,
    SqrtGGNExact,
)

QUICK = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@QUICK
@given(problems(), st.data())
def test_first_order_of_random_compositions(problem, data):
    names = data.draw(st.lists(st.sampled_from(sorted(subsets(problem.n))), min_size=6, max_size=6))
    scale = data.draw(st.sampled_from([1.0, 1 / problem.n]))
    check_first_order(problem, lambda k: names[k], scale)


@QUICK
@given(problems(), st.data())
def test_ggn_of_random_compositions_and_losses(problem, data):
    n, parameters = problem.n, problem.parameters()
    loss, target, options = data.draw(st.sampled_from(LOSSES))
    reduction = data.draw(st.sampled_from(["mean", "sum"]))
    lossfunc = loss() if options is None else loss(reduction=reduction, **options)
    y, X = targets(n)[target], problem.inputs[0]
    diagonals, jacobian, hessian = jacobians(problem.model(X), lossfunc, y, n, list(parameters.values()))
    chosen = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=4))
    chunk = data.draw(st.sampled_from([None, 1, 2]))
    value = extend(lossfunc)(extend(problem.model)(X), y)
    with backpack(DiagGGNExact(chosen, chunk), BatchDiagGGNExact(chosen[::-1]), SqrtGGNExact(), GGNGram()):
        value.backward()
    roots = torch.cat([p.sqrt_ggn_exact.flatten(2) for p in parameters.values()], 2).flatten(0, 1)
    ggn = jacobian.T @ hessian @ jacobian
    assert close(roots.T @ roots, ggn, 1e-12, 1e-9)
    assert close(GGNGram.total(parameters.values()), roots @ roots.T, 1e-12, 1e-9)
    size = 1e-6 * float(ggn.abs().max()) + 1e-12
    for p, truth in zip(parameters.values(), diagonals, strict=True):
        assert close(p.diag_ggn_exact, truth[chosen].sum(0), size, 1e-9)
        assert close(p.diag_ggn_exact_batch, truth[chosen[::-1]], size, 1e-9)


SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
SETTINGS["phases"] = [Phase.generate]  # a smaller failing example would take minutes to find


@pytest.fixture(autouse=True)
def costs_may_be_announced():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*(column by column|entry by entry)")
        yield


def check_diagonals(given, data):
    """Of some samples, in some order, against single entries of the samples' Hessians."""
    n, parameters, X = given.n, list(given.parameters().values()), given.inputs[0]
    loss, target, options = data.draw(st.sampled_from(LOSSES))
    reduction = data.draw(st.sampled_from(["mean", "sum"]))
    lossfunc = loss() if options is None else loss(reduction=reduction, **options)
    y, scale = targets(n)[target], n if options is not None and reduction == "mean" else 1

    def term(k):
        return lambda: lossfunc(given.model(X[k : k + 1]), y[k : k + 1]) / scale

    truth, places = hessian_entries([term(k) for k in range(n)], parameters)
    chosen = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=4))
    chunk = data.draw(st.sampled_from([None, 1, 2]))
    first, second = data.draw(
        st.sampled_from([(DiagHessian(chosen, chunk), BatchDiagHessian()), (DiagHessian(), BatchDiagHessian(chosen))])
    )
    value = extend(lossfunc)(extend(given.model)(X), y)
    with backpack(first, second):
        value.backward()
    size = 1e-4 * max(float(t.abs().max()) for t in truth) + 1e-12
    everything = list(range(n))
    for p, where, expected in zip(parameters, places, truth, strict=True):
        whole, each = (chosen, everything) if first.subset.rows(n, X.device) is not None else (everything, chosen)
        assert close(p.diag_h.flatten()[where], expected[whole].sum(0), size, 1e-8)
        assert close(p.diag_h_batch.flatten(1)[:, where], expected[each], size, 1e-8)


def check_products(given, data):
    """With the Hessian and the GGN, one vector and two, against plain double backward and explicit Jacobians."""
    n, parameters, X = given.n, list(given.parameters().values()), given.inputs[0]
    loss, target, options = data.draw(st.sampled_from(LOSSES))
    lossfunc = loss() if options is None else loss(**options)
    y = targets(n)[target]
    _, jacobian, hessian = jacobians(given.model(X), lossfunc, y, n, parameters)
    with twice_differentiable():
        value = lossfunc(given.model(X), y)
    grads = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
    extend(given.model)
    with backpack(HMP(), GGNMP()):
        extend(lossfunc)(given.model(X), y).backward(retain_graph=data.draw(st.booleans()))
    vectors = [torch.randn(2, *p.shape, dtype=p.dtype) for p in parameters]
    start, ggn, full = 0, [], []
    for p, g, v in zip(parameters, grads, vectors, strict=True):
        columns = jacobian[:, start : start + p.numel()]
        start += p.numel()
        ggn.append((v.flatten(1) @ columns.T @ hessian @ columns).reshape(v.shape))
        rows = torch.zeros_like(v)
        if g is not None and g.requires_grad:
            for row, one in zip(rows, v, strict=True):
                row += torch.autograd.grad(g, p, one, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
        full.append(rows)
    size = 1e-4 * max(float(t.abs().max()) for t in (*ggn, *full))
    for p, v, gauss_newton, expected in zip(parameters, vectors, ggn, full, strict=True):
        assert close(p.hmp(v), expected, size, 1e-8)
        assert close(p.ggnmp(v), gauss_newton, size, 1e-8)
        assert close(p.hmp(v[1]), expected[1], size, 1e-8)


@settings(max_examples=8, **SETTINGS)
@given(problems(), st.data())
def test_diagonals_of_random_compositions(given, data):
    check_diagonals(given, data)


@settings(max_examples=8, **SETTINGS)
@given(problems(), st.data())
def test_products_of_random_compositions(given, data):
    check_products(given, data)


@pytest.mark.slow
@settings(max_examples=150, **SETTINGS)
@given(problems(), st.data())
def test_diagonals_of_many_random_compositions(given, data):
    check_diagonals(given, data)


@pytest.mark.slow
@settings(max_examples=150, **SETTINGS)
@given(problems(), st.data())
def test_products_of_many_random_compositions(given, data):
    check_products(given, data)
