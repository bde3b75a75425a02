"""Kronecker factors against their defining sums, from explicit Jacobians, and against the exact block of the GGN."""

import pytest
import torch
from models.kronecker import Rest, Words
from models.layers import CASES, build
from models.networks import LABELS, NETWORKS, make, values
from models.small import differentiate
from torch import nn
from truths import close
from truths.second_order import ggn_blocks

from backpack import backpack, extend
from backpack.extensions import EKFAC, KFAC, KFLR
from backpack.utils.kroneckers import kfacs_to_mat


@pytest.mark.parametrize("approx", [None, "expand", "reduce"])
def test_product_of_one_samples_factors_is_the_block(approx):
    model, X, lossfunc, y = make("mlp", "cross_entropy_options")
    ggn = ggn_blocks(model, X[:1], lossfunc, y[:1])
    with backpack(KFLR(approx=approx)):
        lossfunc(model(X[:1]), y[:1]).backward()
    for parameter in model.parameters():
        assert close(kfacs_to_mat(parameter.kflr), ggn[parameter], 1e-9, 1e-9)


@pytest.mark.parametrize("loss", ["mse", "mse_sum"])
def test_product_of_the_last_layers_factors_is_the_block_where_the_loss_is_quadratic(loss):
    model, X, lossfunc, y = make("mlp", loss)
    ggn = ggn_blocks(model, X, lossfunc, y)
    with backpack(KFLR()):
        lossfunc(model(X), y).backward()
    for parameter in list(ggn)[-2:]:
        assert close(kfacs_to_mat(parameter.kflr), ggn[parameter], rtol=1e-9)


def test_expand_is_exact_for_deep_linear_nets_whose_loss_sums_over_positions():
    """Eschenhagen et al. (2023), section 3.2."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    X, y = values(4, 3, 4), values(4, 3, 3)
    ggn = ggn_blocks(model, X, nn.MSELoss(), y)
    differentiate(model, nn.MSELoss(), X, y, KFLR(approx="expand"))
    for weight in list(ggn)[::2]:
        assert close(kfacs_to_mat(weight.kflr), ggn[weight], rtol=1e-9)


class Averaged(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(self.a(x)).mean(1)


def test_reduce_is_exact_for_deep_linear_nets_that_average_positions():
    """Eschenhagen et al. (2023), section 3.3."""
    model = Averaged().double()
    X, y = values(4, 3, 4), values(4, 3)
    ggn = ggn_blocks(model, X, nn.MSELoss(), y)
    differentiate(model, nn.MSELoss(), X, y, KFLR(approx="reduce"))
    for weight in (model.a.weight, model.b.weight):
        assert close(kfacs_to_mat(weight.kflr), ggn[weight], rtol=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_factors_multiply_to_the_shape_of_the_parameter(name):
    model, X, lossfunc, y = make(name, "bce" if name == "sigmoid_bce" else "cross_entropy")
    with backpack(KFLR(), KFAC(fisher="exact", approx="expand")):
        lossfunc(model(X), y).backward()
    ggn = ggn_blocks(model, X, lossfunc, y)
    for parameter in model.parameters():
        product = kfacs_to_mat(parameter.kflr)
        assert product.shape == (parameter.numel(), parameter.numel())
        if len(parameter.kflr) == 1:
            truth = ggn[parameter]
            assert close(product, truth, 1e-3, 1e-9) and close(parameter.kfac[0], truth, 1e-3, 1e-9)


@pytest.mark.parametrize("loss", ["cross_entropy_options", "mse", "bce_logits"])
def test_sampled_factors_average_to_the_exact_ones(loss):
    """Within five standard errors of independent draws, entry by entry; input factors are the same."""
    model, X, lossfunc, y = make("mlp", loss)
    draws = []
    for _ in range(30):
        with backpack(KFAC(mc_samples=40, chunk_size=23), KFLR()):
            lossfunc(model(X), y).backward()
        draws.append([p.kfac for p in model.parameters()])
    for place, parameter in enumerate(model.parameters()):
        each = torch.stack([draw[place][0] for draw in draws])
        error = 5 * each.std(0) / len(draws) ** 0.5 + 1e-12
        assert bool(((each.mean(0) - parameter.kflr[0]).abs() <= error).all())
        assert all(torch.equal(a, b) for a, b in zip(draws[0][place][1:], parameter.kflr[1:], strict=True))


@pytest.mark.parametrize(
    ("loss", "terms"),
    [("cross_entropy", 4), ("cross_entropy_sum", 1), ("mse", 12), ("mse_sum", 1), ("bce_logits", 12), ("nll", 4)],
)
def test_empirical_factors_are_those_of_the_gradients_at_the_labels(loss, terms):
    """Of the loss before its mean over so many terms; the mean of their outer products."""
    if loss == "nll":
        model, X = extend(nn.Sequential(NETWORKS["mlp"][0](), nn.LogSoftmax(1)).double()), values(4, 4)
        lossfunc, y = extend(nn.NLLLoss()), LABELS
    else:
        model, X, lossfunc, y = make("mlp", loss)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    inputs, outputs = [], []
    h = X
    for layer in model[0] if loss == "nll" else model:
        inputs.append(h)
        h = layer(h)
        outputs.append(h)
    h = model[1](h) if loss == "nll" else h
    grads = torch.autograd.grad(lossfunc(h, y), outputs)
    with backpack(KFAC(fisher="empirical")):
        lossfunc(model(X), y).backward()
    for layer, x, g in zip(model[0] if loss == "nll" else model, inputs, grads, strict=True):
        if layer not in linears:
            continue
        B = terms * g.T @ g
        assert close(layer.weight.kfac[0], B, rtol=1e-9) and close(layer.bias.kfac[0], B, rtol=1e-9)
        assert close(layer.weight.kfac[1], x.T @ x / 4, rtol=1e-9)


@pytest.mark.parametrize("approx", [None, "expand", "reduce"])
@pytest.mark.parametrize("tied", [None, "linear", "matmul"])
def test_factors_of_an_embedding_are_those_of_one_hot_inputs(tied, approx):
    """With the input factor's diagonal only; those of an output layer with the same weight are added."""
    model, lossfunc = Words(tied).double(), nn.MSELoss()
    index = torch.tensor([[0, 1, 2, 4], [2, 0, 0, 1], [4, 4, 1, 3]])
    y = values(3, 5 if tied else 3)
    z = model.words(index).detach()

    def rest(z):
        h = z.sum(1).tanh()
        return h @ model.words.weight.detach().T if tied else h

    hessian = torch.autograd.functional.hessian(lambda o: lossfunc(o, y), rest(z)).reshape(y.numel(), -1)
    jacobian = torch.autograd.functional.jacobian(rest, z).flatten(0, 1)  # [a n s o]
    jacobian = jacobian * (index != 1)[None, :, :, None]
    B = torch.einsum("anso,ab,bntp->onstp", jacobian, hessian, jacobian)
    B = torch.einsum("onssp->op", B) if approx == "expand" else B.sum((1, 2, 3))
    hot = nn.functional.one_hot(index, 5).double() * (index != 1)[:, :, None]
    hot = hot.mean(1, keepdim=True) if approx == "reduce" else hot
    A = hot.square().sum((0, 1)) / 3 / (4 if approx == "expand" else 1)
    if tied:
        h = z.sum(1).tanh()
        own = hessian.reshape(3, 5, 3, 5).diagonal(dim1=0, dim2=2).sum(2)
        A, B = torch.diag(A) + own, B + h.T @ h / 3
    differentiate(model, lossfunc, index, y, KFLR(approx=approx))
    found = model.words.weight.kflr
    assert close(found[0], A, rtol=1e-9) and close(found[1], B, rtol=1e-9)


def test_uses_of_one_form_count_as_further_positions():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            return self.a(self.a(x).tanh())

    model, X, y = Twice().double(), values(4, 3), values(4, 3)
    first = model.a(X).detach()
    inner = torch.stack([torch.autograd.functional.jacobian(lambda z: model.a(z.tanh()), z) for z in first])
    H = 2 * torch.eye(3, dtype=torch.float64) / 12
    g = inner + torch.eye(3, dtype=torch.float64)  # both uses' derivatives of the output
    inputs = torch.stack([X, first.tanh()], 1)
    expand = sum(j.T @ H @ j for j in inner) + 4 * H
    differentiate(model, nn.MSELoss(), X, y, KFLR(), KFAC(fisher="exact", approx="expand"))
    assert close(model.a.weight.kflr[0], sum(j.T @ H @ j for j in g), rtol=1e-9)
    assert close(model.a.weight.kflr[1], torch.einsum("nsi,nsj->ij", inputs, inputs) / 4, rtol=1e-9)
    assert close(model.a.weight.kfac[0], expand, rtol=1e-9)
    assert close(model.a.weight.kfac[1], torch.einsum("nsi,nsj->ij", inputs, inputs) / 8, rtol=1e-9)


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_parts_of_a_matrix_that_are_used_by_themselves(kind):
    """Rows: like groups, with weights in proportion to their number. Columns: no matrix of a linear map."""

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3))

        def forward(self, x):
            if kind == "columns":
                return nn.functional.linear(x[:, :2], self.weight[:, :2])
            a, b = self.weight.split([2, 3])
            return torch.cat([nn.functional.linear(x, a), nn.functional.linear(x.sin(), b)], 1)

    model, X, y = Parts().double(), values(4, 3), values(4, 5)
    ggn = ggn_blocks(model, X, nn.MSELoss(), y)
    differentiate(model, nn.MSELoss(), X, y, KFLR())
    if kind == "columns":
        assert len(model.weight.kflr) == 1 and close(model.weight.kflr[0], ggn[model.weight], rtol=1e-9)
        return
    B, A = model.weight.kflr
    assert close(B, 4 * 2 / 20 * torch.eye(5, dtype=torch.float64), rtol=1e-9)
    assert close(A, (2 * X.T @ X + 3 * X.sin().T @ X.sin()) / 20, rtol=1e-9)


class Stack(nn.Module):
    """A matrix for each of the groups, which lie along axis 2 of the inputs ``[n s g i]``."""

    def __init__(self, inputs_first):
        super().__init__()
        self.weight = nn.Parameter(torch.randn((3, 4, 2) if inputs_first else (3, 2, 4)))
        self.rest, self.inputs_first = Rest(12), inputs_first

    def outputs(self, x):
        rows, weight = x.movedim(2, 0).flatten(1, 2), self.weight if self.inputs_first else self.weight.mT
        return torch.bmm(rows, weight).unflatten(1, x.shape[:2]).movedim(0, 2)

    def forward(self, x):
        return self.rest(self.outputs(x))


@pytest.mark.parametrize("approx", [None, "expand", "reduce"])
@pytest.mark.parametrize("inputs_first", [True, False])
def test_the_rows_of_stacked_matrices_are_blocks(inputs_first, approx):
    model, X, lossfunc, y = Stack(inputs_first).double(), values(4, 2, 3, 4), nn.MSELoss(reduction="sum"), values(4, 3)
    z = model.outputs(X).detach()
    J = torch.autograd.functional.jacobian(lambda z: model.rest(z).sum(0), z) * 2**0.5  # [c n s g o]
    outputs = J if approx == "expand" else J.sum(2, keepdim=True)
    outputs = torch.einsum("cnsgo,cnsgp->gop", outputs, outputs)
    x = X.mean(1, keepdim=True) if approx == "reduce" else X
    inputs = torch.einsum("nsgi,nsgj->gij", x, x) / (8 if approx == "expand" else 4)
    along_rows, along_columns = (inputs, outputs) if inputs_first else (outputs, inputs)
    ggn = ggn_blocks(model, X, lossfunc, y)
    differentiate(model, lossfunc, X, y, KFLR(approx=approx), EKFAC(fisher="exact", approx=approx))
    rows, columns = model.weight.kflr
    assert close(rows, torch.block_diag(*along_rows), rtol=1e-9)
    assert close(columns, along_columns.mean(0), rtol=1e-9)
    bases, eigenvalues = model.weight.ekfac
    turned = kfacs_to_mat([b.mT @ f @ b for b, f in zip(bases, (rows, columns), strict=True)])
    assert close(turned, turned.diagonal().diag())
    U = kfacs_to_mat([b.contiguous() for b in bases])
    along = (U.mT @ ggn[model.weight] @ U).diagonal()
    assert close(eigenvalues.flatten(), along, rtol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_any_parameter_has_factors_that_multiply_to_its_size(name):
    problem = build(name)
    model, lossfunc = extend(problem.model), extend(nn.MSELoss(reduction="sum"))
    out = problem.output()
    with backpack(KFAC(approx="expand"), KFLR(subsampling=[0])):
        lossfunc(out, torch.zeros_like(out)).backward()
    for name, parameter in problem.parameters().items():
        if parameter.grad is not None:
            for factors in (parameter.kfac, parameter.kflr):
                product = kfacs_to_mat(factors)
                assert product.shape == (parameter.numel(), parameter.numel()), name
                assert bool((torch.linalg.eigvalsh(product) > -1e-9 * product.abs().max() - 1e-30).all())
    assert model is problem.model


class Table(nn.Module):
    """An elementwise product with a table, of which each sample has another part."""

    def __init__(self, rows, columns):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, rows, columns) / 8)

    def forward(self, x):
        return (x * self.table).sum(1).tanh()


@pytest.mark.parametrize("n", [1, 3])
def test_large_parameters_that_are_no_matrix_have_second_moments_of_rows_and_columns(n):
    """Their product has the block's trace; for one sample and row it is the block. EKFAC is nearer to the block."""
    torch.manual_seed(0)
    model, lossfunc = Table(65, 64).double(), nn.MSELoss()
    X, y = torch.zeros(n, 65, 64, dtype=torch.float64), torch.randn(n, 64, dtype=torch.float64)
    X[:, 3 : 3 + n] = torch.randn(n, n, 64, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda table: torch.func.functional_call(model, {"table": table}, (X,)), model.table.detach()
    )
    G = (2 / y.numel()) ** 0.5 * jacobian.reshape(-1, 65, 64)  # the loss's Hessian is a multiple of the identity
    rows, columns = torch.einsum("arc,asc->rs", G, G), torch.einsum("arc,ard->cd", G, G)
    differentiate(
        model, lossfunc, X, y, KFLR(), KFAC(fisher="exact", approx="expand", chunk_size=7), EKFAC(fisher="exact")
    )
    for found in (model.table.kflr, model.table.kfac):
        assert close(found[0], rows, rtol=1e-9) and close(found[1], columns / columns.trace(), rtol=1e-9)
    if n == 1:
        used = columns.nonzero()[:, 0].unique()[:8]
        part = torch.kron(model.table.kflr[0][2:5, 2:5], model.table.kflr[1][used][:, used])
        few = G[:, 2:5][:, :, used].flatten(1)
        assert close(part, few.T @ few, rtol=1e-9)
    Q, R = model.table.ekfac.bases
    assert close(model.table.ekfac.eigenvalues, (Q.T @ G @ R).square().sum(0), rtol=1e-8)


def test_what_is_no_matrix_and_too_large_is_refused():
    model = extend(Table(2**15 + 1, 2))
    words = r"shape \[1, 32769, 2\] would have a Kronecker factor of 32769 rows.*requires_grad_"
    with pytest.raises(ValueError, match=words), backpack(KFLR()):
        extend(nn.MSELoss())(model(torch.ones(2, 1, 1)), torch.ones(2, 2)).backward()


class Wide(nn.Module):
    """More outputs than a factor may have rows, few of which make up what is predicted."""

    def __init__(self, size):
        super().__init__()
        self.out, self.scale = nn.Linear(2, size), nn.Parameter(torch.rand(size))

    def forward(self, x):
        return (self.out(x) * self.scale).tanh()[:, :3]


def test_a_large_parameter_of_one_axis_has_a_diagonal_factor_and_a_large_matrix_is_refused():
    torch.manual_seed(0)
    model, X, y, lossfunc = Wide(2**15 + 1).double(), values(4, 2), LABELS, nn.CrossEntropyLoss()
    extend(model)
    with pytest.raises(ValueError, match=r"\[32769, 2\] would have .* 32769 rows, that is 4 GiB"), backpack(KFLR()):
        extend(lossfunc)(model(X), y).backward()
    model.out.weight.requires_grad_(False)
    with backpack(KFLR(), EKFAC(fisher="exact")):
        extend(lossfunc)(model(X), y).backward()
    small = Wide(3).double()
    for own, whole in zip(small.parameters(), model.parameters(), strict=True):
        own.data = whole.detach()[:3]
    ggn = ggn_blocks(small, X, lossfunc, y)
    for own, whole in zip(small.parameters(), model.parameters(), strict=True):
        if own.dim() == 1:
            diagonal = ggn[own].diagonal()
            assert whole.kflr[0].shape == whole.shape and not whole.kflr[0][3:].any()
            assert close(whole.kflr[0][:3], diagonal, rtol=1e-9)
            assert close(whole.ekfac.eigenvalues, whole.kflr[0]) and whole.ekfac.bases[0].dim() == 1


class Positions(nn.Module):
    """Rows that are looked up for all samples alike, one of them padding."""

    def __init__(self, batch):
        super().__init__()
        self.places, self.out, self.batch = nn.Embedding(4, 3, padding_idx=2), nn.Linear(3, 2), batch

    def forward(self, x):
        place = torch.tensor([0, 3, 2]).expand(len(x), -1) if self.batch else torch.tensor([0, 3, 2])
        return self.out((x + self.places(place)).tanh())


def test_positions_that_samples_share_have_the_factors_of_those_that_each_looks_up():
    X, y = values(4, 3, 3), values(4, 3, 2)
    found = []
    torch.manual_seed(0)
    state = Positions(True).double().state_dict()
    for batch in (True, False):
        model = extend(Positions(batch).double())
        model.load_state_dict(state)
        with backpack(KFLR(), KFAC(fisher="exact", approx="expand", subsampling=[2]), EKFAC(fisher="exact")):
            extend(nn.MSELoss())(model(X), y).backward()
        weight = model.places.weight
        found.append([*weight.kflr, *weight.kfac, weight.ekfac.eigenvalues])
    assert close(found[0][0], torch.tensor([1.0, 0, 0, 1]).double())
    for first, second in zip(*found, strict=True):
        assert close(first, second, rtol=1e-9)


def next_state(kind, x, h, state):
    """The new state of a cell, from the gates of its input and of its state."""
    if kind == "LSTM":
        i, f, g, o = (x + h).chunk(4, 1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if kind == "GRU":
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3, 1), h.chunk(3, 1)
        z = (xz + hz).sigmoid()
        return ((1 - z) * (xn + (xr + hr).sigmoid() * hn).tanh() + z * state[0],)
    return ((x + h).tanh() if kind == "tanh" else (x + h).relu(),)


def replayed(kind, layer, X):
    """For each weight its inputs ``[n s i]`` and, step by step, its products; and the last outputs."""
    found, outputs = {}, list(X.unbind(1))
    for number in range(layer.num_layers):
        both = []
        for suffix in (f"l{number}", f"l{number}_reverse")[: 1 + layer.bidirectional]:
            w_ih, w_hh, b_ih, b_hh = (
                getattr(layer, f"{n}_{suffix}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            state = (X.new_zeros(len(X), layer.hidden_size),) * 2
            inputs, states, gates, products, own = [], [], [], [], []
            for x in reversed(outputs) if suffix.endswith("reverse") else outputs:
                inputs.append(x)
                states.append(state[0])
                gates.append(x @ w_ih.T + b_ih)
                products.append(state[0] @ w_hh.T + b_hh)
                state = next_state(kind, gates[-1], products[-1], state)
                own.append(state[0])
            found[w_ih, b_ih] = torch.stack(inputs, 1).detach(), gates
            found[w_hh, b_hh] = torch.stack(states, 1).detach(), products
            both.append(own[::-1] if suffix.endswith("reverse") else own)
        outputs = [torch.cat(steps, 1) for steps in zip(*both, strict=True)]
    return found, outputs[-1]


def columns_at(out, hessian_root, tensors):
    """Root columns pulled back by autograd: ``[columns, n, s, o]``."""
    pulled = [
        torch.autograd.grad(out, tensors, column, retain_graph=True, materialize_grads=True, allow_unused=True)
        for column in hessian_root
    ]
    return torch.stack([torch.stack(grads, 1) for grads in pulled])


def expected(g, x, approx):
    """``[B, A]`` from cotangents ``[v n s o]`` and inputs ``[n s i]``."""
    n, s, _ = x.shape
    B = torch.einsum("vnso,vnsp->op", g, g) if approx == "expand" else torch.einsum("vnso,vntp->op", g, g)
    x = x.mean(1, keepdim=True) if approx == "reduce" else x
    return B, torch.einsum("nsi,nsj->ij", x, x) / n / (s if approx == "expand" else 1)


RECURRENT = {
    "LSTM": lambda **options: nn.LSTM(3, 2, batch_first=True, **options),
    "GRU": lambda **options: nn.GRU(3, 2, batch_first=True, **options),
    "tanh": lambda **options: nn.RNN(3, 2, batch_first=True, **options),
    "relu": lambda **options: nn.RNN(3, 2, batch_first=True, nonlinearity="relu", **options),
}


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("approx", [None, "expand", "reduce"])
@pytest.mark.parametrize("kind", RECURRENT)
def test_time_steps_of_a_recurrent_layer_are_positions(kind, approx, options):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = RECURRENT[kind](**options)

        def forward(self, x):
            return self.layer(x)[0][:, -1]

    torch.manual_seed(0)
    model, X = Last().double(), values(3, 4, 3)
    size = 4 if options else 2
    maps, out = replayed(kind, model.layer, X)
    assert close(out, model(X))
    y, root = values(3, size), (2 / out.numel()) ** 0.5 * torch.eye(out.numel(), dtype=out.dtype)
    cotangents = {pair: columns_at(out, root.reshape(-1, 3, size), steps) for pair, (_, steps) in maps.items()}
    differentiate(model, nn.MSELoss(), X, y, KFLR(approx=approx))
    for (weight, bias), (inputs, _) in maps.items():
        g = cotangents[weight, bias]
        for found, truth in zip(weight.kflr, expected(g, inputs, approx), strict=True):
            assert close(found, truth, rtol=1e-9)
        assert close(bias.kflr[0], torch.einsum("vnso,vntp->op", g, g), rtol=1e-9)


@pytest.mark.parametrize("approx", [None, "expand", "reduce"])
@pytest.mark.parametrize("cross", [False, True])
def test_factors_of_attention_are_their_defining_sums(cross, approx):
    """Of the three projections in one; in cross attention, queries and the others have inputs of their own."""

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            other = x.sin() if cross else x
            return self.layer(x, other, other, need_weights=False)[0]

    model, X, y = Attending().double(), values(3, 5, 4), values(3, 5, 4)
    layer, other = model.layer, X.sin() if cross else X
    nn.init.normal_(layer.in_proj_bias)
    q, k, v = (
        x @ w.T + b
        for x, w, b in zip((X, other, other), layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True)
    )
    heads = [t.unflatten(2, (2, 2)).transpose(1, 2) for t in (q, k, v)]
    mixed = (heads[0] @ heads[1].transpose(2, 3) / 2**0.5).softmax(3) @ heads[2]
    mixed = mixed.transpose(1, 2).flatten(2)
    out = mixed @ layer.out_proj.weight.T + layer.out_proj.bias
    assert close(model(X), out)
    root = (2 / 60) ** 0.5 * torch.eye(60, dtype=torch.float64).reshape(60, 3, 5, 4)
    parts = [
        torch.stack([torch.autograd.grad(out, t, column, retain_graph=True)[0] for column in root]) for t in (q, k, v)
    ]
    differentiate(model, nn.MSELoss(), X, y, KFLR(approx=approx))
    B, A = expected(torch.cat(parts, 3), X, approx)
    if cross:
        first, own = expected(parts[0], X, approx)
        second, others = expected(torch.cat(parts[1:], 3), other, approx)
        B, A = torch.block_diag(first, second), (own + 2 * others) / 3
    assert close(layer.in_proj_weight.kflr[0], B, rtol=1e-9)
    assert close(layer.in_proj_weight.kflr[1], A, rtol=1e-9)
    for found, truth in zip(layer.out_proj.weight.kflr, expected(root, mixed.detach(), approx), strict=True):
        assert close(found, truth, rtol=1e-9)


@pytest.mark.parametrize("layer", [nn.LayerNorm(4), nn.LayerNorm((5, 4)), nn.PReLU(), nn.PReLU(5), nn.GroupNorm(1, 5)])
def test_factors_of_elementwise_weights_are_the_exact_block(layer):
    model, X, y = nn.Sequential(layer, nn.Linear(4, 2), nn.Tanh()).double(), values(3, 5, 4), values(3, 5, 2)
    ggn = ggn_blocks(model, X, nn.MSELoss(), y)
    differentiate(model, nn.MSELoss(), X, y, KFLR(), KFAC(fisher="exact", approx="expand"))
    for parameter in layer.parameters():
        truth = ggn[parameter]
        assert close(parameter.kflr[0], truth, rtol=1e-9) and close(parameter.kfac[0], truth, rtol=1e-9)


@pytest.mark.parametrize("arguments", [{"approx": "sum"}, {"fisher": "sampled"}, {"mc_samples": 0}])
def test_what_is_no_choice_is_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        KFAC(**arguments)


class FirstPosition(nn.Module):
    """Reads the first position of each sample, in one of several ways."""

    def __init__(self, read):
        super().__init__()
        self.read, self.layer, self.head = read, nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x):
        return self.head(self.read(self.layer(x).tanh()))


@pytest.mark.parametrize(
    "read",
    [
        lambda h: h[:, 0],
        lambda h: h[torch.arange(h.shape[1]).expand(len(h), -1) == 0],
        lambda h: h[torch.arange(len(h)), 0],
        lambda h: h.flatten(0, 1).index_select(0, torch.arange(len(h)) * h.shape[1]),
        lambda h: h.gather(1, torch.zeros(len(h), 1, h.shape[2], dtype=torch.int64))[:, 0],
    ],
    ids=["slice", "mask", "indices", "index_select", "gather"],
)
def test_input_factors_count_positions_that_nothing_reads_whatever_the_way(read):
    torch.manual_seed(0)
    model, x = extend(FirstPosition(read)), torch.randn(5, 4, 3, dtype=torch.float64)
    with backpack(KFLR()):
        extend(nn.MSELoss())(model(x), torch.randn(5, 2, dtype=torch.float64)).backward()
    rows = x.flatten(0, 1)
    torch.testing.assert_close(model.layer.weight.kflr[1], rows.T @ rows / 5)
