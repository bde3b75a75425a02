"""Random compositions of layers; closed forms against the generic definition for several seeds."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models.compositions import LOSSES, problems, targets
from truths import close
from truths.first_order import check_first_order, subsets
from truths.second_order import jacobians

from backpack import backpack, extend
from backpack.extensions import BatchDiagGGNExact, DiagGGNExact, GGNGram, SqrtGGNExact

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
