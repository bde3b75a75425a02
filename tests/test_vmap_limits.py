"""Pulling seeds back together: PyTorch's operators do it right, or ``backpack.graph.vmap_limits`` lists them."""

import warnings
from collections import defaultdict

import pytest
import torch
from models.operators import outputs
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.testing._internal.common_methods_invocations import op_db

from backpack.graph import kind
from backpack.graph.vmap_limits import LOOPED, WRONG, must_loop, nodes

REASONS = {
    "MkldnnRnnLayer": "of float32 LSTMs, which PyTorch's database lacks: tested below",
    "SparseSampledAddmm": "its output is sparse, so that no seed of the sweep starts at it: tested below",
    "ToSparse": "its output is sparse, so that no seed of the sweep starts at it: tested below",
}
"""Kinds of nodes on the list that the sweep does not need."""


def names(out):
    """The kinds of all nodes of a graph."""
    found, pending = {}, [out.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in found:
            found[node] = kind(node)
            pending += [following for following, _ in node.next_functions]
    return set(found.values())


def together(out, inputs, tolerance=1e-9):
    """What is wrong with pulling two seeds back by ``torch.vmap``; ``None``: nothing."""
    seeds = torch.randn(2, *out.shape, dtype=out.dtype)

    def pull(seed):
        grads = torch.autograd.grad(out, inputs, seed, retain_graph=True, allow_unused=True)
        return tuple(torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs, strict=True))

    apart = [torch.stack([grad.to_dense() for grad in grads]) for grads in zip(*map(pull, seeds), strict=True)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = torch.vmap(pull)(seeds)
        except RuntimeError as error:
            return f"fails: {error}"
    for one, other in zip(found, apart, strict=True):
        if not torch.allclose(one.to_dense(), other, rtol=tolerance, atol=tolerance, equal_nan=True):
            return "is wrong"
    return f"{WARNS}: {caught[0].message}" if caught else None


WARNS = "warns"
"""What is right, although PyTorch loops inside of a node."""


def is_provided_for(problem, out):
    """Whether whole pull-backs are looped, or the loop inside of a node will do."""
    if must_loop(nodes([get_gradient_edge(out)])):
        return True
    return problem.startswith(WARNS) and bool(names(out) & (LOOPED - WRONG))


def sweep(most):
    """Names of listed nodes with an operator each that needs them; number of outputs tried."""
    needed, count, wrong = defaultdict(set), 0, {}
    for op in op_db:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecated operators and beta features
            for out, inputs in outputs(op, most):
                count += 1
                problem = together(out, inputs)
                if problem is not None:
                    for name in names(out) & LOOPED:
                        needed[name].add(op.name)
                    if not is_provided_for(problem, out):
                        wrong[op.name] = problem, names(out)
    assert not wrong
    return needed, count


def test_seeds_of_every_operator_can_be_pulled_back_together_or_are_looped():
    needed, count = sweep(most=4)
    assert count > 1500 and len(needed) > 20


@pytest.mark.slow
def test_every_name_on_the_list_is_needed():
    needed, count = sweep(most=10**6)
    assert count > 12_000
    assert needed.keys() | REASONS.keys() == LOOPED
    assert not needed.keys() & REASONS.keys()


def test_fused_layers_that_the_database_lacks_are_on_the_list():
    """Layers whose graph is one node of its own, in the data types that have it."""
    X = torch.randn(3, 4, 5)
    found = set()
    for layer in (nn.LSTM(5, 4), nn.GRU(5, 4), nn.RNN(5, 4), nn.LSTMCell(5, 4), nn.GRUCell(5, 4)):
        x = X if isinstance(layer, nn.RNNBase) else X[0]
        out = layer(x)
        out = out if isinstance(out, torch.Tensor) else out[0]
        problem = together(out, list(layer.parameters()), tolerance=1e-5)
        assert problem is None or is_provided_for(problem, out), type(layer).__name__
        found |= names(out) & LOOPED if problem is not None else set()
    assert found == {"MkldnnRnnLayer"}


def test_sparse_intermediate_results_are_looped():
    X = torch.eye(3, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compressed tensors are a beta feature
        pattern = torch.eye(3, dtype=torch.float64).to_sparse_csr()
        for sparse in (X.to_sparse(), torch.sparse.sampled_addmm(pattern, X, X)):
            dense = sparse.to_dense().sum(1)
            assert must_loop(nodes([get_gradient_edge(dense)]))
            assert together(dense, [X]) is not None


class Counting(torch.autograd.Function):
    """A backward pass that reads a number, as ``torch.vmap`` does not allow."""

    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * (2 if grad.abs().max().item() > 1 else 1)


def test_custom_functions_are_looped():
    X = torch.ones(3, requires_grad=True)
    assert must_loop(nodes([get_gradient_edge(Counting.apply(X).exp())]))
