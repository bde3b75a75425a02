"""Scripts as users of the original write them, one for each of its documented features."""

import torch
from torch import nn
from truths import close
from truths.autograd import individual_gradients
from truths.second_order import explicit

from backpack import backpack, extend, extensions
from backpack.core.derivatives.convnd import weight_jac_t_save_memory
from backpack.custom_module.branching import Parallel, SumModule
from backpack.custom_module.reduce_tuple import ReduceTuple
from backpack.hessianfree.ggnvp import ggn_vector_product
from backpack.hessianfree.hvp import hessian_vector_product
from backpack.utils.convert_parameters import vector_to_parameter_list

DTYPE = torch.float64
X, Y = torch.randn(6, 4, dtype=DTYPE), torch.tensor([0, 1, 2, 0, 1, 2])


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)).to(DTYPE)


def gradients(model, lossfunc, x, y):
    """Of the loss of single samples, by autograd alone, ``[N, *p]``."""
    terms = (lossfunc(model(x[n : n + 1]), y[n : n + 1]) for n in range(len(x)))
    return individual_gradients(terms, model.parameters())


def ggn(model, x, y, lossfunc):
    """The whole matrix, from explicit Jacobians."""
    return explicit(model, x, lossfunc, y, len(x))[1]


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def test_residual_net_of_the_custom_modules():
    block = Parallel(nn.Identity(), nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), merge_module=SumModule())
    model = extend(nn.Sequential(block, nn.Linear(4, 3)).to(DTYPE), use_converter=True)
    lossfunc = extend(nn.CrossEntropyLoss())
    with backpack(extensions.DiagGGNExact()):
        lossfunc(model(X), Y).backward()
    assert close(flat(p.diag_ggn_exact for p in model.parameters()), ggn(model, X, Y, lossfunc).diag())


def test_recurrent_net_whose_output_is_taken_from_a_tuple():
    net = nn.Sequential(nn.LSTM(2, 3, batch_first=True), ReduceTuple(index=0), nn.Flatten(), nn.Linear(6, 3))
    model, lossfunc = extend(net.to(DTYPE)), extend(nn.CrossEntropyLoss())
    sequences = X.reshape(6, 2, 2)
    with backpack(extensions.BatchGrad(), extensions.DiagGGNExact()):
        lossfunc(model(sequences), Y).backward()
    for parameter, truth in zip(model.parameters(), gradients(model, lossfunc, sequences, Y), strict=True):
        assert close(parameter.grad_batch, truth / 6)
    assert close(flat(p.diag_ggn_exact for p in model.parameters()), ggn(model, sequences, Y, lossfunc).diag())


def test_clipped_step_of_differentially_private_training():
    model, lossfunc, bound = extend(mlp()), extend(nn.CrossEntropyLoss(reduction="sum")), 0.5
    with backpack(extensions.BatchGrad(), extensions.BatchL2Grad()):
        lossfunc(model(X), Y).backward()
    norms = torch.stack([p.batch_l2 for p in model.parameters()]).sum(0).sqrt()
    scale = (bound / norms).clamp(max=1)
    found = [torch.einsum("n,n...->...", scale, p.grad_batch) for p in model.parameters()]
    samples = gradients(model, lossfunc, X, Y)
    lengths = torch.stack([g.flatten(1).square().sum(1) for g in samples]).sum(0).sqrt()
    for step, g in zip(found, samples, strict=True):
        assert close(step, torch.einsum("n,n...->...", (bound / lengths).clamp(max=1), g))


def test_optimizer_that_divides_by_the_diagonal_ggn():
    class DiagGGNOptimizer(torch.optim.Optimizer):
        def __init__(self, parameters, step_size, damping):
            super().__init__(parameters, {"step_size": step_size, "damping": damping})

        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    direction = p.grad / (p.diag_ggn_mc + group["damping"])
                    p.data.add_(direction, alpha=-group["step_size"])

    model, lossfunc = extend(mlp()), extend(nn.CrossEntropyLoss())
    optimizer = DiagGGNOptimizer(model.parameters(), step_size=0.1, damping=1.0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = lossfunc(model(X), Y)
        with backpack(extensions.DiagGGNMC(mc_samples=2)):
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_newton_step_by_conjugate_gradients():
    model, lossfunc, damping = mlp(), nn.CrossEntropyLoss(), 0.1
    parameters, out = list(model.parameters()), model(X)
    loss = lossfunc(out, Y)
    right = -flat(torch.autograd.grad(loss, parameters, retain_graph=True))
    step, residual = torch.zeros_like(right), right.clone()
    direction = residual.clone()
    for _ in range(2 * len(right)):
        if residual.norm() < 1e-13:
            break
        product = ggn_vector_product(loss, out, model, vector_to_parameter_list(direction, parameters))
        curved = flat(product) + damping * direction
        length = residual @ residual / (direction @ curved)
        step, before = step + length * direction, residual @ residual
        residual = residual - length * curved
        direction = residual + residual @ residual / before * direction
    matrix = ggn(model, X, Y, lossfunc)
    assert close(step, torch.linalg.solve(matrix + damping * torch.eye(len(right), dtype=DTYPE), right), rtol=1e-8)


def test_trace_of_the_hessian_by_products_with_unit_vectors():
    """The average that Hutchinson's estimate has: over a basis, it is exact."""
    model, lossfunc = extend(mlp()), extend(nn.CrossEntropyLoss())
    parameters = list(model.parameters())
    loss = lossfunc(model(X), Y)
    with backpack(extensions.HMP(), extensions.DiagHessian()):
        loss.backward(retain_graph=True)
    for p in parameters:
        units = torch.eye(p.numel(), dtype=DTYPE).reshape(p.numel(), *p.shape)
        assert close((p.hmp(units) * units).sum(), p.diag_h.sum(), 1e-3)
    units = torch.eye(sum(p.numel() for p in parameters), dtype=DTYPE)
    products = [flat(hessian_vector_product(loss, parameters, vector_to_parameter_list(u, parameters))) for u in units]
    assert close((torch.stack(products) * units).sum(), sum(p.diag_h.sum() for p in parameters), 1e-3)


def test_gradient_of_the_variance():
    model, lossfunc = extend(mlp()), extend(nn.CrossEntropyLoss(reduction="sum"))
    loss = lossfunc(model(X), Y)
    with backpack(extensions.Variance()):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    total = sum(p.variance.sum() for p in model.parameters())
    found = torch.autograd.grad(total, list(model.parameters()))

    def variance(*weights):
        names = [name for name, _ in model.named_parameters()]
        rows = []
        for n in range(len(X)):
            out = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (X[n : n + 1],))
            rows.append(torch.autograd.grad(lossfunc(out, Y[n : n + 1]), weights, create_graph=True))
        stacked = [torch.stack(g) for g in zip(*rows, strict=True)]
        return sum((g.square().mean(0) - g.mean(0).square()).sum() for g in stacked)

    parameters = list(model.parameters())
    truth = torch.autograd.grad(variance(*parameters), parameters)
    assert all(close(f, t, 1e-3) for f, t in zip(found, truth, strict=True))


def test_hook_that_keeps_the_norms_and_frees_the_gradients():
    model, lossfunc, norms = extend(mlp()), extend(nn.CrossEntropyLoss()), {}

    def hook(module):
        for p in module.parameters():
            norms[p] = p.grad_batch.flatten(1).square().sum(1)
            del p.grad_batch

    with backpack(extensions.BatchGrad(), extension_hook=hook):
        lossfunc(model(X), Y).backward()
    for p, g in zip(model.parameters(), gradients(model, lossfunc, X, Y), strict=True):
        assert close(norms[p], (g / 6).flatten(1).square().sum(1)) and not hasattr(p, "grad_batch")


def test_switch_that_saves_memory_in_convolutions():
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 3)).to(DTYPE)
    model, lossfunc, images = extend(net), extend(nn.CrossEntropyLoss()), X.reshape(6, 1, 2, 2)
    for save in (True, False):
        with backpack(extensions.BatchGrad()), weight_jac_t_save_memory(save_memory=save):
            lossfunc(model(images), Y).backward()
        for p, g in zip(model.parameters(), gradients(model, lossfunc, images, Y), strict=True):
            assert close(p.grad_batch, g / 6)
