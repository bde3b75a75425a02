"""What does ``accumulate`` cost beyond a loop over batches, and how many samples a second do several processes reach?

python benchmarks/scale.py cost                # accumulate against a loop over its batches, interleaved
torchrun --nproc-per-node 2 benchmarks/scale.py processes
python benchmarks/scale.py memory NAME         # peak memory of one quantity
"""

from __future__ import annotations

import resource
import sys
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from subjects import make
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from worker import timed

from backpack import accumulate, backpack, extend
from backpack.extensions import BatchL2Grad, DiagGGNMC, SumGradSquared, Variance

QUANTITIES = {
    "SumGradSquared": (SumGradSquared,),
    "Variance": (Variance,),
    "BatchL2Grad": (BatchL2Grad,),
    "DiagGGNMC": (DiagGGNMC,),
    "all four": (SumGradSquared, Variance, BatchL2Grad, DiagGGNMC),
}


def subject(name: str, batches: int, samples: int) -> tuple[nn.Module, nn.Module, DataLoader]:
    model, X, y = make(name)
    X, y = X[:1].expand(batches * samples, *X.shape[1:]).contiguous(), y[:1].expand(batches * samples).contiguous()
    X = X + torch.randn_like(X)
    return extend(model), extend(nn.CrossEntropyLoss()), DataLoader(TensorDataset(X, y), batch_size=samples)


def loop(model: nn.Module, lossfunc: nn.Module, data: DataLoader, extensions: tuple[type, ...]) -> None:
    for X, y in data:
        for parameter in model.parameters():
            parameter.grad = None
        with backpack(*(extension() for extension in extensions)):
            lossfunc(model(X), y).backward()


def summed(model: nn.Module, lossfunc: nn.Module, data: DataLoader, extensions: tuple[type, ...]) -> None:
    """What a user would write by hand, for these quantities and this loss: the loop, and the sums over its batches."""
    total, seen, parameters = len(data.dataset), 0, list(model.parameters())
    sums: dict[tuple[int, str], torch.Tensor] = {}
    rows: dict[int, list[torch.Tensor]] = {}

    def add(place: int, field: str, value: torch.Tensor, factor: float) -> None:
        if (place, field) in sums:
            sums[place, field].add_(value, alpha=factor)
        else:
            sums[place, field] = value * factor

    for X, y in data:
        for parameter in parameters:
            parameter.grad = None
        with backpack(*(extension() for extension in extensions)):
            lossfunc(model(X), y).backward()
        n = len(X)
        weight, seen = n / total, seen + n
        for place, p in enumerate(parameters):
            if Variance in extensions:  # Chan, Golub & LeVeque
                if seen > n:
                    difference = p.grad - sums[place, "grad"] * (total / (seen - n))
                    add(place, "variance", difference.square_(), weight * (1 - n / seen))
                add(place, "variance", p.variance, weight * n**2)
            add(place, "grad", p.grad, weight)
            if SumGradSquared in extensions:
                add(place, "sum_grad_squared", p.sum_grad_squared, weight**2)
            if DiagGGNMC in extensions:
                add(place, "diag_ggn_mc", p.diag_ggn_mc, weight)
            if BatchL2Grad in extensions:
                rows.setdefault(place, []).append(p.batch_l2 * weight**2)
    for found in rows.values():
        torch.cat(found)


def cost(name: str, batches: int, samples: int, rounds: int) -> None:
    for quantity, extensions in QUANTITIES.items():
        model, lossfunc, data = subject(name, batches, samples)
        ratios: dict[str, list[float]] = {"a loop over the batches": [], "a loop that adds up": []}
        for _ in range(rounds):
            for form, function in zip(ratios, (loop, summed), strict=True):
                batches_alone = partial(function, model, lossfunc, data, extensions)
                first = timed(batches_alone)
                whole = timed(lambda: accumulate(model, lossfunc, data, *(e() for e in extensions)))  # noqa: B023
                ratios[form].append(2 * whole / (first + timed(batches_alone)))
        found = ", ".join(f"{median(own):.3f} of {form}" for form, own in ratios.items())
        print(f"{name} {batches}x{samples} {quantity}: {found}", flush=True)


def train(model: nn.Module, lossfunc: nn.Module, data: DataLoader) -> None:
    for number, (X, y) in enumerate(data):
        if number % dist.get_world_size() == dist.get_rank():
            model.zero_grad()
            lossfunc(model(X), y).backward()


def processes(name: str, batches: int, samples: int, rounds: int) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    count = dist.get_world_size()
    model, lossfunc, data = subject(name, batches * count, samples)
    wrapped = DistributedDataParallel(model)
    jobs = {"plain training": lambda: train(wrapped, lossfunc, data)}
    for quantity, extensions in QUANTITIES.items():
        jobs[quantity] = lambda e=extensions: accumulate(wrapped, lossfunc, data, *(extension() for extension in e))
    times: dict[str, list[float]] = {job: [] for job in jobs}
    for _ in range(rounds):
        for job, function in jobs.items():
            dist.barrier()
            times[job].append(timed(function))
    if dist.get_rank() == 0:
        for job, found in times.items():
            print(f"{name}, {count} processes, {job}: {batches * count * samples / median(found):.0f} samples/s")
    dist.destroy_process_group()


def memory(name: str, quantity: str) -> None:
    model, lossfunc, data = subject(name, 8, 32)
    if quantity == "plain":
        for X, y in data:
            model.zero_grad()
            lossfunc(model(X), y).backward()
    else:
        accumulate(model, lossfunc, data, *(extension() for extension in QUANTITIES[quantity]))
    print(f"{name} {quantity}: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1] == "cost":
        cost("3C3D", 8, 32, 5)
        cost("MLP", 8, 128, 9)
    elif sys.argv[1] == "processes":
        processes("3C3D", 6, 32, 3)
    else:
        memory("3C3D", sys.argv[2])
