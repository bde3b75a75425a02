"""What several processes compute, against one giant batch: ``in_processes.py RANK COUNT FILE FOLDER [MODE]``."""

import copy
import os
import random
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from truths import close
from truths.data_sets import (
    LOSSES,
    all_extensions,
    bound_of,
    check,
    check_eigen,
    check_hessians,
    check_others,
    fixed_draws,
    giant,
    hessian_diagonals,
    other_extensions,
    parameters_of,
    problem,
    targets,
)
from truths.options import check_all, make_all

from backpack import accumulate, across_processes, backpack, extend
from backpack.dataset import CurvatureStore
from backpack.dataset.checkpoint import Checkpoint
from backpack.extensions import (
    EKFAC,
    HBP,
    KFAC,
    KFLR,
    KFRA,
    BatchGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SumGradSquared,
    Variance,
)

RANK, COUNT = int(sys.argv[1]), int(sys.argv[2])
ROWS = (None, [7, 2, -1, 2])


def plain(model):
    return model


def parallel(model):
    return DistributedDataParallel(model)


def sharded(model):
    mesh = init_device_mesh("cpu", (COUNT,))
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = (plain, parallel, sharded)


def data_sets(folder, thorough):
    chosen = [(None, "ignored", False), (ROWS[1], "mean", False), (None, "mean", True)]
    if thorough:
        chosen = [(rows, kind, stream) for rows in ROWS for kind in LOSSES for stream in (False, True)]
    for wrap in WRAPPERS:
        for rows, kind, stream in chosen:
            lossfunc, divided = LOSSES[kind]
            model, lossfunc, X, _ = problem(copy.deepcopy(lossfunc))
            y = targets(kind)
            truth = giant(model, lossfunc, X, y, divided(y), rows)
            bound = bound_of(truth)
            data = DataLoader(TensorDataset(X, y), batch_size=4)  # three batches, of 4, 4 and 3
            model = wrap(model)
            where = {"stream": Path(folder) / f"{wrap.__name__}-{rows}-{kind}"} if stream else {"gather": True}
            found = accumulate(model, lossfunc, data, *all_extensions(bound, rows), **where)
            check(found, truth, bound, model.module if wrap is parallel else model)


def options_of_first_order(folder):
    """Projections, directions, weights and clipping, in memory and in files."""
    for wrap in WRAPPERS:
        for rows, stream in ((None, False), (ROWS[1], True)):
            model, lossfunc, X, y = problem()
            truth = giant(model, lossfunc, X, y, 11)["individual"]
            chosen = rows or list(range(11))
            made = make_all(truth, rows, chosen)
            data = DataLoader(TensorDataset(X, y), batch_size=4)
            where = {"stream": Path(folder) / f"options of {wrap.__name__}"} if stream else {"gather": True}
            found = accumulate(wrap(model), lossfunc, data, *made.values(), **where)
            check_all(lambda extension: found[extension], made, truth, rows, chosen)  # noqa: B023


def other_quantities():
    """Sampled ones, those of the Hessian where the model is not sharded, and factors of the empirical Fisher matrix."""
    lossfunc, divided = LOSSES["mse"]
    for wrap in WRAPPERS:
        for rows in ROWS if COUNT == 4 else ROWS[1:]:
            model, lossfunc, X, _ = problem(copy.deepcopy(lossfunc))
            y = targets("mse")
            truth = giant(model, lossfunc, X, y, divided(y), rows)
            diagonals = hessian_diagonals(model, lossfunc, X, y, divided(y), rows)
            data = DataLoader(TensorDataset(X, y), batch_size=4)
            model = wrap(model)
            extensions = other_extensions(rows, whole=wrap is not sharded)
            with fixed_draws():
                found = accumulate(model, lossfunc, data, *extensions, gather=True)
            check_others(found, truth, model.module if wrap is parallel else model, divided(y))
            if wrap is not sharded:
                check_hessians(found, diagonals)


def factors_of_one_process():
    """In a block, twice through one graph: of the process's own batch, with any wrapper."""
    for wrap in WRAPPERS:
        model, lossfunc, X, y = problem(n=8)
        X, lossfunc = X + RANK, extend(lossfunc)
        truth = giant(model, lossfunc, X, y, 8)
        model = wrap(extend(model))
        loss = lossfunc(model(X), y)
        for number in range(2):
            with backpack(KFLR(), EKFAC(fisher="exact"), Variance(), retain_graph=number == 0):
                loss.backward(retain_graph=number == 0)
            for name, p in parameters_of(model.module if wrap is parallel else model).items():
                layer = name.split(".")[0]
                x, b = truth["inputs"][layer], truth["roots"][layer + ".bias"].flatten(0, 1)
                v = truth["roots"][name].flatten(0, 1)
                factors = [b.T @ b, x.T @ x / 8][: v.dim() - 1]
                assert all(close(found, factor) for found, factor in zip(p.kflr, factors, strict=True))
                check_eigen(p.ekfac, factors, v)
                assert close(p.variance, truth["individual"][name].var(0, correction=0))
                del p.kflr, p.ekfac, p.variance


def own_samples_stay():
    model, lossfunc, X, y = problem()
    truth = giant(model, lossfunc, X, y, 11)
    for data in (DataLoader(TensorDataset(X, y), batch_size=4), [*zip(X.split(4), y.split(4), strict=True)]):
        found = accumulate(model, lossfunc, data, BatchGrad(), Variance([1, 9, 10]))
        places = found.places["grad_batch"] if "grad_batch" in found.places else torch.arange(0)
        numbers = [n for k in range(3) if k % COUNT == RANK for n in range(4 * k, min(4 * k + 4, 11))]
        assert places.tolist() == numbers
        for name, g in truth["individual"].items():
            assert close(found["variance"][name], g[[1, 9, 10]].var(0, correction=0))
            if numbers:
                assert close(found["grad_batch"][name], g[numbers])


def order_is_shared():
    """Each process would draw another one by itself."""
    model, lossfunc, X, y = problem()
    torch.manual_seed(RANK)
    data = DataLoader(TensorDataset(X, y), batch_size=3, shuffle=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The loader draws its samples in an order of its own")
        found = accumulate(model, lossfunc, data, BatchGrad(), SumGradSquared(), gather=True)
    truth = giant(model, lossfunc, X, y, 11)
    for name, g in truth["individual"].items():
        assert close(found["sum_grad_squared"][name], g.square().sum(0))
        assert close(found["grad_batch"][name].sum(0), g.sum(0), g.abs().max())
        assert len(found["grad_batch"][name]) == 11


def numbered_samples():
    """Pairs of rows, in any order, are the samples of each batch."""
    for wrap in (plain, parallel):
        model, lossfunc, X, y = problem(n=12)
        truth = giant(model, lossfunc, X, y, 12)
        ids = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 1, 1]])
        data = [*zip(X.split(4), y.split(4), ids, strict=True)]
        of_all = (ids + 2 * torch.arange(3)[:, None]).flatten()
        found = accumulate(
            wrap(model), lossfunc, data, BatchGrad([5, 0]), SumGradSquared(), DiagGGNExact(), gather=True,
            forward=lambda model, batch: (model(batch[0]), batch[1]), sample_ids=lambda batch: (batch[2], 2),
        )  # fmt: skip
        assert found.samples == 6
        for name, g in truth["individual"].items():
            own = g.new_zeros(6, *g.shape[1:]).index_add(0, of_all, g)
            assert close(found["grad_batch"][name], own[[5, 0]], own.abs().max())
            assert close(found["sum_grad_squared"][name], own.square().sum(0))
            assert close(found["diag_ggn_exact"][name], truth["roots"][name].square().sum((0, 1)))


class Failing(list):
    """Data that fail at the process's second batch."""

    fail = True

    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if self.fail and number == COUNT + RANK:
                raise InterruptedError
            yield batch


def resumed(folder):
    """Processes of a sharded model go on at the same batch, also if one was killed before it replaced its file."""
    for wrap in (plain, sharded):
        model, lossfunc, X, y = problem()
        model = wrap(model)
        data = Failing(zip(X.split(1), y.split(1), strict=True))
        extensions = [Variance(), DiagGGNMC(), BatchGrad()]
        path = Path(folder) / f"checkpoint of {wrap.__name__}"
        where = {"checkpoint": path, "checkpoint_seconds": 0, "gather": True}
        torch.manual_seed(RANK)
        replace, saved = Checkpoint.replace, []

        def killed(self):
            saved.append(1)  # noqa: B023
            if wrap is sharded and RANK == 1 and len(saved) == 2:  # noqa: B023
                raise InterruptedError
            replace(self)  # noqa: B023

        Checkpoint.replace = killed
        try:
            accumulate(model, lossfunc, data, *extensions, **where)
        except InterruptedError:
            data.fail = False
        finally:
            Checkpoint.replace = replace
        dist.barrier()
        again = accumulate(model, lossfunc, data, *extensions, **where)
        torch.manual_seed(RANK)
        whole = accumulate(model, lossfunc, data, *extensions, gather=True)
        for extension in extensions:
            for name, value in whole[extension.savefield].items():
                assert torch.equal(again[extension.savefield][name], value)


def owned(found):
    """Results of all processes, each of which has those of its own layers."""
    everything = [None] * COUNT
    dist.all_gather_object(everything, found.results)
    names = {field: sorted(name for own in everything for name in own[field]) for field in found}
    assert all(own == sorted(found.grad) for own in names.values())  # each is on one process
    assert sum(1 for own in everything if own["kflr"]) == COUNT
    return {field: {name: value for own in everything for name, value in own[field].items()} for field in found}


def curvature_in_parts(folder):
    """Parts of the parameters, on all processes or on one each, in memory and in files."""
    lossfunc, divided = LOSSES["mse"]
    for number, wrap in enumerate(WRAPPERS):
        rows = ROWS[number % 2]
        inner, lossfunc, X, _ = problem(copy.deepcopy(lossfunc))
        y = targets("mse")
        truth = giant(inner, lossfunc, X, y, divided(y), rows)
        data = DataLoader(TensorDataset(X, y), batch_size=4)
        model = wrap(inner)
        merged = (DiagGGNMC, KFAC, EKFAC, HBP)
        for parts, divides in ((2, False), (None, True), ([["0.weight"], ["0.bias", "2.weight", "2.bias"]], True)):
            extensions = [e for e in other_extensions(rows, False) if isinstance(e, merged)]
            extensions += [KFLR(rows), Variance(rows), SumGradSquared(rows)]
            place = Path(folder) / f"store of {wrap.__name__} {parts}"
            with fixed_draws():
                found = accumulate(model, lossfunc, data, *extensions, parts=parts, sharded=divides)
                stored = accumulate(model, lossfunc, data, *extensions, parts=parts, sharded=divides, store=place)
            results = owned(found) if divides else found.results
            assert close(found.loss, truth["loss"])
            for name, grad in truth["grad"].items():
                assert close(found.grad[name], grad) or rows is not None
                assert torch.equal(found.grad[name], stored.grad[name])
                g = truth["individual"][name]
                x, b = truth["inputs"][name[0]], truth["roots"][name[0] + ".bias"].flatten(0, 1)
                factors = [b.T @ b, x.T @ x / len(x)][: truth["roots"][name].dim() - 2]
                for own, expected in zip(results["kflr"][name], factors, strict=True):
                    assert close(own, expected)
                check_eigen(results["ekfac_exact"][name], factors, truth["roots"][name].flatten(0, 1))
                assert close(results["variance"][name], g.var(0, correction=0))
                assert close(results["sum_grad_squared"][name], g.square().sum(0))
            for field, own in results.items():
                store = CurvatureStore(place, field)
                assert sorted(store) == sorted(own) == sorted(found.grad)
                for name in store:
                    for one, other in zip(tree_leaves(store[name]), tree_leaves(own[name]), strict=True):
                        assert torch.equal(one, other), (field, name)
            assert not stored.results


def slow_parts(folder, pause):
    """A run that is killed from outside."""
    model, lossfunc, X, y = problem()
    random.seed(RANK), numpy.random.seed(RANK), torch.manual_seed(RANK)

    class Slow(list):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(pause)
                yield batch

    data = Slow(zip(X.split(1), y.split(1), strict=True))
    accumulate(model, lossfunc, data, EKFAC(2), Variance(), parts=2, sharded=True, store=Path(folder) / "store",
               checkpoint=Path(folder) / "checkpoint", checkpoint_seconds=0)  # fmt: skip


def divided_twice_is_refused():
    model, lossfunc, X, y = problem()
    data = TensorDataset(X, y)
    try:
        accumulate(model, lossfunc, DataLoader(data, sampler=DistributedSampler(data)), BatchGrad())
    except ValueError as error:
        assert "DistributedSampler" in str(error)
    else:
        raise AssertionError


def training_loops():
    """Four samples a process; the gradient is that of DistributedDataParallel and fully_shard."""
    n = 4 * COUNT
    own = slice(4 * RANK, 4 * RANK + 4)
    for wrap in (parallel, sharded):
        for rows, outside in ((None, False), ([5, 2, -1, 2], False), ([6], True)):
            model, lossfunc, X, y = problem(n=n)
            truth = giant(model, lossfunc, X, y, n, rows)
            bound = bound_of(truth)
            inner, lossfunc = model, extend(lossfunc)
            model = extend(wrap(model)) if outside else wrap(extend(model))
            for _ in range(2):
                model.zero_grad()
                with across_processes(inner, *all_extensions(bound, rows), samples=4, gather=True):
                    lossfunc(model(X[own]), y[own]).backward()
            found = {}
            for name, p in parameters_of(inner).items():
                for extension in all_extensions(bound):
                    field = extension.savefield
                    found.setdefault(field, {})[name] = getattr(p, field)
                grad = p.grad.full_tensor() if wrap is sharded else p.grad
                assert close(grad, truth["grad"][name], truth["individual"][name].abs().max())
                p.grad = None

            class Found(dict):
                loss, grad = truth["loss"], truth["grad"]  # noqa: B023

            check(Found(found), truth, bound, inner)


def blocks_of_one_process():
    """Inside ``backpack(...)`` results are those of the process's own batch, whatever is around the model."""
    for wrap in WRAPPERS:
        for kind in ("mean", "mse"):
            lossfunc = extend(LOSSES[kind][0])
            model, _, X, _ = problem(n=8)
            y = targets(kind, 8)
            X, y = X + RANK, y
            truth = giant(model, lossfunc, X, y, y.numel() if kind == "mse" else 8)
            model = wrap(extend(model))
            with backpack(BatchGrad(), Variance([2, 3]), DiagGGNExact()):
                lossfunc(model(X), y).backward()
            for name, p in parameters_of(model.module if wrap is parallel else model).items():
                g = truth["individual"][name]
                assert close(p.grad_batch, g) and close(p.variance, g[2:4].var(0, correction=0))
                assert close(p.diag_ggn_exact, truth["roots"][name].square().sum((0, 1)))


def what_sharded_models_have_not_is_refused():
    for extension in (DiagHessian(), KFRA()):
        model, lossfunc, X, y = problem()
        lossfunc, model = extend(lossfunc), extend(sharded(model))
        try:
            with backpack(extension):
                lossfunc(model(X), y).backward()
        except RuntimeError as error:
            assert "fully_shard" in str(error), error
        else:
            raise AssertionError


def static_graph_is_refused():
    model, lossfunc, X, y = problem()
    lossfunc, model = extend(lossfunc), DistributedDataParallel(extend(model), static_graph=True)
    with backpack(BatchGrad()):
        lossfunc(model(X), y).backward()
    model, _, X, y = problem()
    model = DistributedDataParallel(extend(model), static_graph=True)
    loss = lossfunc(model(X), y)
    try:
        with backpack(DiagGGNExact()):
            loss.backward()
    except RuntimeError as error:
        assert "static_graph" in str(error)
    else:
        raise AssertionError
    for p in model.parameters():  # the process group is as before
        dist.all_reduce(p.detach().clone())


def one_dies():
    model, lossfunc, X, y = problem()

    def batches():
        for number, batch in enumerate(zip(X.split(2), y.split(2), strict=True)):
            if RANK == 1 and number == 3:
                os._exit(9)
            yield batch

    accumulate(model, lossfunc, batches(), Variance())


if __name__ == "__main__":
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo", init_method=f"file://{sys.argv[3]}", rank=RANK, world_size=COUNT, timeout=timedelta(seconds=60)
    )
    if sys.argv[5:] == ["die"]:
        one_dies()
    if sys.argv[5:6] == ["parts"]:
        slow_parts(sys.argv[4], float(sys.argv[6]))
        print("done")
        sys.exit()
    for scenario in (blocks_of_one_process, factors_of_one_process, other_quantities, own_samples_stay,
                     numbered_samples, order_is_shared, divided_twice_is_refused,
                     static_graph_is_refused, what_sharded_models_have_not_is_refused, training_loops):  # fmt: skip
        scenario()
    resumed(sys.argv[4])
    curvature_in_parts(sys.argv[4])
    data_sets(sys.argv[4], thorough=COUNT == 4)
    options_of_first_order(sys.argv[4])
    dist.barrier()
    dist.destroy_process_group()
    print("done")
