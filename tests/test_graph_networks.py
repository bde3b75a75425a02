"""Networks of PyTorch Geometric: samples are graphs, by node and by graph, or single nodes."""

import random
import warnings

import pytest
import torch
from torch import nn
from truths import close
from truths.autograd import through_rows

from backpack import backpack, extend
from backpack.extensions import (
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    Variance,
)

select, index_select = torch.select, torch.index_select
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit.script`", DeprecationWarning)
    from torch_geometric.data import Batch, Data
    from torch_geometric.nn import GATConv, GCNConv, GINConv, SAGEConv, TransformerConv, global_mean_pool
torch.select, torch.index_select = select, index_select  # it replaces them by functions that refuse more

LAYERS = {
    "GCNConv": lambda i, o: GCNConv(i, o),
    "GATConv": lambda i, o: GATConv(i, o, heads=2, concat=False),
    "SAGEConv": lambda i, o: SAGEConv(i, o),
    "GINConv": lambda i, o: GINConv(nn.Sequential(nn.Linear(i, o), nn.Tanh(), nn.Linear(o, o)), train_eps=True),
    "TransformerConv": lambda i, o: TransformerConv(i, o, heads=2, concat=False),
}


class Net(nn.Module):
    def __init__(self, layer, by_graph):
        super().__init__()
        self.one, self.two, self.head, self.by_graph = layer(3, 4), layer(4, 4), nn.Linear(4, 2), by_graph

    def forward(self, x, edges, batch):
        x = self.two(self.one(x, edges).tanh(), edges).tanh()
        return self.head(global_mean_pool(x, batch) if self.by_graph else x)


def draw(name, by_graph, seed):
    """A network, a batch of graphs of different sizes, and an order of their nodes."""
    rng = random.Random(f"{name} {by_graph} {seed}")
    torch.manual_seed(rng.randrange(2**31))
    graphs = []
    for _ in range(rng.randint(2, 4)):
        nodes = rng.randint(1, 5)
        edges = torch.randint(nodes, (2, rng.randint(1, 2 * nodes)))
        graphs.append(Data(x=torch.randn(nodes, 3, dtype=torch.float64), edge_index=edges))
    batch = Batch.from_data_list(graphs)
    order = torch.randperm(len(batch.x)) if rng.random() < 0.5 else torch.arange(len(batch.x))
    place = order.argsort()
    inputs = batch.x[order], place[batch.edge_index], batch.batch[order]
    return extend(Net(LAYERS[name], by_graph).double()), inputs, len(graphs)


@pytest.mark.parametrize("by_graph", [True, False], ids=["by_graph", "by_node"])
@pytest.mark.parametrize("name", LAYERS)
def test_graphs_are_samples(name, by_graph):
    for seed in range(2):
        model, inputs, count = draw(name, by_graph, seed)
        ids = None if by_graph else (inputs[2], count)
        out = model(*inputs)
        target = torch.randn_like(out)
        lossfunc, parameters = extend(nn.MSELoss()), list(model.parameters())
        loss = lossfunc(out, target)
        rows = through_rows(out, loss, parameters)
        of_graph = torch.arange(count) if by_graph else inputs[2]
        truth = [
            torch.zeros(count, *p.shape, dtype=p.dtype).index_add(0, of_graph, r)
            for p, r in zip(parameters, rows, strict=True)
        ]
        jacobian = [
            torch.autograd.grad(out, parameters, unit, retain_graph=True, allow_unused=True)
            for unit in torch.eye(out.numel(), dtype=out.dtype).reshape(-1, *out.shape)
        ]
        diagonals = [
            torch.zeros(count, *p.shape, dtype=p.dtype).index_add(
                0,
                of_graph.repeat_interleave(out.shape[1]),
                torch.stack([torch.zeros_like(p) if row[k] is None else row[k].square() for row in jacobian])
                * (2 / out.numel()),
            )
            for k, p in enumerate(parameters)
        ]
        norms = sum(t.flatten(1).square().sum(1) for t in truth).sqrt()
        bound, largest = float(norms.median()), norms.max()
        first = [BatchGrad(), BatchL2Grad([count - 1]), Variance(), ClippedGrad(bound)]
        with backpack(*first, DiagGGNExact([0]), BatchDiagGGNExact(), sample_ids=ids):
            loss.backward()
        for p, t, d in zip(parameters, truth, diagonals, strict=True):
            factor = (bound / norms.clamp(min=bound)).reshape(-1, *[1] * p.dim())
            assert close(p.grad_batch, t, largest)
            assert close(p.batch_l2, t[-1:].flatten(1).square().sum(1), largest**2)
            assert close(p.variance, t.var(0, correction=0), largest**2)
            assert close(p.grad_clipped, (t * factor).sum(0), largest)
            assert close(p.diag_ggn_exact_batch, d, 1e-3) and close(p.diag_ggn_exact, d[0], 1e-3)


@pytest.mark.parametrize("name", ["GCNConv", "SAGEConv"])
def test_nodes_are_samples_that_mix(name):
    model, inputs, _ = draw(name, False, 3)
    loss = model(*inputs).square().sum()
    out = model(*inputs)
    truth = through_rows(out, out.square().sum(), list(model.parameters()))
    with pytest.warns(UserWarning, match="Samples are mixed"), backpack(BatchGrad()):
        loss.backward()
    assert all(close(p.grad_batch, t, 1.0) for p, t in zip(model.parameters(), truth, strict=True))


@pytest.mark.parametrize("name", ["GCNConv", "GATConv"])
def test_the_hessian_of_each_graph(name):
    model, inputs, count = draw(name, False, 4)
    lossfunc, parameters = extend(nn.MSELoss(reduction="sum")), list(model.parameters())
    out = model(*inputs)
    target = torch.randn_like(out)
    truth = []
    for n in range(count):
        own = (out - target)[inputs[2] == n].square().sum()
        grads = torch.autograd.grad(own, parameters, create_graph=True)
        truth.append(
            [
                torch.stack([_second(g, p, k) for k, g in enumerate(grad.flatten())]).reshape(p.shape)
                for grad, p in zip(grads, parameters, strict=True)
            ]
        )
    with backpack(BatchDiagHessian(), sample_ids=(inputs[2], count)):
        lossfunc(model(*inputs), target).backward()
    for k, p in enumerate(parameters):
        assert close(p.diag_h_batch, torch.stack([row[k] for row in truth]), 1.0)


def _second(grad, parameter, k):
    if not grad.requires_grad:
        return grad.new_zeros(())
    (found,) = torch.autograd.grad(grad, parameter, retain_graph=True, allow_unused=True)
    return grad.new_zeros(()) if found is None else found.flatten()[k]
