"""Layers in the states in which users meet them: not initialized yet, on the fast path, with bags of any length."""

import torch
from test_first_order import laws
from torch import nn
from truth import Problem, close

from backpack import backpack, extend
from backpack.extensions import BatchGrad


def test_lazy_layers_may_be_extended_before_they_are_initialized():
    X = torch.randn(3, 4, dtype=torch.float64)
    model = extend(nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(2)).double())
    with backpack(BatchGrad()):
        model(X).square().sum().backward()
    for p in model.parameters():
        rows = [torch.autograd.grad(model(x[None]).square().sum(), p)[0] for x in X]
        assert close(p.grad_batch, torch.stack(rows))


def test_an_encoder_in_evaluation_mode_is_exact_beside_its_fast_path():
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double().eval()
    X = torch.randn(3, 5, 4, dtype=torch.float64)
    extend(model)
    with torch.no_grad():
        fast = model(X)
    laws(Problem(model, (X,)), lambda k: "all", 1.0)
    assert close(model(X), fast)


class Bag(nn.Module):
    """Whose samples are counted by its first input, the offsets."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 4, mode="mean", padding_idx=2)

    def forward(self, offsets, index):
        return self.bag(index, offsets)


def test_bags_of_any_length_are_exact():
    model = extend(Bag().double())
    index, offsets = torch.tensor([0, 1, 2, 2, 5, 5, 3]), torch.tensor([0, 2, 3, 6])
    weight = torch.arange(4.0).double().sin()

    def loss(index, offsets):
        out = model(offsets, index)
        return (out * weight + out.tanh()).sum()

    with backpack(BatchGrad()):
        loss(index, offsets).backward()
    ends, table = [*offsets[1:].tolist(), len(index)], model.bag.weight
    rows = [
        torch.autograd.grad(loss(index[a:b], torch.zeros(1, dtype=torch.int64)), table)[0]
        for a, b in zip(offsets.tolist(), ends, strict=True)
    ]
    assert close(table.grad_batch, torch.stack(rows))
