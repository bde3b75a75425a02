"""The Hessian's diagonal and products with it: random compositions, and models that others wrote."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from models.compositions import LOSSES, problems, targets
from models.of_others import LANGUAGE, problem
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from truths import close
from truths.second_order import hessian_entries, jacobians

from backpack import backpack, extend
from backpack.extensions import GGNMP, HMP, BatchDiagHessian, DiagHessian

REAL = ("gpt2", "bert", "vit")
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
    with sdpa_kernel(SDPBackend.MATH):
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


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n != "vit" else n for n in REAL])
def test_diagonals_of_real_models(name):
    """Of every parameter some entries; of a language model's first 5 words, flattened to ``[N * T, C]``."""
    given = problem(name, n=2, length=3)
    parameters = list(given.parameters().values())

    def forward(inputs, kwargs):
        out = given.model(*inputs, **kwargs)
        out = out if isinstance(out, torch.Tensor) else out.logits
        return out[:, :, :5].flatten(0, 1) if name in LANGUAGE else out

    y = torch.randint(0, 5, (len(forward(given.inputs, given.kwargs)),))
    lossfunc = nn.CrossEntropyLoss()

    def term(k):
        inputs, kwargs = [x[k : k + 1] for x in given.inputs], {key: x[k : k + 1] for key, x in given.kwargs.items()}
        return lambda: lossfunc(forward(inputs, kwargs), y.reshape(2, -1)[k]) / 2

    truth, places = hessian_entries([term(0), term(1)], parameters, most=2)
    extend(given.model), extend(lossfunc)
    with backpack(DiagHessian(), BatchDiagHessian([1])):
        lossfunc(forward(given.inputs, given.kwargs), y).backward()
    size = 1e-4 * max(float(t.abs().max()) for t in truth)
    for (which, p), where, expected in zip(given.parameters().items(), places, truth, strict=True):
        if p.grad is None:
            assert not hasattr(p, "diag_h"), which
            continue
        assert close(p.diag_h.flatten()[where], expected.sum(0), size, 1e-8), which
        assert close(p.diag_h_batch.flatten(1)[:, where], expected[1:], size, 1e-8), which
