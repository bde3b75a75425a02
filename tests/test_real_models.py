"""Unmodified models that others wrote, every parameter, without downloads."""

from math import prod

import pytest
import torch
import transformers as hf
from models.of_others import LANGUAGE, MODELS, SINGLE, SMALL, problem
from torch import nn
from truths import close
from truths.first_order import check_first_order
from truths.second_order import hessian_entries, jacobians

from backpack import backpack, extend
from backpack.extensions import (
    EKFAC,
    KFAC,
    KFLR,
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchL2Grad,
    DiagGGNExact,
    DiagHessian,
    SqrtGGNExact,
)
from backpack.samples import owners
from backpack.utils.kroneckers import kfacs_to_mat


@pytest.mark.parametrize("name", MODELS)
def test_first_order_quantities_of_every_parameter_are_exact(name):
    keys = ["all", "reversed", "duplicates", "mask", "last", "all"]
    check_first_order(problem(name), lambda k: keys[k], scale=1.0)
    check_first_order(problem(name), lambda k: "all", scale=1.0, alone=True)


@pytest.mark.parametrize("name", MODELS)
def test_ggn_of_every_parameter_is_exact(name):
    """Against explicit Jacobians; of a language model's first 5 words, flattened to ``[N * T, C]`` as users do it."""
    given = problem(name, n=2, length=3)
    rtol = 16 * torch.finfo(torch.float32).eps if name in SINGLE else 1e-9

    def forward():
        out = given.output()
        return out[:, :, :5].flatten(0, 1) if name in LANGUAGE else out

    target = torch.randint(0, 5, (len(forward()),))
    parameters = given.parameters()
    lossfunc = nn.CrossEntropyLoss(label_smoothing=0.1)
    diagonals, jacobian, hessian = jacobians(forward(), lossfunc, target, 2, list(parameters.values()))
    plain = torch.autograd.grad(lossfunc(forward(), target), list(parameters.values()), allow_unused=True)
    extend(given.model)
    loss = extend(lossfunc)(forward(), target)
    with backpack(DiagGGNExact(subsampling=[1]), BatchDiagGGNExact(chunk_size=2), SqrtGGNExact()):
        loss.backward()
    used = [p for p, grad in zip(parameters.values(), plain, strict=True) if grad is not None]
    roots = torch.cat([p.sqrt_ggn_exact.flatten(2) for p in used], 2).flatten(0, 1)
    curved = hessian @ jacobian @ jacobian.T
    assert close((roots @ roots.T).square().sum(), (curved @ curved).trace(), rtol=rtol)  # Frobenius norms of the GGN
    for (which, p), grad, truth in zip(parameters.items(), plain, diagonals, strict=True):
        if grad is None:
            assert p.grad is None and not hasattr(p, "diag_ggn_exact") and not truth.any(), which
            continue
        assert torch.equal(p.grad, grad), which
        size = 1e-6 * max(t.max() for t in diagonals)
        assert close(p.diag_ggn_exact, truth[1], size, rtol), which
        assert close(p.diag_ggn_exact_batch, truth, size, rtol), which
        assert close(p.sqrt_ggn_exact.square().sum(0), truth, size, rtol), which


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_every_parameter_has_kronecker_factors(name, monkeypatch):
    """Of all tables and matrices, two: what is small here counts as large."""
    monkeypatch.setattr("backpack.uses.kronecker.LARGEST", 32)
    given = problem(name, n=2, length=3)
    extend(given.model)
    logits = given.output()
    logits = logits.flatten(0, 1) if name in LANGUAGE else logits
    loss = extend(nn.CrossEntropyLoss())(logits, torch.arange(len(logits)) % 5)
    with backpack(KFLR(), KFAC(approx="expand"), EKFAC(approx="reduce")):
        loss.backward()
    for which, p in given.parameters().items():
        if p.grad is not None:
            for factors in (p.kflr, p.kfac, p.ekfac.bases):
                assert prod(map(len, factors)) == p.numel(), which
                assert len(factors) == (2 if max(p.shape) < p.numel() else 1), which
            assert bool((p.ekfac.eigenvalues >= 0).all()), which


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_kronecker_factors_for_one_sample_of_one_word_are_exact(name):
    torch.manual_seed(0)
    config = {"tie_word_embeddings": False, "vocab_size": 20}
    if name == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(n_positions=4, n_embd=8, n_layer=1, n_head=2, **config))
    else:
        model = hf.BertForMaskedLM(hf.BertConfig(max_position_embeddings=4, **config, **SMALL | {"hidden_size": 8}))
    model = model.double().eval()
    ids, target = torch.tensor([[3]]), torch.tensor([2])
    parameters = dict(model.named_parameters())
    logits = model(input_ids=ids).logits[0]
    rows = [
        torch.autograd.grad(out, list(parameters.values()), retain_graph=True, allow_unused=True) for out in logits[0]
    ]
    p = logits[0].detach().softmax(0)
    hessian = torch.diag(p) - p[:, None] * p
    extend(model)
    with backpack(KFLR()):
        extend(nn.CrossEntropyLoss())(model(input_ids=ids).logits[0], target).backward()
    for (which, parameter), grads in zip(parameters.items(), zip(*rows, strict=True), strict=True):
        if grads[0] is not None:
            jacobian = torch.stack(grads).flatten(1)
            assert close(kfacs_to_mat(parameter.kflr), jacobian.T @ hessian @ jacobian, 1e-6, 1e-9), which


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "t5", "vit", "resnet", "convnext", "mobilenet", "mixer"])
def test_the_table_of_nodes_knows_where_samples_are_in_common_models(name, monkeypatch):
    def refused(*args):
        raise AssertionError(f"{args[0].name()} needs a coded pass")

    monkeypatch.setattr(owners, "coded", refused)
    given = problem(name)
    extend(given.model)
    with backpack(BatchL2Grad()):
        given.loss().backward()
    assert all(hasattr(p, "batch_l2") for p in given.model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n != "vit" else n for n in ("gpt2", "bert", "vit")]
)
@pytest.mark.filterwarnings("ignore:(?s).*(column by column|entry by entry)")
def test_diagonals_of_the_hessian_are_exact(name):
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
