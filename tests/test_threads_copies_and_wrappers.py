"""Where models, blocks and graphs live: threads, copies, wrappers, compilers, checkpoints, optimizers."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from truths import close
from truths.autograd import individual_gradients
from truths.second_order import ggn_blocks

from backpack import backpack, extend
from backpack.extensions import BatchGrad, DiagGGNExact, Variance


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()


X = torch.arange(15, dtype=torch.float64).reshape(5, 3).sin()
Y = torch.arange(5) % 2


def individual(model, X=X, Y=Y):
    """Individual gradients of the mean cross entropy by a loop, on a copy without hooks."""
    twin = net()
    twin.load_state_dict(model.state_dict())
    return individual_gradients(nn.CrossEntropyLoss(reduction="none")(twin(X), Y) / len(X), twin.parameters())


def ggn(model):
    """The GGN's diagonal by explicit Jacobians, on a copy without hooks."""
    twin = net()
    twin.load_state_dict(model.state_dict())
    blocks = ggn_blocks(twin, X, nn.CrossEntropyLoss(), Y)
    return [G.diagonal().reshape(p.shape) for p, G in blocks.items()]


def right(model, run=None):
    """Whether both orders are right, with ``run`` in place of the model."""
    lossfunc = extend(nn.CrossEntropyLoss())
    model.zero_grad()
    with backpack(BatchGrad(), DiagGGNExact()):
        lossfunc((run or model)(X), Y).backward()
    found = zip(model.parameters(), individual(model), ggn(model), strict=True)
    return all(close(p.grad_batch, g) and close(p.grad, g.sum(0)) and close(p.diag_ggn_exact, d) for p, g, d in found)


def test_two_models_do_not_see_each_other():
    one, two, lossfunc = extend(net(1)), extend(net(2)), extend(nn.CrossEntropyLoss())
    losses = [lossfunc(model(X), Y) for model in (one, two, one)]
    for model, loss in zip((one, two, one), losses, strict=True):
        with backpack(BatchGrad()):
            loss.backward()
        assert all(close(p.grad_batch, g) for p, g in zip(model.parameters(), individual(model), strict=True))


def test_a_model_inside_of_another_one_is_right():
    inner = extend(net())
    outer = extend(nn.Sequential(nn.Identity(), inner))
    assert right(inner, outer) and right(inner)


def test_an_exception_leaves_the_outer_block_as_it_was():
    model = extend(net())
    lossfunc = extend(nn.CrossEntropyLoss())
    with backpack(BatchGrad()):
        with pytest.raises(ZeroDivisionError), backpack(Variance()):
            lossfunc(model(X), Y).backward()
            raise ZeroDivisionError
        model.zero_grad()
        lossfunc(model(X), Y).backward()
    assert all(close(p.grad_batch, g) for p, g in zip(model.parameters(), individual(model), strict=True))


def test_threads_do_not_see_each_other():
    shared, results = extend(net()), {}

    def work(number):
        model = extend(net(number))
        results[number] = [right(model) for _ in range(10)]
        out = shared(X)  # forward passes of one model in several threads
        results[number].append(close(out, shared(X)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(all(results[number]) for number in range(4)) and right(shared)


def test_a_block_of_one_thread_is_none_of_another():
    model, found = extend(net()), []

    def work():
        nn.CrossEntropyLoss()(model(X), Y).backward()
        found.append(hasattr(model[0].weight, "grad_batch"))

    with pytest.warns(UserWarning, match="No backward pass"), backpack(BatchGrad()):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [False]


def test_copies_are_models_of_their_own():
    model = extend(net())
    with backpack(BatchGrad(), retain_graph=True):
        nn.CrossEntropyLoss()(model(X), Y).backward(retain_graph=True)
    assert model[0].input0 is not None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model.to(torch.float64))):
        assert right(extend(twin)) and list(twin.state_dict()) == list(net().state_dict())
    other = net(3)
    other.load_state_dict(model.state_dict())
    assert close(other(X), model(X)) and right(model)


COPIES = {
    "deep": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "shallow": copy.copy,
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
    "of a part": lambda model: nn.Sequential(*[copy.deepcopy(layer) for layer in model]),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_an_extended_model_are_extended(name):
    model = extend(net())
    twin = COPIES[name](model)
    for p in twin.parameters():
        vars(p).clear()
    for _ in range(2):
        assert right(twin)
    del model
    gc.collect()
    assert right(twin)


def test_data_parallel_without_replicas_is_right():
    model = extend(net())
    assert right(model, nn.DataParallel(model))
    other = net(2)
    wrapped = extend(nn.DataParallel(other))
    assert right(other, wrapped)


def test_replicas_are_refused():
    model = extend(net())
    replica = model._replicate_for_data_parallel()
    replica._modules = {}
    for name, child in model.named_children():
        twin = child._replicate_for_data_parallel()
        twin._parameters = {key: p.clone() for key, p in child._parameters.items()}  # as on another device
        replica._modules[name] = twin
    with pytest.raises(RuntimeError, match="data-parallel replica"), backpack(BatchGrad()):
        nn.CrossEntropyLoss()(replica(X), Y).backward()


DISTRIBUTED = """
import sys
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist, torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel as DDP
from test_threads_copies_and_wrappers import X, Y, close, individual, net
from backpack import backpack, extend
from backpack.extensions import BatchGrad
from torch import nn

def work(rank, world, store):
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
    model, lossfunc = net(), nn.CrossEntropyLoss()
    wrapped = extend(DDP(model)) if rank % 2 else DDP(extend(model))  # both ways
    x, y = X[rank * 2 : rank * 2 + 2], Y[rank * 2 : rank * 2 + 2]
    for _ in range(2):
        model.zero_grad()
        with backpack(BatchGrad()):
            lossfunc(wrapped(x), y).backward()
        everyone = [individual(model, X[r * 2 : r * 2 + 2], Y[r * 2 : r * 2 + 2]) for r in range(world)]
        for k, p in enumerate(model.parameters()):
            assert close(p.grad_batch, everyone[rank][k])
            assert close(p.grad, sum(own[k].sum(0) for own in everyone) / world)
    dist.destroy_process_group()

if __name__ == "__main__":
    world, store = int(sys.argv[1]), sys.argv[2]
    work(0, 1, store) if world == 1 else mp.spawn(work, (world, store), nprocs=world)
"""


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_distributed_processes_have_their_own_samples(world, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(DISTRIBUTED.format(tests=str(Path(__file__).parent)))
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, str(script), str(world), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


COMPILED = """
import sys
sys.path.insert(0, {tests!r})
import torch
from test_threads_copies_and_wrappers import net, right
from backpack import extend

def ways():
    model = net()
    yield "extended, then compiled", model, torch.compile(extend(model), backend="eager")
    model = net()
    yield "compiled, then extended", model, extend(torch.compile(model, backend="eager"))
    model = extend(net())
    model.compile(backend="eager")
    yield "compiled in place", model, model
    model = net()
    first = model[0]
    whole = torch.nn.Sequential(torch.compile(first, backend="eager"), *model[1:])
    yield "compiled in part", model, extend(whole)

for name, model, run in ways():
    assert right(model, run), name
"""


def test_compiled_models_run_as_they_were_written(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(COMPILED.format(tests=str(Path(__file__).parent)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_scripted_modules_are_refused_before_anything_is_extended():
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(model[0], X)
    holder = nn.Sequential(nn.Linear(3, 3).double(), traced)
    for module, name in ((traced, "The module"), (holder, "1")):
        with pytest.raises(TypeError, match=f"{name} was compiled by torch.jit"):
            extend(module)
    assert not holder[0]._forward_hooks


class Checkpointed(nn.Module):
    def __init__(self, body, whole):
        super().__init__()
        self.body, self.whole = body, whole

    def forward(self, x):
        if self.whole:
            return checkpoint(self.body, x, use_reentrant=False)
        return self.body[2](checkpoint(self.body[:2], x, use_reentrant=False))


@pytest.mark.parametrize("whole", [False, True])
def test_checkpointed_regions_are_right(whole):
    body = net()
    assert right(body, extend(Checkpointed(body, whole)))
    assert right(body, lambda x: checkpoint(body, x, use_reentrant=False))  # around the extended module


def test_gradients_of_micro_batches_add_up():
    model, lossfunc = extend(net()), extend(nn.CrossEntropyLoss())
    halves = [(X[:2], Y[:2]), (X[2:], Y[2:])]
    for x, y in halves:
        with backpack(BatchGrad()):
            lossfunc(model(x), y).backward()
        truth = individual(model, x, y)
        assert all(close(p.grad_batch, g) for p, g in zip(model.parameters(), truth, strict=True))
    both = [individual(model, x, y) for x, y in halves]
    assert all(close(p.grad, a.sum(0) + b.sum(0)) for p, a, b in zip(model.parameters(), *both, strict=True))


@pytest.mark.parametrize("set_to_none", [False, True])
def test_optimizers_that_step_and_reuse_gradients_change_nothing(set_to_none):
    model, plain, lossfunc = extend(net()), net(), nn.CrossEntropyLoss()
    optimizers = [torch.optim.Adam(m.parameters(), foreach=True) for m in (model, plain)]
    for _ in range(3):
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad(set_to_none)
            truth = individual(m)
            with backpack(*[BatchGrad()] if m is model else []):
                lossfunc(m(X), Y).backward()
            assert m is plain or all(close(p.grad_batch, g) for p, g in zip(m.parameters(), truth, strict=True))
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_closures_of_line_searches_may_run_it_many_times():
    model, lossfunc = extend(net()), nn.CrossEntropyLoss()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = lossfunc(model(X), Y)
        with backpack(BatchGrad()):
            loss.backward()
        return loss

    optimizer.step(closure)
    assert right(model)


def test_forward_passes_without_gradients_record_nothing():
    model = extend(net())
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = model(X)
        assert not out.requires_grad
        assert right(model)


def test_inputs_of_inference_mode_are_what_pytorch_refuses():
    with torch.inference_mode():
        inference = X * 1
    model = extend(net())
    with pytest.raises(RuntimeError, match="[Ii]nference"):
        model(inference)
    assert right(model)
