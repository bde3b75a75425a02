"""BackPACK computes more than the gradient while PyTorch runs ``backward()``.

``extend(model)`` and ``extend(lossfunc)``, then ``with backpack(BatchGrad()): loss.backward()``, and read
``p.grad_batch`` on each parameter. The package, from the top down; each part imports only what is below it:

- ``inspection``: ``verify`` and ``summary``, before a long run.
- ``dataset``: the quantities of a whole data set, means over steps; ``hessianfree``: products with matrices of any
  computation.
- ``context``: ``extend`` and ``backpack(...)``.
- ``curvature``: second order; ``backward``: one backward pass.
- ``nodes``: how a kind of node uses its parameters; ``extensions``: the quantities, one a file.
- ``uses``: the few forms of such uses, and what can be computed of each.
- ``samples``: to which sample an entry belongs.
- ``modules``: what extended modules leave in the graph; ``graph``: PyTorch's recorded graph.
- ``torch_internals``: the few names of PyTorch that are not public; ``memory``: memory for large results.
- ``utils``, ``custom_module``, ``core``: helpers for users, under the original's names.
"""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from backpack import extensions
from backpack.context import (
    CTX,
    backpack,
    convert_module_to_backpack,
    disable,
    extend,
    memory_cleanup,
    results,
    unextend,
)
from backpack.dataset import RunningMean, accumulate, across_processes
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.inspection import summary, verify

__all__ = [
    "CTX",
    "BackpropExtension",
    "RunningMean",
    "accumulate",
    "across_processes",
    "backpack",
    "convert_module_to_backpack",
    "disable",
    "extend",
    "extensions",
    "memory_cleanup",
    "results",
    "summary",
    "unextend",
    "verify",
]

try:
    __version__ = _version("backpack-for-pytorch")
except _PackageNotFoundError:  # a copy of the folder, without an installation
    __version__ = "unknown"


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
