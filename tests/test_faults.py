"""An exception anywhere leaves all as it was: no hook or attribute stays, and the next pass is right."""

import gc
import inspect
import sys
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from models.small import Scale
from torch import nn
from torch.nn.utils import parametrizations
from truths import close

import backpack as package
from backpack import backpack, extend, unextend
from backpack.extensions import BatchGrad, BatchL2Grad, ClippedGrad, DiagGGNExact, DiagGGNMC, SqrtGGNExact
from backpack.extensions.firstorder.base import FirstOrderModuleExtension
from backpack.modules.thread_state import HERE

ROOT = str(Path(package.__file__).parent)
X = torch.arange(16, dtype=torch.float64).reshape(4, 4).sin()
Y = torch.tensor([0, 1, 1, 0])


class ScaleBatchGrad(FirstOrderModuleExtension):
    def __init__(self):
        super().__init__(params=["weight"])

    def weight(self, ext, module, g_inp, g_out, bpQuantities):
        assert g_inp[0].shape == module.output.shape
        return g_out[0] * module.input0


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.out = nn.GRU(3, 3, batch_first=True), parametrizations.weight_norm(nn.Linear(3, 2))

    def forward(self, x):
        return self.out(self.gru(x[:, None].expand(-1, 2, -1))[0][:, -1])


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), Scale(), Last()).double()
    return model, nn.CrossEntropyLoss()


def step(model, lossfunc, hook=None):
    """Forward and backward pass with much of what there is."""
    ruled = BatchGrad()
    ruled.set_module_extension(Scale, ScaleBatchGrad())
    extensions = [
        ruled,
        ClippedGrad(1e-2),
        DiagGGNExact(),
        SqrtGGNExact(subsampling=[2, 0]),
        DiagGGNMC(subsampling=[1]),
    ]
    model.zero_grad()
    with backpack(*extensions, extension_hook=hook or (lambda module: None)):
        lossfunc(model(X), Y).backward()


FIELDS = ["grad", "grad_batch", "grad_clipped", "diag_ggn_exact", "sqrt_ggn_exact"]


def results(model):
    return {(name, f): getattr(p, f).clone() for name, p in model.named_parameters() for f in FIELDS}


def attributes(model):
    def hooks(module):
        return len(module._forward_hooks), len(module._forward_pre_hooks)

    return [(name, sorted(vars(module)), hooks(module)) for name, module in model.named_modules()]


def as_before(model, lossfunc, before):
    """All is as it was before a fault, and both orders are what they were."""
    assert not HERE.blocks and not HERE.muted and HERE.inner is None and HERE.disabled == 0
    assert attributes(model) == before[0]
    for parameter in model.parameters():
        vars(parameter).clear()
        parameter.grad = None
    step(model, lossfunc)
    assert HERE.root is None and HERE.depth == 0 and HERE.frame is None and HERE.random is None
    found = results(model)
    assert all(close(found[key], value) for key, value in before[1].items())
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.fixture
def calm():
    model, lossfunc = build()
    plain = torch.autograd.grad(lossfunc(model(X), Y), list(model.parameters()))
    rows = [torch.autograd.grad(lossfunc(model(x[None]), y[None]) / 4, list(model.parameters())) for x, y in pairs()]
    extend(model), extend(lossfunc)
    step(model, lossfunc)
    for k, p in enumerate(model.parameters()):
        assert torch.equal(p.grad, plain[k]) and close(p.grad_batch, torch.stack([row[k] for row in rows]))
    return model, lossfunc, (attributes(model), results(model))


def pairs():
    return zip(X, Y, strict=True)


class Fault:
    """Raises an error when the ``number``-th function of the package is entered."""

    def __init__(self, number, error):
        self.left, self.error, self.place = number, error, None

    def __call__(self, frame, event, argument):
        code = frame.f_code
        # Code that cleans up is let through: no Python program survives an interrupt in all of it.
        generator = code.co_flags & inspect.CO_GENERATOR and frame.f_lasti > 0
        cleaning = generator or any(f.f_code.co_name in ("__exit__", "detach") for f in (frame, frame.f_back))
        if event == "call" and code.co_filename.startswith(ROOT) and not cleaning:
            self.left -= 1
            if self.left == 0:
                self.place = f"{code.co_filename}:{code.co_name}"
                raise self.error
        return None

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *exception):
        sys.settrace(None)


def calls(model, lossfunc):
    counter = Fault(0, None)
    with counter:
        step(model, lossfunc)
    return -counter.left


ERRORS = [KeyboardInterrupt, MemoryError, ZeroDivisionError, AttributeError]


@pytest.mark.parametrize("start", range(2))
def test_a_fault_in_any_function_of_the_package_leaves_all_as_it_was(calm, start):
    model, lossfunc, before = calm
    number, places = calls(model, lossfunc), set()
    assert number > 500
    for k in range(1 + 53 * start, number, 107):
        error = ERRORS[k % 4]
        with Fault(k, error("injected")) as fault, pytest.raises(error):
            step(model, lossfunc)
        places.add(fault.place)
        try:
            as_before(model, lossfunc, before)
        except BaseException as problem:
            raise AssertionError(f"after {error.__name__} in call {k}, {fault.place}") from problem
    assert len(places) > 5
    unextend(model)
    assert all(hooks == (0, 0) for _, _, hooks in attributes(model))
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.slow
def test_a_fault_at_every_call_leaves_all_as_it_was(calm):
    model, lossfunc, before = calm
    for k in range(1, calls(model, lossfunc)):
        error = ERRORS[k % 4]
        with Fault(k, error("injected")) as fault, pytest.raises(error):
            step(model, lossfunc)
        try:
            as_before(model, lossfunc, before)
        except BaseException as problem:
            raise AssertionError(f"after {error.__name__} in call {k}, {fault.place}") from problem


@pytest.mark.parametrize("error", ERRORS)
def test_a_fault_in_what_users_write_leaves_all_as_it_was(calm, error):
    model, lossfunc, before = calm

    class Broken(BatchL2Grad):
        def compute(self, grads):
            raise error("injected")

    class BrokenRule(FirstOrderModuleExtension):
        def __init__(self):
            super().__init__(["weight"])

        def weight(self, *arguments):
            raise error("injected")

    class BrokenLoss(nn.CrossEntropyLoss):
        def forward(self, input, target):
            if self.training:
                return super().forward(input, target)
            raise error("injected")

    class NoHessian(nn.Module):
        def forward(self, input, target):
            return Once.apply(input).sum()

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            if torch.is_grad_enabled():
                raise error("injected")
            return grad

    ruled = BatchGrad()
    ruled.set_module_extension(Scale, BrokenRule())

    def tensor_hook(grad):
        raise error("injected")

    def with_tensor_hook():
        out = model(X)
        out.register_hook(tensor_hook)
        lossfunc(out, Y).backward()

    attempts = [
        ([Broken()], lambda: lossfunc(model(X), Y).backward()),
        ([ruled], lambda: lossfunc(model(X), Y).backward()),
        ([BatchGrad()], lambda: extend(BrokenLoss()).eval()(model(X), Y).backward()),
        ([DiagGGNExact()], lambda: extend(NoHessian())(model(X), Y).backward()),
        ([BatchGrad(), DiagGGNExact()], with_tensor_hook),
    ]
    for extensions, attempt in attempts:
        with pytest.raises(error, match="injected"), backpack(*extensions):
            attempt()
        as_before(model, lossfunc, before)


@pytest.mark.parametrize("error", ERRORS)
def test_a_graph_that_outlives_a_fault_is_as_it_was(calm, error):
    """Nothing of ours stays at its nodes."""
    model, lossfunc, (_, expected) = calm

    class Broken(BatchGrad):
        def compute(self, grads):
            raise error("injected")

    def anew():
        for parameter in model.parameters():
            vars(parameter).clear()
            parameter.grad = None

    loss = lossfunc(model(X), Y)
    with pytest.raises(error, match="injected"), backpack(Broken(), DiagGGNExact()):
        loss.backward(retain_graph=True)
    anew()
    loss.backward(retain_graph=True)
    assert all(torch.equal(p.grad, expected[name, "grad"]) for name, p in model.named_parameters())
    assert not any(vars(p).keys() & set(FIELDS[1:]) for p in model.parameters())
    anew()
    with backpack(BatchGrad(), DiagGGNExact()):
        loss.backward()
    for field in ("grad", "grad_batch", "diag_ggn_exact"):
        assert all(close(getattr(p, field), expected[name, field]) for name, p in model.named_parameters())


@pytest.mark.parametrize("k", range(7))
def test_a_fault_in_any_call_of_the_extension_hook_leaves_all_as_it_was(calm, k):
    model, lossfunc, before = calm
    left = [k]

    def hook(module):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step(model, lossfunc, hook)
    as_before(model, lossfunc, before)


@pytest.mark.parametrize("place", ["__enter__", "__exit__"])
def test_an_interrupt_between_a_block_and_its_end_leaves_all_as_it_was(calm, place):
    model, lossfunc, before = calm
    code = getattr(backpack, place).__code__

    def interrupt(frame, event, argument):
        if frame.f_code is code:
            if (place, event) in (("__exit__", "call"), ("__enter__", "return")):
                sys.settrace(None)
                raise KeyboardInterrupt
            return interrupt
        return None

    sys.settrace(interrupt)
    try:
        step(model, lossfunc)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    as_before(model, lossfunc, before)


def test_a_block_that_nothing_but_a_stack_holds_stays():
    model, lossfunc = build()
    extend(model), extend(lossfunc)
    with ExitStack() as stack:
        stack.enter_context(backpack(BatchGrad()))
        gc.collect()
        lossfunc(model(X), Y).backward()
    assert not HERE.blocks and all(hasattr(p, "grad_batch") for p in model.parameters())


def nodes_with_parameters(node):
    """Nodes that use parameters, or their transposes, and which."""
    pending, seen, found = [node], {node}, []
    while pending:
        node = pending.pop()
        following = [n for n, _ in node.next_functions if n is not None]
        ends = [m for n in following for m in ([k for k, _ in n.next_functions] if n.name() == "TBackward0" else [n])]
        used = [id(end.variable) for end in ends if hasattr(end, "variable")]
        if used and node.name() != "TBackward0":
            found.append((node, used))
        pending += [n for n in following if n not in seen]
        seen.update(following)
    return found


@pytest.mark.parametrize("k", range(8))
def test_after_an_error_gradients_are_those_that_pytorch_leaves_after_an_error_at_the_same_place(k):
    """In the computation for the ``k``-th parameter, and in a hook on the node that uses it."""

    def gradients(raising):
        model, lossfunc = build()
        left, error = [k], None

        def count():
            left[0] -= 1
            if left[0] < 0:
                raise ZeroDivisionError("injected")

        class Broken(BatchGrad):
            def compute(self, grads):
                count()
                return super().compute(grads)

        if raising == "extension":
            extend(model), extend(lossfunc)
        loss = lossfunc(model(X), Y)
        if raising == "hook":
            left_of = Counter(p for _, used in nodes_with_parameters(loss.grad_fn) for p in used)

            def arrive(grads, used):
                for p in used:
                    left_of[p] -= 1
                    if left_of[p] == 0:
                        count()

            for node, used in nodes_with_parameters(loss.grad_fn):
                node.register_prehook(partial(arrive, used=used))
        try:
            with backpack(*[Broken()] if raising == "extension" else []):
                loss.backward()
        except ZeroDivisionError as caught:
            error = str(caught)
        assert error == "injected"
        assert not any(vars(p).keys() & {"grad_batch"} for p in model.parameters())
        return [p.grad for p in model.parameters()]

    found, plain = gradients("extension"), gradients("hook")
    for a, b in zip(found, plain, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert sum(grad is not None for grad in found) <= k
