"""What is left at a graph must not keep it alive: reference cycles through nodes are out of the collector's reach."""

import gc
import weakref
from typing import Any

import pytest
import torch
from models.small import Fn, L, rand
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import BatchGrad, DiagGGNExact, DiagHessian


class Hook:
    def __call__(self, grad):
        return None


class Forked(nn.Module):
    """Two outputs, each of them a first use."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.left(x), self.right(x)


class Through(nn.Module):
    """Its input is its second output."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x), x


class Overwriting(nn.Module):
    """Its input is its output."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x.add_(self.bias)


class Spread(nn.Module):
    """A parameter that is copied to all samples, as class tokens are."""

    def __init__(self):
        super().__init__()
        self.token, self.linear = nn.Parameter(torch.ones(1, 3)), nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x + self.token.expand(len(x), -1))


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    return Logits(model)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens).logits[:, -1]


def flat():
    return torch.randn(5, 3)


MODELS = {
    "linear": (lambda: nn.Linear(3, 2), flat),
    "perceptron": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), flat),
    "linear, input with gradient": (lambda: nn.Linear(3, 2), lambda: flat().requires_grad_()),
    "linear of sequences": (lambda: nn.Linear(3, 2), lambda: torch.randn(4, 5, 3)),
    "embedding": (lambda: nn.Embedding(7, 3), lambda: torch.randint(7, (4, 5))),
    "LSTM": (lambda: nn.LSTM(3, 2, batch_first=True), lambda: torch.randn(4, 5, 3)),
    "forked": (Forked, flat),
    "handed through": (Through, lambda: flat().requires_grad_().sin()),
    "in place": (Overwriting, flat),
    "spread": (Spread, flat),
    "GPT-2": (gpt2, lambda: torch.randint(11, (3, 5))),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("passes", [0, 1])
def test_graphs_die_without_the_garbage_collector(name, passes):
    make, inputs = MODELS[name]
    model, lossfunc = extend(make()), extend(nn.MSELoss())
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):  # what a first forward pass has settled is taken for granted in the second
            outputs = model(inputs())
            out = outputs[0] if isinstance(outputs, tuple) else outputs
            loss = lossfunc(out, torch.zeros_like(out))
            hooks = [Hook(), Hook()]
            out.register_hook(hooks[0])
            loss.register_hook(hooks[1])
            alive = [weakref.ref(hook) for hook in hooks]
            del hooks
            if passes:
                with backpack(BatchGrad(), DiagGGNExact(subsampling=[0])):
                    loss.backward()
            del outputs, out, loss
            assert [hook() for hook in alive] == [None, None]
    finally:
        gc.enable()


def test_a_handed_through_input_belongs_to_the_model_that_it_comes_from():
    model, lossfunc = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), nn.MSELoss()
    extend(model), extend(lossfunc)
    second, X = extend(Through().double()), torch.randn(5, 3, dtype=torch.float64)
    results = []
    for through in (False, True):
        out = model(X)
        out = second(out)[1] if through else out
        with backpack(DiagGGNExact(), DiagHessian(), BatchGrad()):
            lossfunc(out, torch.zeros_like(out)).backward()
        results.append([getattr(p, f) for p in model.parameters() for f in ("diag_ggn_exact", "diag_h", "grad_batch")])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _relu_first() -> nn.Module:
    return extend(Fn(lambda s, h, *_: s.l(h.relu()), l=L(10, 10)))


class Box:
    """An object that holds an output."""


def _residual(m: nn.Module) -> None:
    h = rand(4, 10).requires_grad_() * 1
    h.add_(m(h).sin())
    with backpack(BatchGrad()):
        h.sum().backward()


def _dict(m: nn.Module) -> None:
    state: dict[str, Tensor] = {}
    state["out"] = m(rand(4, 10), state)
    with backpack(BatchGrad()):
        state["out"].sum().backward()


def _object(m: nn.Module) -> None:
    box: Any = Box()
    box.out = m(rand(4, 10), box)
    with backpack(BatchGrad()):
        box.out.sum().backward()


def _plain(m: nn.Module) -> None:
    with backpack(BatchGrad()):
        m(rand(4, 10)).sum().backward()


def _penalty(m: nn.Module) -> None:
    x = rand(4, 10).requires_grad_()
    out = m(x).sin().sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with backpack(BatchGrad()):
        (out + grad.square().sum()).backward()


def _create_graph(m: nn.Module) -> None:
    with backpack(BatchGrad()):
        torch.autograd.grad(m(rand(4, 10)).sin().sum(), list(m.parameters()), create_graph=True)
    sum(p.grad_batch.square().sum() for p in m.parameters()).backward()
    for p in m.parameters():
        del p.grad_batch


@pytest.mark.parametrize("use", [_plain, _penalty, _create_graph, _residual, _dict, _object])
def test_nothing_of_a_step_stays(use):
    model = _relu_first()
    kept: list[Any] = []
    hook = model.register_forward_hook(lambda *given: kept.append(weakref.ref(given[2])))
    for _ in range(5):
        use(model)
        model.zero_grad()
    hook.remove()
    gc.collect()
    assert [ref() is None for ref in kept] == [True] * len(kept)
