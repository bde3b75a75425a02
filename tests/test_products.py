"""Products with curvature matrices against explicit ones, in float64."""

import gc
import random
import weakref
from functools import partial

import pytest
import torch
from models.curved import NETWORKS, Concave
from models.small import differentiate, rand
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from truths import close
from truths.autograd import individual_gradients
from truths.second_order import ggn_blocks, hessian_blocks

from backpack import backpack, extend, hessianfree, memory_cleanup
from backpack.extensions import GGNMP, HMP, PCHMP


def labels(n):
    return torch.tensor([0, 2, 1, 1])[:n]


def check(model, field, truth):
    truth = list(truth.values()) if isinstance(truth, dict) else truth
    size = 1e-3 * max(t.abs().max() for t in truth)
    for parameter, matrix in zip(model.parameters(), truth, strict=True):
        multiply = getattr(parameter, field)
        vectors = rand(3, *parameter.shape)
        expected = (vectors.flatten(1) @ matrix).reshape(vectors.shape)
        assert close(multiply(vectors), expected, size, 1e-8)
        assert close(multiply(vectors[0]), expected[0], size, 1e-8)
        with pytest.raises(ValueError, match="shape"):
            multiply(rand(1, 1, 1, 1, 1, 1, 1))


def check_after_the_pass(model, X, retain):
    y, lossfunc = labels(len(X)), nn.CrossEntropyLoss()
    hessian, ggn = hessian_blocks(model, lambda: lossfunc(model(X), y)), ggn_blocks(model, X, lossfunc, y)
    extend(model), extend(lossfunc)
    loss = lossfunc(model(X), y)
    with backpack(HMP(), GGNMP()):
        loss.backward(retain_graph=retain)
    check(model, "hmp", hessian)
    check(model, "ggnmp", ggn)


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("name", ["residual", "norms", "attention", "lstm", "tied", "data_as_weights"])
def test_products_with_hessian_and_ggn_after_the_backward_pass(name, retain):
    build, shape = NETWORKS[name]
    check_after_the_pass(build().double(), rand(*shape), retain)


@pytest.mark.parametrize("name", ["attention", "lstm"])
def test_products_through_fused_layers_whose_output_is_gone_before_the_loss(name):
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model, X = build().double(), rand(*shape)
    y, lossfunc = rand(*model(X)[:, 1:].shape), nn.MSELoss()
    truth = hessian_blocks(model, lambda: lossfunc(model(X)[:, 1:], y))
    extend(model), extend(lossfunc)
    with backpack(HMP()):
        lossfunc(model(X)[:, 1:], y).backward()
    check(model, "hmp", truth)


class Entrances(nn.Module):
    """Parameters that enter linearly, in calls of each kind, and others that only seem to."""

    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.ConvTranspose1d(2, 3, 2, stride=2, output_padding=1), nn.BatchNorm1d(3).eval()
        self.conv, self.pairs, self.out = nn.Conv1d(3, 2, 2, groups=1), nn.Bilinear(2, 2, 3), nn.Linear(3, 3)
        self.scale, self.matrix = nn.Parameter(rand(3)), nn.Parameter(rand(3, 3))
        self.column, self.square, self.both = nn.Parameter(rand(2)), nn.Parameter(rand(3)), nn.Parameter(rand(3))

    def forward(self, x):
        x = self.norm(self.up(x)).sigmoid()
        x = self.conv(x).tanh()[..., :2]
        x = self.pairs(x[..., 0], x[..., 1]) * self.scale
        x = torch.addmm(self.both, x.sin(), self.matrix) - self.both * x
        x = x.exp() * self.square * self.square
        whole = x.clone()
        part = whole[:, :2].add_(self.column)
        return self.out((whole.sin() * part[:, :1]).tanh()) + x


@pytest.mark.parametrize("retain", [False, True])
def test_products_start_where_a_parameter_enters_linearly(retain):
    check_after_the_pass(Entrances().double(), rand(3, 2, 3), retain)


class Words(nn.Module):
    """A table whose rows are looked up, alone or in bags; ``plain``: by functions that PyTorch differentiates twice."""

    def __init__(self, table):
        super().__init__()
        self.table, self.out, self.plain = table, nn.Linear(3, 3), False

    def forward(self, index):
        if not self.plain:
            h = self.table(index)
        else:
            h = nn.functional.embedding(index, self.table.weight, self.table.padding_idx)
            padding = -1 if self.table.padding_idx is None else self.table.padding_idx
            seen = (index != padding)[..., None].expand_as(h).to(h.dtype)
            mode = getattr(self.table, "mode", None)
            h = h if mode is None else (h * seen).sum(1) / (seen.sum(1).clamp(min=1) if mode == "mean" else 1)
        h = h.sin().sum(1) if h.dim() > 2 else h.sin()
        return self.out(h.tanh())


TABLES = {
    "words": lambda: nn.Embedding(5, 3),
    "with padding": lambda: nn.Embedding(5, 3, padding_idx=1),
    "sparse": lambda: nn.Embedding(5, 3, sparse=True),
    "sums": lambda: nn.EmbeddingBag(5, 3, mode="sum"),
    "means with padding": lambda: nn.EmbeddingBag(5, 3, mode="mean", padding_idx=2),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("table", TABLES)
def test_products_of_tables(table):
    torch.manual_seed(0)
    model, X = Words(TABLES[table]()).double(), torch.randint(0, 5, (4, 3))
    y, lossfunc = labels(4), nn.CrossEntropyLoss()
    model.plain = True
    hessian, ggn = hessian_blocks(model, lambda: lossfunc(model(X), y)), ggn_blocks(model, X, lossfunc, y)
    model.plain = False
    differentiate(model, lossfunc, X, y, HMP(), GGNMP())
    check(model, "hmp", hessian)
    check(model, "ggnmp", ggn)


def test_a_product_costs_less_than_twice_a_gradient_of_its_parameter():
    """Counted in multiplications: the first layer's gradient is not differentiated, nor those of the others taken."""
    model, lossfunc = (
        extend(nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3))),
        extend(nn.CrossEntropyLoss()),
    )
    with backpack(HMP()):
        lossfunc(model(torch.rand(4, 64)), labels(4)).backward()
    multiply, vector = model[0].weight.hmp, torch.rand(16, 64)
    multiply(vector)
    with FlopCounterMode(display=False) as counter:
        multiply(vector)
    first, last = 2 * 4 * 64 * 16, 2 * 4 * 16 * 3
    assert counter.get_total_flops() == 2 * first + 2 * last


def test_products_of_selected_samples_keep_the_normalization_of_the_batch():
    chosen = [2, 0, 2]
    model, X, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), rand(4, 3), labels(4)

    def loss():
        return cross_entropy(model(X[chosen]), y[chosen], reduction="sum") / len(X)

    truth = hessian_blocks(model, loss)
    extend(model), (lossfunc := extend(nn.CrossEntropyLoss()))
    for retain, shape in ((False, (4, 3)), (True, (3, 4))):
        out = model(X)
        out = out if shape == (4, 3) else out + 0  # then the graph of the selected samples is not that of the loss
        with backpack(HMP(subsampling=chosen)):
            lossfunc(out, y).backward(retain_graph=retain)
        check(model, "hmp", truth)


def test_the_hessian_of_an_indefinite_loss_has_products():
    model, X, y, lossfunc = nn.Linear(3, 3).double(), rand(3, 3), rand(3, 3), extend(Concave())
    truth = hessian_blocks(model, lambda: Concave()(model(X), y))
    with backpack(HMP(), GGNMP()):
        lossfunc(extend(model)(X), y).backward()
    check(model, "hmp", truth)
    check(model, "ggnmp", truth)
    with pytest.raises(ValueError, match="not positive semidefinite"), backpack(PCHMP()):
        lossfunc(model(X), y).backward()


@pytest.mark.parametrize("name", ["attention", "squeeze_and_excite"])
def test_the_positive_curvature_hessian_is_positive_for_any_graph(name):
    build, shape = NETWORKS[name]
    model, X, y, lossfunc = extend(build().double()), rand(*shape), labels(shape[0]), extend(nn.CrossEntropyLoss())
    with backpack(PCHMP(), PCHMP("absolute", "abs"), GGNMP()):
        lossfunc(model(X), y).backward()
    for parameter in model.parameters():
        basis = torch.eye(parameter.numel(), dtype=torch.float64).reshape(-1, *parameter.shape)
        clipped, absolute, ggn = (
            getattr(parameter, field)(basis).flatten(1) for field in ("pchmp", "absolute", "ggnmp")
        )
        for difference in (clipped - ggn, absolute - clipped):
            assert close(difference, difference.T, clipped.abs().max())
            assert torch.linalg.eigvalsh(difference).min() > -1e-12


def test_what_is_no_modification_is_refused():
    with pytest.raises(ValueError, match="'clip' and 'abs'"):
        PCHMP(modify="square")


def test_products_are_of_the_masks_that_the_forward_pass_drew():
    model = extend(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double())
    lossfunc, X, y = extend(nn.CrossEntropyLoss()), rand(3, 3), labels(3)
    loss = lossfunc(model(X), y)
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    with backpack(HMP()):
        loss.backward()
    for p, g in zip(model.parameters(), grads, strict=True):
        vector = rand(*p.shape)
        expected = torch.autograd.grad(g, p, vector, retain_graph=True, allow_unused=True)[0]
        assert close(p.hmp(vector), torch.zeros_like(p) if expected is None else expected, 1e-3, 1e-8)


# Random chains: extended as one or layer by layer, reshaped before the loss, updated between the products

FUNCTIONS = [nn.Sigmoid, nn.Tanh, nn.Softplus, nn.SiLU, nn.ReLU, partial(nn.Softmax, 1), partial(nn.LogSoftmax, 1)]
RESHAPED = {
    "as it is": lambda out: out,
    "with positions": lambda out: out.reshape(len(out), 2, -1),
    "classes last": lambda out: out.reshape(len(out), -1, 2).transpose(1, 2),
    "a part": lambda out: out[:, 1:-1],
    "positions as rows": lambda out: out.reshape(2 * len(out), -1),
    "flat": lambda out: out.flatten(),
    "transposed": lambda out: out.T,
    "padded": lambda out: nn.functional.pad(out, (1, 0)),
    "mean": lambda out: out.reshape(len(out), 2, -1).mean(1),
}


def set_data(p, new):
    p.data = new


UPDATES = {
    "in place": lambda p, new: p.copy_(new),
    "other memory": set_data,
    "unseen by autograd": lambda p, new: p.data.copy_(new),
    "in parts": lambda p, new: p.view(-1)[:1].fill_(new.sum()),
}


def random_chain(seed):
    """Layers, and the shape of their output is ``[4, 6]``."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    layers, width = [], 3
    for _ in range(choose.randrange(1, 4)):
        size = choose.randrange(2, 5)
        layers += [nn.Linear(width, size, bias=choose.random() < 0.8), choose.choice(FUNCTIONS)()]
        width = size
    layers.append(nn.Linear(width, 6))
    return [layer.double() for layer in layers], choose


def positive_blocks(layers, last, X, modify):
    """Explicitly: the GGN, and for each function the part with modified eigenvalues of its second derivatives."""

    def from_layer(start, h):
        for layer in layers[start:]:
            h = layer(h)
        return last(h)

    model = nn.Sequential(*layers)
    truth = ggn_blocks(model, X, lambda out, _: last(out), None)
    for place, layer in enumerate(layers):
        if isinstance(layer, nn.Linear):
            continue
        h = nn.Sequential(*layers[:place])(X)
        after = layer(h).detach().requires_grad_()
        (arriving,) = torch.autograd.grad(from_layer(place + 1, after), after)
        residual = torch.autograd.functional.hessian(lambda x, f=layer, g=arriving: (f(x) * g).sum(), h.detach())
        eigenvalues, vectors = torch.linalg.eigh(residual.reshape(h.numel(), h.numel()))
        residual = vectors @ modify(eigenvalues).diag() @ vectors.T
        for p, J in zip(truth, individual_gradients(h.flatten(), truth), strict=True):
            truth[p] = truth[p] + J.flatten(1).T @ residual @ J.flatten(1)
    return truth


@pytest.mark.parametrize("seed", range(24))
def test_products_of_random_chains_are_those_at_the_weights_of_the_pass(seed):
    layers, choose = random_chain(seed)
    reshape = RESHAPED[choose.choice(list(RESHAPED))]
    modify, function = choose.choice([("clip", lambda e: e.clamp(min=0)), ("abs", torch.abs)])
    X, parameters = rand(4, 3), [p for layer in layers for p in layer.parameters()]
    lossfunc, y = nn.MSELoss(), rand(*reshape(torch.zeros(4, 6)).shape)
    if choose.random() < 0.4:
        reshape = RESHAPED[choose.choice(["as it is", "with positions", "classes last", "a part", "positions as rows"])]
        shape = reshape(torch.zeros(4, 6)).shape
        lossfunc, y = nn.CrossEntropyLoss(), torch.randint(shape[1], (shape[0], *shape[2:]))

    def last(out):
        return lossfunc(reshape(out), y)

    chain = nn.Sequential(*layers)
    truth = {
        "hmp": hessian_blocks(chain, lambda: last(chain(X))),
        "ggnmp": list(ggn_blocks(chain, X, lambda out, _: last(out), None).values()),
        "pchmp": list(positive_blocks(layers, last, X, function).values()),
    }
    for part in (chain,) if choose.random() < 0.3 else layers:
        extend(part)
    extend(lossfunc)
    h = X
    for layer in layers:
        h = layer(h)
    with backpack(HMP(), GGNMP(), PCHMP(modify=modify)):
        last(h).backward()
    places = list(range(len(parameters)))
    choose.shuffle(places)
    for place in places:  # each is updated by its own curvature, or anyhow
        p, vectors = parameters[place], rand(2, *parameters[place].shape)
        for field, matrices in truth.items():
            size = 1e-3 * max(matrix.abs().max() for matrix in matrices)
            expected = (vectors.flatten(1) @ matrices[place]).reshape(vectors.shape)
            assert close(getattr(p, field)(vectors), expected, size, 1e-8), field
            assert close(getattr(p, field)(vectors[0]), expected[0], size, 1e-8), field
        with torch.no_grad():
            UPDATES[choose.choice(list(UPDATES))](p, p - p.ggnmp(p.grad) + rand(*p.shape))


class Copied(nn.Module):
    """Parameters that are saved in several ways: transposed, in part, by a user's function, in a region twice."""

    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, grad):
            x, w = ctx.saved_tensors
            return grad * w, (grad * x).sum_to_size(w.shape)

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.cell = nn.Linear(3, 4), nn.Linear(4, 4), nn.LSTM(4, 4, batch_first=True)
        self.scale, self.table = nn.Parameter(rand(4)), nn.Parameter(rand(3, 4))

    def forward(self, x):
        x = self.first(x).sigmoid()
        x = self.cell(x[:, None])[0][:, 0] * self.scale[:2].sum()
        x = checkpoint(lambda h: self.inner(h).tanh(), x, use_reentrant=False)
        x = self.Times.apply(x, self.scale)
        return x @ self.table.T


def test_products_outlive_updates_however_parameters_were_saved():
    torch.manual_seed(0)
    model, X, y = Copied().double(), rand(4, 3), labels(4)
    lossfunc = nn.CrossEntropyLoss()
    hessian, ggn = hessian_blocks(model, lambda: lossfunc(model(X), y)), ggn_blocks(model, X, lossfunc, y)
    extend(model), extend(lossfunc)
    for way in UPDATES.values():
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with backpack(HMP(), GGNMP()):
            lossfunc(model(X), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                way(p, torch.zeros_like(p))
        check(model, "hmp", hessian)
        check(model, "ggnmp", ggn)
        model.load_state_dict(state)


def test_a_graph_that_is_kept_holds_one_copy_of_the_parameters_it_saved():
    """Of a weight that is shared by many steps, too."""
    cell, head, lossfunc = nn.RNNCell(4, 4), nn.Linear(4, 3), extend(nn.CrossEntropyLoss())
    extend(cell), extend(head)
    h = torch.rand(4, 4).requires_grad_()  # no parameter, although a leaf
    for _ in range(6):
        h = cell(rand(4, 4).float(), h)
    loss = lossfunc(head(h), labels(4))
    before = StorageSizes(loss)
    assert before.sizes
    with backpack(HMP()):
        loss.backward()
    added = StorageSizes(loss).sizes.items() - before.sizes.items()
    assert 0 < sum(size for _, size in added) <= 4 * sum(p.numel() for m in (cell, head) for p in m.parameters())


class StorageSizes:
    """Bytes of all memory that the nodes of a graph saved."""

    def __init__(self, loss):
        self.sizes, seen, pending = {}, set(), [loss.grad_fn]
        while pending:
            node = pending.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            pending += [other for other, _ in node.next_functions]
            for name in dir(node):
                if name.startswith("_saved_") and isinstance(value := getattr(node, name), torch.Tensor):
                    storage = value.untyped_storage()
                    self.sizes[storage.data_ptr()] = storage.nbytes()


def test_updates_between_two_passes_through_one_graph():
    model, lossfunc = extend(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()), extend(nn.MSELoss())
    X, y = rand(3, 3), rand(3, 3)
    truth = hessian_blocks(model, lambda: nn.functional.mse_loss(model(X), y))
    loss = lossfunc(model(X), y)
    for _ in range(2):
        with backpack(HMP()):
            loss.backward(retain_graph=True)
        check(model, "hmp", truth)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)


class Note(nn.Module):
    alive = None

    def forward(self, x):
        if x.requires_grad:
            hook = type("Hook", (), {"__call__": lambda self, grad: None})()
            x.register_hook(hook)
            Note.alive = weakref.ref(hook)
        return x.sin()


def test_the_graph_is_freed_with_the_functions():
    model, lossfunc = extend(nn.Sequential(nn.Linear(3, 3), Note(), nn.Linear(3, 3)).double()), extend(nn.MSELoss())
    gc.collect()
    gc.disable()
    try:
        with backpack(HMP(), PCHMP()):
            lossfunc(model(rand(3, 3)), rand(3, 3)).backward()
        model[0].weight.hmp(rand(3, 3)), model[0].weight.pchmp(rand(3, 3))
        assert Note.alive() is not None
        for p in model.parameters():
            del p.hmp, p.pchmp
        assert Note.alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("retain", [False, True])
def test_nothing_grows_and_all_is_freed_with_the_model(retain):
    """Without help of the garbage collector, which does not see references between nodes of a graph."""
    model, lossfunc = extend(nn.Sequential(nn.Linear(3, 3), Note(), nn.Linear(3, 3)).double()), extend(nn.MSELoss())

    def step(model):
        with backpack(HMP(), GGNMP(), PCHMP()):
            lossfunc(model(rand(3, 3)), rand(3, 3)).backward(retain_graph=retain)
        for p in model.parameters():
            p.hmp(rand(*p.shape)), p.ggnmp(rand(2, *p.shape)), p.pchmp(rand(*p.shape))
        return Note.alive

    gc.collect()
    gc.disable()
    try:
        graphs = [step(model) for _ in range(4)]
        assert [graph() is not None for graph in graphs] == [False, False, False, True]
        memory_cleanup(model)
        assert graphs[-1]() is None
        graph, function, parameter = step(model), model[0].weight.hmp, weakref.ref(model[2].weight)
        del model
        assert graph() is None and parameter() is None
        with pytest.raises(RuntimeError, match="model .* has been deleted"):
            function(rand(3, 3))
    finally:
        gc.enable()


# hessianfree


def problem():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    X, y = rand(4, 3), labels(4)
    parameters = list(model.parameters())
    out = model(X)
    rows = individual_gradients(out.flatten(), parameters)
    return model, parameters, out, y, torch.cat([J.flatten(1) for J in rows], 1)


def flat(tensors):
    assert isinstance(tensors, tuple)
    return torch.cat([t.flatten() for t in tensors])


def test_jacobian_products():
    _, parameters, out, _, jacobian = problem()
    v, w = [rand(*p.shape) for p in parameters], rand(*out.shape)
    for product in (hessianfree.R_op, hessianfree.jacobian_vector_product):
        assert close(flat(product(out, parameters, v)), jacobian @ flat(tuple(v)))
    for product in (hessianfree.L_op, hessianfree.transposed_jacobian_vector_product):
        assert close(flat(product([out], parameters, [w])), jacobian.T @ w.flatten())
    assert hessianfree.L_op(out, parameters, w, detach=False)[0].requires_grad
    with pytest.raises(ValueError, match="one tensor for each"):
        hessianfree.R_op(out, parameters, v[1:])


def test_hessian_and_ggn_products():
    model, parameters, out, y, jacobian = problem()
    v = [rand(*p.shape) for p in parameters]
    loss = cross_entropy(out, y)
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    hessian = torch.stack(
        [flat(torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True)) for g in flat(grads)]
    )
    inner = torch.autograd.functional.hessian(lambda o: cross_entropy(o, y), out.detach()).reshape(12, 12)
    ggn = jacobian.T @ inner @ jacobian
    assert close(flat(hessianfree.hessian_vector_product(loss, parameters, v)), hessian @ flat(tuple(v)))
    assert close(flat(hessianfree.hessian_vector_product(loss, parameters, v, grads)), hessian @ flat(tuple(v)))
    assert close(flat(hessianfree.ggn_vector_product(loss, out, model, v)), ggn @ flat(tuple(v)))
    assert close(flat(hessianfree.ggn_vector_product_from_plist(loss, out, parameters, v)), ggn @ flat(tuple(v)))
    exact = hessianfree.fisher_vector_product(nn.CrossEntropyLoss(), out, y, parameters, v)
    assert close(flat(exact), ggn @ flat(tuple(v)))


def test_fisher_products():
    _, parameters, out, y, jacobian = problem()
    v = [rand(*p.shape) for p in parameters]
    empirical = 0
    for n in range(4):
        (grad,) = torch.autograd.grad(cross_entropy(out[n : n + 1], y[n : n + 1]), out, retain_graph=True)
        grad = jacobian.T @ grad.flatten()
        empirical = empirical + grad * (grad @ flat(tuple(v))) / 4
    args = (nn.CrossEntropyLoss(), out, y, parameters, v)
    assert close(flat(hessianfree.fisher_vector_product(*args, kind="empirical")), empirical)
    exact = flat(hessianfree.fisher_vector_product(*args))
    draws = torch.stack([flat(hessianfree.fisher_vector_product(*args, kind="sampled")) for _ in range(600)])
    assert bool(((draws.mean(0) - exact).abs() <= 5 * draws.std(0) / 600**0.5 + 1e-12).all())
    with pytest.raises(ValueError, match="kind must be"):
        hessianfree.fisher_vector_product(*args, kind="type-1")


def test_products_through_fused_attention_say_how_and_then_work():
    model, X = NETWORKS["attention"][0]().double(), rand(2, 3, 4)
    parameters = list(model.parameters())
    v = [rand(*p.shape) for p in parameters]
    with pytest.raises(RuntimeError, match="TwiceDifferentiable"):
        hessianfree.hessian_vector_product(model(X).square().sum(), parameters, v)
    with hessianfree.TwiceDifferentiable():
        found = hessianfree.hessian_vector_product(model(X).square().sum(), parameters, v)
    for p, f, h, vector in zip(
        parameters, found, hessian_blocks(model, lambda: model(X).square().sum()), v, strict=True
    ):
        (own,) = hessianfree.hessian_vector_product(_math(model, X), p, vector)
        assert f.shape == p.shape and close(own.flatten(), h @ vector.flatten(), 1e-3, 1e-8)


def _math(model, X):
    with hessianfree.TwiceDifferentiable():
        return model(X).square().sum()
