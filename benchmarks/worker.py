"""How long does a step take in one library, and how much memory? A process that answers, one line of JSON each way.

A step of each library computes the quantity and the gradient, as this package's does. Only quantities named "alone",
and products in ``torch.func``, come without the gradient.
"""

import ctypes
import gc
import json
import os
import resource
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from result_file import in_words
from subjects import ALONE, EXTENDED, PLAIN, PRODUCTS, THREADS, extensions_of, make
from torch import Tensor, nn

Step = Callable[[], Any]

DEFAULT_THREADS = torch.get_num_threads()


class NotOffered(Exception):
    """The library has no such quantity."""


def plain(model: nn.Module, X: Tensor, y: Tensor, quantity: str = "") -> Step:
    lossfunc = nn.CrossEntropyLoss()

    def step() -> None:
        model.zero_grad()
        lossfunc(model(X), y).backward()

    return step


def of_backpack(model: nn.Module, X: Tensor, y: Tensor, quantity: str, **options: bool) -> Step:
    """This package or the original: whichever the environment has."""
    from backpack import backpack, extend, extensions

    wanted = extensions_of(quantity, len(X))
    missing = [name for name, _ in wanted if not hasattr(extensions, name)]
    if quantity.endswith(ALONE) and not hasattr(extensions, "EKFAC"):
        missing = [quantity]  # the original computes what the gradients of parameters pass by
    if missing:
        raise NotOffered(", ".join(missing))
    lossfunc = extend(nn.CrossEntropyLoss())
    model = extend(model, **options)
    products = [PRODUCTS[name] for name, _ in wanted if name in PRODUCTS]
    vectors = [torch.ones_like(p) for p in model.parameters()]

    def block() -> AbstractContextManager[Any]:
        if quantity == EXTENDED:
            return nullcontext()
        return backpack(*[getattr(extensions, name)(**arguments) for name, arguments in wanted])

    def step() -> None:
        model.zero_grad()
        output = model(X)
        loss = lossfunc(output, y)
        with block():
            if quantity.endswith(ALONE):
                torch.autograd.grad(loss, output)
            else:
                loss.backward(retain_graph=bool(products))
        for name in products:
            for parameter, vector in zip(model.parameters(), vectors, strict=True):
                getattr(parameter, name)(vector)

    return step


def of_functorch(model: nn.Module, X: Tensor, y: Tensor, quantity: str) -> Step:
    """As ``torch.func`` users write it; the gradient is the sum of the individual ones."""
    if quantity == "HMP":
        return _products_of_functorch(model, X, y)
    if quantity.removesuffix(ALONE) != "BatchGrad":
        raise NotOffered(quantity)
    lossfunc = nn.CrossEntropyLoss()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found: dict[str, Tensor] = {}

    def one(parameters: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        output = torch.func.functional_call(model, parameters, (x.unsqueeze(0),))
        return lossfunc(output, label.unsqueeze(0)) / len(X)

    individual = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))

    def step() -> list[Tensor]:
        found.clear()
        found.update(individual(parameters, X, y))
        for name, parameter in model.named_parameters() if quantity == "BatchGrad" else ():
            parameter.grad = found[name].sum(0)
        return [*found.values()]

    return step


def _products_of_functorch(model: nn.Module, X: Tensor, y: Tensor) -> Step:
    """Each parameter's block of the Hessian, times a vector."""
    lossfunc = nn.CrossEntropyLoss()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def product(name: str) -> Tensor:
        def loss(own: Tensor) -> Tensor:
            return lossfunc(torch.func.functional_call(model, {**parameters, name: own}, (X,)), y)

        vector = torch.ones_like(parameters[name])
        return torch.func.jvp(torch.func.grad(loss), (parameters[name],), (vector,))[1]

    return lambda: [product(name) for name in parameters]


def of_opacus(model: nn.Module, X: Tensor, y: Tensor, quantity: str) -> Step:
    if quantity != "BatchGrad":
        raise NotOffered(quantity)
    from opacus import GradSampleModule

    lossfunc = nn.CrossEntropyLoss()
    # "sum": leave the loss's own 1/N in place, as the others do.
    wrapped = GradSampleModule(model, batch_first=True, loss_reduction="sum")

    def step() -> None:
        wrapped.zero_grad()
        lossfunc(wrapped(X), y).backward()

    return step


def of_curvlinops(model: nn.Module, X: Tensor, y: Tensor, quantity: str) -> Step:
    """Its factors; it gives no gradient, which a step of its own takes where it is wanted."""
    kinds = {"KFAC": "mc", "KFLR": "type-2", "EKFAC": "mc"}
    kind = quantity.removesuffix(ALONE)
    if kind not in kinds:
        raise NotOffered(quantity)
    from curvlinops import EKFACLinearOperator, KFACLinearOperator

    cls = EKFACLinearOperator if kind == "EKFAC" else KFACLinearOperator
    arguments = {"fisher_type": kinds[kind], "check_deterministic": False}
    gradient = (lambda: None) if quantity.endswith(ALONE) else plain(model, X, y)

    def step() -> None:
        gradient()
        operator = cls(model, nn.CrossEntropyLoss(), list(model.parameters()), [(X, y)], **arguments)
        operator.compute_kronecker_factors()
        if kind == "EKFAC":
            operator.compute_eigenvalue_correction()

    return step


LIBRARIES = {
    "this package": (of_backpack, "backpack-for-pytorch"),
    "original": (of_backpack, "backpack-for-pytorch"),
    "torch.func": (of_functorch, "torch"),
    "Opacus": (of_opacus, "opacus"),
    "curvlinops": (of_curvlinops, "curvlinops-for-pytorch"),
}
"""Name to what makes a step, and to the distribution that has its version."""


class Subject:
    """A network and a quantity, beside plain PyTorch on a network of its own."""

    def __init__(self, library: str, net: str, quantity: str) -> None:
        torch.set_num_threads(THREADS.get(net, DEFAULT_THREADS))
        self.plain = plain(*make(net))
        own = plain if quantity == PLAIN else LIBRARIES[library][0]
        self.step = own(*make(net), quantity)

    def measure(self, seconds: float) -> dict[str, Any]:
        """Medians of a round of about so many seconds, in which both take turns."""
        times: list[tuple[float, float]] = []
        timed(self.plain), timed(self.step)  # the caches hold another process's data
        start = perf_counter()
        while len(times) < 3 or perf_counter() - start < seconds:
            times.append((timed(self.plain), timed(self.step)))
            if perf_counter() - start > 10 * seconds:
                break
        return dict(zip(("plain", "quantity"), map(median, zip(*times, strict=True)), strict=True))

    def peak(self) -> dict[str, Any]:
        """How far the first three steps raise the memory in use above what it is now, in bytes."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            for _ in range(3):
                self.step()
            return {"peak": torch.cuda.max_memory_allocated() - before}
        if release := getattr(sys.modules.get("backpack.memory"), "release", None):  # old commits have none
            release()
        ctypes.CDLL(None).malloc_trim(0)  # what earlier subjects left would be used again, uncounted
        before = reset_peak()
        for _ in range(3):
            self.step()
        return {"peak": status("VmHWM") - before}


def timed(step: Step) -> float:
    """Seconds of one step."""
    start = perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - start


def status(field: str) -> int:
    """A size of this process, from Linux, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def reset_peak() -> int:
    """Let the peak of this process's memory start from its present size, which is returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


class Worker:
    """Answers requests."""

    def __init__(self, library: str) -> None:
        self.library = library
        self.subject: Subject | None = None

    def answer(self, do: str, **arguments: Any) -> dict[str, Any]:
        if do == "versions":
            accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
            return {"torch": torch.__version__, "own": version(LIBRARIES[self.library][1]), "accelerator": accelerator}
        if do == "origin":
            import backpack

            return {"file": backpack.__file__}
        if do == "build":
            self.subject = None
            gc.collect()
            self.subject = Subject(self.library, **arguments)
            return {}
        assert self.subject is not None
        return getattr(self.subject, do)(**arguments)


def main(library: str, bytes_at_most: int) -> None:
    # A quantity that does not fit is to fail by itself, not to take the machine with it.
    resource.setrlimit(resource.RLIMIT_AS, (bytes_at_most, bytes_at_most))
    warnings.simplefilter("ignore")
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    worker = Worker(library)
    for line in sys.stdin:
        try:
            reply = worker.answer(**json.loads(line))
        except NotOffered:
            reply = {"missing": True}
        except Exception as error:
            message = " ".join(str(error).split())[:300]
            reply = {"error": in_words(type(error).__name__, message), "message": message}
        print(json.dumps(reply), file=channel, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
