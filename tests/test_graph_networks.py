"""Networks of PyTorch Geometric: samples are graphs, by node and by graph, or single nodes."""

import random
import warnings

import pytest
import torch
from torch import nn
from truths import close
from truths.autograd import through_rows
from truths.first_order import norms_of
from truths.second_order import Truth

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
        lossfunc = extend(nn.MSELoss())
        loss = lossfunc(out, target)
        of_graph = torch.arange(count) if by_graph else inputs[2]
        known = Truth(model, [out], [lambda z: lossfunc(z, target)], [of_graph[:, None].expand(out.shape)], count)  # noqa: B023
        truth, diagonals = known.grads.values(), known.diag_ggn.values()
        norms = norms_of(known.grads)
        bound, largest = float(norms.median()), norms.max()
        first = [BatchGrad(), BatchL2Grad([count - 1]), Variance(), ClippedGrad(bound)]
        with backpack(*first, DiagGGNExact([0]), BatchDiagGGNExact(), sample_ids=ids):
            loss.backward()
        for p, t, d in zip(model.parameters(), truth, diagonals, strict=True):
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
    lossfunc = extend(nn.MSELoss(reduction="sum"))
    out = model(*inputs)
    target = torch.randn_like(out)
    owner = inputs[2][:, None].expand(out.shape)
    truth = Truth(model, [out], [lambda z: lossfunc(z, target)], [owner], count).diag_hessian
    with backpack(BatchDiagHessian(), sample_ids=(inputs[2], count)):
        lossfunc(model(*inputs), target).backward()
    for name, p in model.named_parameters():
        assert close(p.diag_h_batch, truth[name], 1.0)
