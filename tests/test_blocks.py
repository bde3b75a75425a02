"""Blocks, hooks, errors: what users see of the machinery."""

import gc
import tracemalloc

import pytest
import torch
from torch import nn
from truths import close
from truths.autograd import individual_gradients, through_rows

from backpack import backpack, disable, extend, memory_cleanup, unextend
from backpack.context import CTX
from backpack.extensions import BatchGrad, BatchL2Grad, DiagGGNExact, Variance


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()


def batch(n=5):
    return torch.randn(n, 3, dtype=torch.float64), torch.arange(n) % 2


def truth(model, X, loss):
    return individual_gradients((loss(model(x[None])) for x in X), model.parameters())


def square(out):
    return out.square().sum()


def right(model, X):
    for parameter in model.parameters():
        parameter.grad = None
    with backpack(BatchGrad()):
        square(model(X)).backward()
    expected = truth(model, X, square)
    return all(close(p.grad_batch, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_extending_twice_changes_nothing():
    model, (X, _) = extend(extend(net())), batch()
    assert all(len(module._forward_hooks) == 1 for module in model.modules())
    assert right(model, X)


def test_unextend_and_remove_hooks_leave_nothing_behind():
    for undo in (unextend, lambda model: CTX.remove_hooks()):
        model, (X, _) = net(), batch()
        extend(model)
        assert right(model, X)
        undo(model)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not any(p._backward_hooks for p in model.parameters())
        assert right(extend(model), X)


def test_memory_cleanup_deletes_results():
    model, (X, _) = extend(net()), batch()
    assert right(model, X)
    memory_cleanup(model)
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())


@pytest.mark.parametrize("wrong", [BatchGrad, 3, "BatchGrad", nn.Linear(1, 1)])
def test_what_is_no_extension_is_refused(wrong):
    with pytest.raises(ValueError, match="backpack"):
        backpack(wrong)


def test_extend_refuses_what_is_no_module():
    with pytest.raises(TypeError, match="Module"):
        extend(square)


def test_forward_may_run_outside_and_blocks_nest():
    model, (X, _) = extend(net()), batch()
    loss = square(model(X))
    with backpack(BatchL2Grad()):
        with backpack(BatchGrad()):
            loss.backward()
        assert not hasattr(model[0].weight, "batch_l2")
        square(model(X)).backward()
    assert hasattr(model[0].weight, "batch_l2") and hasattr(model[0].weight, "grad_batch")


def test_results_are_overwritten_and_survive_zero_grad():
    model, (X, _) = extend(net()), batch()
    right(model, X)
    model.zero_grad()
    assert model[0].weight.grad_batch.shape == (5, 4, 3)
    assert right(model, X[:2])


def test_a_kept_result_is_not_overwritten():
    model = extend(nn.Linear(600, 600))
    X = torch.randn(4, 600)
    with backpack(BatchGrad()):
        square(model(X)).backward()
    kept = model.weight.grad_batch
    copied = kept.clone()
    with backpack(BatchGrad()):
        square(model(2 * X)).backward()
    assert torch.equal(kept, copied) and not torch.equal(model.weight.grad_batch, copied)


def test_disable_records_nothing_and_nests():
    model, (X, _) = extend(net()), batch()
    with disable():
        with disable():
            assert not disable.should_store_io()
        assert not disable.should_store_io()
        loss = square(model(X))
    assert disable.should_store_io()
    with pytest.raises(RuntimeError, match="none of its uses was seen"), backpack(BatchGrad()):
        loss.backward()
    assert right(model, X)


def test_a_block_in_which_nothing_runs_warns():
    model, (X, _) = net(), batch()
    with pytest.warns(UserWarning, match="extend"), backpack(BatchGrad()):
        square(model(X)).backward()


def test_extension_hook_sees_each_leaf_once_in_backward_order_with_its_results():
    model, lossfunc, (X, y) = extend(net()), extend(nn.CrossEntropyLoss()), batch()
    for extensions in ([BatchGrad()], [BatchGrad(), DiagGGNExact()], [DiagGGNExact()]):
        seen = []

        def hook(module):
            seen.append(type(module).__name__)  # noqa: B023
            for parameter in module.parameters():
                for extension in extensions:  # noqa: B023
                    delattr(parameter, extension.savefield)  # and thereby free its memory

        with backpack(*extensions, extension_hook=hook):
            lossfunc(model(X), y).backward()
        assert sorted(seen) == ["CrossEntropyLoss", "Linear", "Linear", "ReLU"]
        assert [name for name in seen if name in ("Linear", "ReLU")] == ["Linear", "ReLU", "Linear"]
        assert not any(hasattr(p, "grad_batch") for p in model.parameters())


@pytest.mark.parametrize("in_block", [False, True])
def test_a_kept_graph_can_be_used_again(in_block):
    model, (X, _) = extend(net()), batch()
    loss = square(model(X))
    expected = truth(model, X, square)
    for _ in range(2):
        with backpack(BatchGrad(), retain_graph=in_block):
            loss.backward(retain_graph=True)
        assert all(close(p.grad_batch, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_rows_of_a_jacobian_come_from_repeated_backward_passes():
    model, (X, _) = extend(net()), batch()
    out = model(X)
    for k in range(2):
        with backpack(BatchGrad(), retain_graph=True):
            out[:, k].sum().backward(retain_graph=True)
        expected = truth(model, X, lambda o: o[:, k].sum())  # noqa: B023
        assert all(close(p.grad_batch, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_autograd_grad_and_chosen_inputs_work():
    model, (X, _) = extend(net()), batch()
    expected = truth(model, X, square)
    parameters = list(model.parameters())
    with backpack(BatchGrad()):
        torch.autograd.grad(square(model(X)), parameters)
    assert all(close(p.grad_batch, e) for p, e in zip(parameters, expected, strict=True))
    memory_cleanup(model)
    with backpack(BatchGrad()):
        square(model(X)).backward(inputs=parameters[:1])
    assert close(parameters[0].grad_batch, expected[0])
    assert parameters[1].grad is None


def test_other_losses_follow_autograd():
    model, lossfunc, (X, y) = extend(net()), extend(nn.CrossEntropyLoss(reduction="none")), batch()
    with backpack(BatchGrad()):
        (3 * lossfunc(model(X), y).sum()).backward()
    expected = individual_gradients(3 * lossfunc(model(X), y), model.parameters())
    assert all(close(p.grad_batch, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_two_calls_of_the_model_are_joined():
    model, (X, _) = extend(net()), batch()
    with backpack(BatchGrad(), BatchL2Grad()):
        (square(model(X)) + square(model(X.sin()))).backward()
    expected = [a + b for a, b in zip(truth(model, X, square), truth(model, X.sin(), square), strict=True)]
    assert all(close(p.grad_batch, e) for p, e in zip(model.parameters(), expected, strict=True))
    assert all(
        close(p.batch_l2, e.flatten(1).square().sum(1)) for p, e in zip(model.parameters(), expected, strict=True)
    )


class Failing(nn.Module):
    error = None

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        h = self.linear(x)
        if self.error is not None:
            raise self.error
        return h


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), MemoryError()])
def test_after_an_exception_in_the_forward_pass_all_is_as_before(error):
    model, (X, _) = extend(nn.Sequential(Failing(), nn.Linear(3, 2)).double()), batch()
    model[0].error = error
    with pytest.raises(type(error)):
        model(X)
    model[0].error = None
    assert right(model, X)


def test_rows_of_the_output_are_the_samples():
    class Shorter(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x[1:])

    model, (X, _) = extend(Shorter().double()), batch()
    with backpack(BatchGrad()):
        square(model(X)).backward()
    for p, expected in zip(model.parameters(), truth(model.linear, X[1:], square), strict=True):
        assert close(p.grad_batch, expected)


@pytest.mark.parametrize(
    ("layer", "X"),
    [
        (nn.Embedding(4, 3, max_norm=1.0), torch.tensor([[0, 1], [2, 3]])),
        (nn.Embedding(4, 3, scale_grad_by_freq=True), torch.tensor([[0, 1], [1, 3]])),
        (nn.LSTM(3, 2, num_layers=2, dropout=0.5, batch_first=True), torch.randn(4, 5, 3)),
        (nn.EmbeddingBag(4, 3, mode="max"), torch.tensor([[0, 1], [2, 3]])),
    ],
)
def test_layers_that_draw_or_renormalize_or_take_a_maximum_are_right(layer, X):
    parameters = list(extend(layer).parameters())
    out = layer(X)
    out = out[0] if isinstance(out, tuple) else out
    expected = through_rows(out, out.square().sum(), parameters)
    with backpack(BatchGrad(), BatchL2Grad(subsampling=[1])):
        out.square().sum().backward()
    for p, rows in zip(parameters, expected, strict=True):
        assert close(p.grad_batch, rows, rtol=1e-5) and close(
            p.batch_l2, rows[1:2].square().sum().reshape(1), rtol=1e-5
        )


def test_an_input_modified_in_place_is_an_error():
    model, (X, _) = extend(nn.Linear(3, 2).double()), batch()
    out = model(X)
    X.add_(1)
    with pytest.raises(RuntimeError, match="modified"), backpack(BatchGrad()):
        out.sum().backward()


def test_packed_sequences_are_refused():
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(2, 2)])
    model = extend(nn.GRU(2, 2))
    with pytest.raises(RuntimeError, match="packed|samples"), backpack(BatchGrad()):
        model(packed)[0].data.sum().backward()


def test_debug_prints_what_is_done(capsys):
    model = extend(net(), debug=True)
    with backpack(BatchGrad(), debug=True):
        square(model(batch()[0])).backward()
    printed = capsys.readouterr().out
    assert "Extending" in printed and "BatchGrad on parameter 0.weight" in printed


def test_frozen_parameters_are_left_alone():
    model, (X, _) = extend(net()), batch()
    model[0].requires_grad_(False)
    with backpack(BatchGrad()):
        square(model(X)).backward()
    assert not hasattr(model[0].weight, "grad_batch") and model[2].weight.grad_batch.shape == (5, 2, 4)


@pytest.mark.parametrize(
    "frozen", [["weight_ih_l0"], ["weight_ih_l0", "bias_ih_l0"], ["weight_hh_l0_reverse", "bias_hh_l0"]]
)
def test_a_recurrent_layer_may_be_frozen_in_part(frozen):
    layer, X = nn.LSTM(3, 2, batch_first=True, bidirectional=True).double(), torch.randn(4, 3, 3, dtype=torch.float64)
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    trained = [p for p in layer.parameters() if p.requires_grad]
    expected = individual_gradients((square(layer(x[None])[0]) for x in X), trained)
    with backpack(BatchGrad()):
        square(extend(layer)(X)[0]).backward()
    assert all(close(p.grad_batch, e) for p, e in zip(trained, expected, strict=True))


def test_a_thousand_steps_hold_no_more_than_ten():
    model, lossfunc, (X, y) = extend(net()), extend(nn.CrossEntropyLoss()), batch()

    def steps(count):
        for _ in range(count):
            with backpack(BatchGrad(subsampling=[1]), Variance(), DiagGGNExact()):
                lossfunc(model(X), y).backward()
        gc.collect()
        return sum(issubclass(type(entry), torch.Tensor) for entry in gc.get_objects())

    tracemalloc.start()
    tensors, (before, _) = steps(10), tracemalloc.get_traced_memory()
    assert steps(1000) <= tensors
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 100_000
