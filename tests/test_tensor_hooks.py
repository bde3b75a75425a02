"""Tensor hooks of users and gradients that they retain: as in plain PyTorch, whatever else is computed."""

import pytest
import torch
from torch import nn

from backpack import backpack, extend
from backpack.extensions import GGNMP, KFRA, BatchGrad, DiagGGNExact, DiagGGNMC, DiagHessian, SqrtGGNExact

EXTENSIONS = {
    "seeds at once": lambda: [BatchGrad(), DiagGGNExact()],
    "seeds one by one": lambda: [DiagGGNExact(chunk_size=1)],
    "several subsets": lambda: [DiagGGNExact(subsampling=[0, 2]), DiagGGNMC(), SqrtGGNExact()],
    "Hessian": lambda: [DiagHessian(), BatchGrad()],
    "averaged": lambda: [KFRA()],
    "products": lambda: [GGNMP()],
}


class Watching(nn.Module):
    """Looks at its intermediate tensors as users do: inside of ``forward``, and later."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        h = x.tanh()
        if h.requires_grad:
            h.register_hook(lambda grad: self.seen.append(grad.detach().clone()))
            h.retain_grad()
        self.h, self.later = h, h.sin()
        return self.later


def run(extensions, extended):
    torch.manual_seed(0)
    seen = []
    watching = Watching(seen)
    model = nn.Sequential(nn.Linear(3, 4), watching, nn.Linear(4, 3)).double()
    lossfunc, (X, y) = nn.CrossEntropyLoss(), (torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 3)
    if extended:
        extend(model), extend(lossfunc)
    for _ in range(2):
        model.zero_grad()
        with backpack(*extensions):
            out = model(X)
            later = watching.later
            for tensor in (later, out):
                tensor.retain_grad()
                tensor.register_hook(lambda grad: seen.append(grad.detach().clone()))
            handle = out.register_hook(lambda grad: 1 / 0)
            model[0].weight.register_hook(lambda grad: seen.append(grad.detach().clone()))
            handle.remove()
            lossfunc(out, y).backward()
        for p in model.parameters():
            if hasattr(p, "ggnmp"):
                assert p.ggnmp(torch.ones(2, *p.shape, dtype=p.dtype)).shape == (2, *p.shape)
    return [watching.h.grad, later.grad, out.grad, *(p.grad for p in model.parameters()), *seen]


@pytest.mark.parametrize("name", EXTENSIONS)
def test_hooks_and_retained_gradients_are_those_of_plain_pytorch(name):
    expected = run([], extended=False)
    found = run(EXTENSIONS[name](), extended=True)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_retained_gradients_are_added_up_as_in_plain_pytorch():
    model, lossfunc = extend(nn.Linear(3, 2)), extend(nn.MSELoss())
    out = model(torch.randn(4, 3))
    out.retain_grad()
    loss = lossfunc(out, torch.zeros_like(out))
    (expected,) = torch.autograd.grad(loss, out, retain_graph=True)
    out.grad = None
    for _ in range(2):
        with backpack(DiagGGNExact(), retain_graph=True):
            loss.backward(retain_graph=True)
    assert torch.allclose(out.grad, 2 * expected)


def test_what_a_forward_hook_keeps_is_not_replaced():
    model, lossfunc, kept = extend(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), nn.MSELoss(), []
    extend(lossfunc)
    model[1].register_forward_hook(lambda module, args, out: kept.append(out))
    out = model(torch.randn(4, 3))
    kept[0].retain_grad()
    with backpack(DiagGGNExact(subsampling=[0])):
        lossfunc(out, torch.zeros_like(out)).backward()
    assert len(kept) == 1 and kept[0].grad.shape == (4, 4)


def test_where_samples_lie_is_found_out_unnoticed():
    class Flattening(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.seen = nn.Linear(3, 3), []

        def forward(self, x):
            h = self.linear(x.flatten(0, 1))
            h.register_hook(self.seen.append)
            h.retain_grad()
            self.h = h
            return h.reshape(x.shape)

    model = extend(Flattening())
    out = model(torch.randn(4, 4, 3))
    assert not model.seen and model.h.grad is None
    out.sum().backward()
    assert len(model.seen) == 1 and torch.equal(model.h.grad, torch.ones(16, 3))
