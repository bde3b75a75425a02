"""The GGN of every loss on every network: layers by themselves, and models that others wrote."""

import warnings

import pytest
import torch
from models.layers import CASES, build
from models.networks import LOSSES
from models.of_others import LANGUAGE, MODELS, SINGLE, problem
from torch import nn
from truths import close
from truths.second_order import jacobians

from backpack import backpack, extend
from backpack.extensions import BatchDiagGGNExact, BatchDiagGGNMC, DiagGGNExact, SqrtGGNMC

pytestmark = pytest.mark.slow

SETS = {**LOSSES, "bce": (nn.BCELoss(), LOSSES["bce_logits"][1])}
DRAWS = 400
SIGMAS = 6


def probabilities_or_values(given, loss):
    """Three numbers a sample, made of the model's output; not so large that a softmax of them is one or zero."""
    out = given.output()
    flat = (out.movedim(given.axis, 0) if given.axis else out).flatten(1)
    few = torch.cat([flat[:, :3].tanh(), flat[:, :3].sin(), flat[:, :3].cos()], 1)[:, :3]
    return few.sigmoid() if loss == "bce" else few


def check(given, name, sampled=()):
    """``sampled``: losses of which labels are drawn as well."""
    parameters, n = given.parameters(), given.n
    extend(given.model)
    last = [n - 1, 0]
    for loss, (lossfunc, targets) in SETS.items():
        target = targets()[torch.arange(n) % 4]
        out = probabilities_or_values(given, loss)
        truths, _, _ = jacobians(out, lossfunc, target, n, [*parameters.values()])
        size = 1e-5 * max(float(truth.abs().max()) for truth in truths)
        rtol = 16 * torch.finfo(torch.float32).eps if name in SINGLE else 1e-9
        extensions = [BatchDiagGGNExact(), DiagGGNExact(subsampling=last)]
        if loss in sampled:
            extensions += [SqrtGGNMC(DRAWS), BatchDiagGGNMC(DRAWS, subsampling=last)]
        with backpack(*extensions), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is linear in its input")
            extend(lossfunc)(probabilities_or_values(given, loss), target).backward()
        for (which, p), truth in zip(parameters.items(), truths, strict=True):
            if p.grad is None:
                assert not truth.any(), (loss, which)
                continue
            assert close(p.diag_ggn_exact_batch, truth, size, rtol), (loss, which)
            assert close(p.diag_ggn_exact, truth[last].sum(0), size, rtol), (loss, which)
            if loss in sampled:
                squares = p.sqrt_ggn_mc.square() * DRAWS
                error = SIGMAS * squares.std(0) / DRAWS**0.5 + 1e-9 * size
                assert bool(((squares.mean(0) - truth).abs() <= error).all()), (loss, which)
                assert bool(((p.diag_ggn_mc_batch - truth[last]).abs() <= 1.5 * error[last]).all()), (loss, which)
            p.grad = None


@pytest.mark.parametrize("name", CASES)
def test_the_ggn_of_every_loss_is_exact_on_every_layer(name):
    check(build(name), name)


@pytest.mark.parametrize("name", MODELS)
def test_the_ggn_of_every_loss_is_exact_on_models_that_others_wrote(name):
    check(problem(name, n=2, length=3), name, ("cross_entropy", "mse") if name in (*LANGUAGE, "vit") else ())
