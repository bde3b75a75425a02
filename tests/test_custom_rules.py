"""Rules that users write, and what they and hooks can read of the forward pass."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from models.small import Scale
from torch import nn
from truths import close
from truths.autograd import individual_gradients

from backpack import backpack, disable, extend, extensions, memory_cleanup
from backpack.extensions import BatchGrad, BatchL2Grad, DiagGGNExact, DiagGGNMC, SqrtGGNExact
from backpack.extensions.backprop_extension import BUILT_IN, BackpropExtension
from backpack.extensions.firstorder.base import FirstOrderBackpropExtension, FirstOrderModuleExtension
from backpack.extensions.module_extension import ModuleExtension
from backpack.extensions.secondorder.base import SecondOrderBackpropExtension
from backpack.modules.module_io import RULED

LABELS = torch.tensor([0, 1, 1, 0])


@pytest.fixture(autouse=True)
def without_rules():
    """What is kept of modules with rules does not depend on which tests ran before."""
    before = list(RULED)
    RULED.clear()
    yield
    RULED.update(before)


class SameForward(Scale):
    pass


class OtherForward(Scale):
    def forward(self, x):
        return super().forward(x.sin())


class ScaleBatchGrad(FirstOrderModuleExtension):
    def __init__(self):
        super().__init__(params=["weight"])
        self.calls = []

    def weight(self, ext, module, g_inp, g_out, bpQuantities):
        assert bpQuantities is None
        self.calls.append((module.input0, module.output, g_inp[0], g_out))
        return (g_out[0] * module.input0)[ext.get_subsampling() or slice(None)]


class ScaleGGN(ModuleExtension):
    def __init__(self):
        super().__init__(params=["weight"])

    def backpropagate(self, *arguments):
        raise AssertionError("autograd propagates")

    def weight(self, ext, module, g_inp, g_out, bpQuantities):
        self.calls = [(bpQuantities, g_out[0], g_inp[0])]
        rows = ext.get_subsampling()
        x = module.input0 if rows is None else module.input0[rows]
        root = torch.einsum("vnd,nd->vnd", bpQuantities, x)
        return root if isinstance(ext, SqrtGGNExact) else root.square().sum((0, 1))


def net(cls=Scale):
    return extend(nn.Sequential(nn.Linear(4, 3), cls(), nn.ReLU(), nn.Linear(3, 2)).double())


def run(model, *exts, **options):
    X = torch.arange(16, dtype=torch.float64).reshape(4, 4).sin()
    lossfunc = extend(nn.CrossEntropyLoss())
    with backpack(*exts, **options):
        lossfunc(model(X), LABELS).backward()
    return model[1].weight


def rows(model):
    X = torch.arange(16, dtype=torch.float64).reshape(4, 4).sin()
    terms = nn.CrossEntropyLoss(reduction="none")(model(X), LABELS) / 4
    return individual_gradients(terms, [model[1].weight])[0]


@pytest.mark.parametrize("cls", [Scale, SameForward])
@pytest.mark.parametrize("subsampling", [None, [2, 0]])
def test_a_rule_replaces_what_the_extension_computes(cls, subsampling):
    model, extension, rule = net(cls), BatchGrad(subsampling=subsampling), ScaleBatchGrad()
    extension.set_module_extension(Scale, rule)
    found = run(model, extension, BatchL2Grad())
    truth = rows(model)
    assert close(found.grad_batch, truth[subsampling or slice(None)])
    assert close(found.batch_l2, truth.square().sum(1))  # the rule is that of one extension
    assert model[0].weight.grad_batch.shape == (2 if subsampling else 4, 3, 4)
    ((x, out, g_inp, (g_out,)),) = rule.calls
    assert close(out, x * found) and close(g_inp, g_out * found)


def test_a_rule_does_not_hold_for_another_forward():
    model, extension, rule = net(OtherForward), BatchGrad(), ScaleBatchGrad()
    extension.set_module_extension(Scale, rule)
    assert close(run(model, extension).grad_batch, rows(model)) and not rule.calls


@pytest.mark.parametrize("subsampling", [None, [2, 0]])
@pytest.mark.parametrize("name", ["DiagGGNExact", "SqrtGGNExact"])
def test_a_rule_of_second_order_gets_the_columns_at_the_output(name, subsampling):
    model, rule = net(), ScaleGGN()
    extension = getattr(extensions, name)(subsampling=subsampling)
    built_in = getattr(run(model, extension), extension.savefield)
    extension.set_module_extension(Scale, rule)
    for options in ({}, {"extension_hook": lambda module: None}):
        assert close(getattr(run(model, BatchGrad(), extension, **options), extension.savefield), built_in)
    columns, g_out, g_inp = rule.calls[0]
    assert columns.shape[1:] == (2 if subsampling else 4, 3)
    assert close(g_out, rule.calls[0][1]) and close(g_inp, g_out * model[1].weight)
    assert model[3].weight.grad_batch.shape == (4, 2, 3)


def test_columns_that_come_one_by_one_reach_a_rule_together():
    model, rule, extension = net(), ScaleGGN(), DiagGGNMC(mc_samples=5)
    extension.chunk_size = 2
    extension.set_module_extension(Scale, rule)
    run(model, extension)
    assert rule.calls[0][0].shape == (5, 4, 3)


def test_a_rule_sees_what_is_differentiable():
    model, extension = net(), BatchGrad()
    extension.set_module_extension(Scale, ScaleBatchGrad())
    X = torch.rand(4, 4, dtype=torch.float64)
    with backpack(extension):
        torch.autograd.grad(model(X).square().sum(), list(model.parameters()), create_graph=True)
    (found,) = torch.autograd.grad(model[1].weight.grad_batch.square().sum(), model[0].weight)
    (rows,) = individual_gradients(model(X).square().sum(1), [model[1].weight], create_graph=True)
    (truth,) = torch.autograd.grad(rows.square().sum(), model[0].weight)
    assert close(found, truth)


class Norm(FirstOrderModuleExtension):
    def __init__(self):
        super().__init__(params=["weight", "bias"])

    def weight(self, ext, module, g_inp, g_out, bpQuantities):
        return g_out[0].abs().sum()

    def bias(self, ext, module, g_inp, g_out, bpQuantities):
        return g_out[0].sum(0)


def test_an_extension_may_be_made_of_rules():
    class Mine(BackpropExtension):
        def __init__(self, fail_mode):
            super().__init__("mine", {nn.Linear: Norm()}, fail_mode=fail_mode)

    model = net()
    with pytest.raises(NotImplementedError, match="no rule for the module of parameter 1.weight"):
        run(model, Mine("ERROR"))
    with pytest.warns(UserWarning, match="parameter 1.weight"):
        run(model, Mine("WARNING"))
    memory_cleanup(model)
    model.zero_grad()
    assert not hasattr(model[0].bias, "mine")
    assert not hasattr(run(model, Mine("SILENT"), BatchGrad()), "mine")
    assert close(model[0].bias.mine, model[0].bias.grad) and model[3].weight.mine.dim() == 0
    with pytest.warns(UserWarning, match="parameter 1.weight"):
        run(model, FirstOrderBackpropExtension("first", {nn.Linear: Norm()}))


class Frobenius(ModuleExtension):
    def __init__(self):
        super().__init__(["weight", "bias"])

    def weight(self, ext, module, g_inp, g_out, bpQuantities):
        return torch.einsum("vno,ni->vnoi", bpQuantities, module.input0).square().sum((0, 1))

    def bias(self, ext, module, g_inp, g_out, bpQuantities):
        return bpQuantities.square().sum((0, 1))


def test_an_extension_of_second_order_may_be_made_of_rules():
    model = net()
    run(model, SecondOrderBackpropExtension("ours", {nn.Linear: Frobenius(), Scale: ScaleGGN2()}), DiagGGNExact())
    assert all(close(p.ours, p.diag_ggn_exact) for p in model.parameters())
    with pytest.warns(UserWarning, match="backpropagate is not called"):
        SecondOrderBackpropExtension("ours", {Scale: ScaleGGN()})


class ScaleGGN2(ModuleExtension):
    def __init__(self):
        super().__init__(["weight"])

    def weight(self, ext, module, g_inp, g_out, bpQuantities):
        return (bpQuantities * module.input0).square().sum((0, 1))


def test_a_rule_stands_in_for_a_layer_that_mixes_samples():
    class Means(FirstOrderModuleExtension):
        def __init__(self):
            super().__init__(["weight"])

        def weight(self, ext, module, g_inp, g_out, bpQuantities):
            return "by rule"

    model, extension = net(lambda: nn.BatchNorm1d(3)), BatchGrad()
    model[1].bias.requires_grad_(False)
    model[0].requires_grad_(False)  # its gradients are mixed by what comes behind
    extension.set_module_extension(nn.BatchNorm1d, Means(), overwrite=True)
    assert run(model, extension).grad_batch == "by rule"


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).sum(0)


def test_a_rule_makes_up_for_a_custom_function_that_hides_its_parameter():
    class Hidden(Scale):
        def forward(self, x):
            return Opaque.apply(x, self.weight)

    extension = BatchGrad()
    extension.set_module_extension(Hidden, ScaleBatchGrad())
    model = net(Hidden)
    found = run(model, extension)
    assert close(found.grad_batch, rows(model))


def test_rules_that_cannot_hold_are_refused():
    extension = BatchGrad()
    extension.set_module_extension(Scale, ScaleBatchGrad())
    with pytest.raises(ValueError, match="overwrite=True"):
        extension.set_module_extension(Scale, ScaleBatchGrad())
    extension.set_module_extension(Scale, ScaleBatchGrad(), overwrite=True)
    for built_in in BUILT_IN:
        with pytest.raises(ValueError, match=f"{built_in.__name__} .*its own.*overwrite=True"):
            extension.set_module_extension(built_in, FirstOrderModuleExtension())
        for other in (FirstOrderBackpropExtension("mine", {}), SecondOrderBackpropExtension("mine", {})):
            other.set_module_extension(built_in, FirstOrderModuleExtension())  # made of rules alone
    assert not extension.rules.keys() & set(BUILT_IN)
    with pytest.raises(TypeError, match="class of modules"):
        extension.set_module_extension(Scale(), ScaleBatchGrad())
    with pytest.raises(TypeError, match="instance of ModuleExtension"):
        extension.set_module_extension(Scale, ScaleBatchGrad, overwrite=True)
    with pytest.raises(NotImplementedError, match="no rule for the parameter scale"):
        ModuleExtension(params=["scale"])
    with pytest.raises(ValueError, match="fail_mode"):
        BackpropExtension("mine", {}, fail_mode="LOUD")
    with pytest.raises(ValueError, match="savefield"):
        BackpropExtension()

    class Expecting(BackpropExtension):
        def expects_backpropagation_quantities(self):
            return True

    with pytest.raises(TypeError, match="SecondOrderBackpropExtension"):
        Expecting("mine", {})


def test_calls_and_shared_parameters_that_a_rule_cannot_join_are_refused():
    extension = BatchGrad()
    extension.set_module_extension(Scale, ScaleBatchGrad())
    twice = net()
    twice[2] = twice[1]
    with pytest.raises(RuntimeError, match="called several times"):
        run(twice, extension)
    shared = net()
    shared[2] = extend(Scale())
    shared[2].weight = shared[1].weight
    with pytest.raises(RuntimeError, match="belongs to several modules"):
        run(shared, extension)
    assert close(run(model := net(), BatchGrad()).grad_batch, rows(model))


# What can be read


def readable(module):
    return sorted(name for name in vars(module) if name.startswith(("input", "output")))


class Leaf(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3).double()
        self.register_buffer("output", torch.ones(3))

    def forward(self, x, *, scale):
        return self.linear(x) * scale


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("retain_graph", [False, True])
def test_inputs_and_outputs_are_there_while_a_hook_runs(inside, retain_graph):
    model, X = extend(nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)).double()), torch.rand(4, 4).double()
    lossfunc, seen = extend(nn.CrossEntropyLoss()), {}

    def hook(module):
        seen[module] = (module.input0 if inside or module is not model[1] else None, module.output if inside else None)

    options = {"extension_hook": hook, "retain_graph": retain_graph}
    loss = None if inside else lossfunc(model(X), LABELS)
    assert not any(readable(module) for module in model)
    with backpack(BatchGrad(), **options):
        (lossfunc(model(X), LABELS) if inside else loss).backward(retain_graph=retain_graph)
    assert readable(model[2]) == (["input0", "output"] if retain_graph else [])
    assert ("input0" in readable(model[0])) == retain_graph
    hidden, output = model[:2](X), model(X)
    assert seen[model[0]][0] is X and close(seen[model[2]][0], hidden)
    assert not inside or (close(seen[model[1]][1], hidden) and close(seen[model[2]][1], output))
    with disable():
        model(X)
    assert not any(readable(module) for module in model)


def test_what_was_freed_is_said():
    model, lossfunc = extend(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()), nn.CrossEntropyLoss()
    for inplace in (False, True):
        model[1].inplace = inplace
        loss = lossfunc(model(torch.rand(4, 4).double()), LABELS)
        block = backpack(BatchGrad(), extension_hook=lambda module: module.output)
        with pytest.raises(AttributeError, match="autograd does not need it"), block:
            loss.backward()


def test_names_that_a_module_has_of_its_own_stay_its_own():
    class Own(Scale):
        def __init__(self):
            super().__init__()
            self.register_buffer("output", torch.ones(3))
            self.input0 = "mine"

    model, seen = net(Own), []
    run(model, BatchGrad(), extension_hook=lambda module: seen.append((module.input0, module.output)))
    own = [pair for pair in seen if pair[0] == "mine"]
    assert len(own) == 1 and own[0][1] is model[1].output and readable(model[1]) == ["input0"]


def test_keeping_for_a_rule_leaves_no_cycle_and_no_tensor_behind():
    extension = BatchGrad()
    for rule in (nn.Linear, nn.Identity, nn.ReLU):
        extension.set_module_extension(rule, FirstOrderModuleExtension(), overwrite=True)
    model = extend(nn.Sequential(nn.Linear(3, 3), nn.Identity(), nn.ReLU(), nn.LSTM(3, 2, batch_first=True)))
    gc.collect()
    gc.disable()
    try:
        for backward in (False, True):
            out = model(torch.rand(4, 3, requires_grad=True)[:, None].expand(4, 2, 3))[0]
            hook = type("Hook", (), {"__call__": lambda self, grad: None})()
            out.register_hook(hook)
            alive = weakref.ref(hook)
            del hook
            with backpack(BatchL2Grad()) if backward else nullcontext():
                out.sum().backward() if backward else None
            del out
            assert alive() is None
    finally:
        gc.enable()
