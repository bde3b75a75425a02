"""BackPACK: what autograd throws away, in the same backward pass.

``extend(model)`` and ``extend(lossfunc)``, then ``with backpack(BatchGrad()): loss.backward()``, and read
``p.grad_batch`` on each parameter. The package, from the outside in:

- ``context``: what users call.
- ``dataset``: the quantities of a whole data set.
- ``verification``, ``summaries``: before a long run.
- ``extensions``: the quantities, one a file.
- ``engine``: the backward pass; ``recorder``: the forward pass; ``seeds``: the second order.
- ``operations``: how PyTorch's functions use their parameters, one family a file.
- ``uses``: the few forms of such uses, and what can be computed of each.
- ``passages``: what users' rules and hooks can read of the forward pass.
- ``samples``: where samples lie in tensors, and subsets of them.
- ``compat``: the few names of PyTorch that are not public.
- ``utils``, ``custom_module``, ``core``: helpers for users, under the original's names.
"""

from backpack import extensions
from backpack.context import CTX, backpack, convert_module_to_backpack, disable, extend, memory_cleanup, unextend
from backpack.dataset import accumulate, across_processes
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.inspection import summary, verify

__all__ = [
    "CTX",
    "BackpropExtension",
    "accumulate",
    "across_processes",
    "backpack",
    "convert_module_to_backpack",
    "disable",
    "extend",
    "extensions",
    "memory_cleanup",
    "summary",
    "unextend",
    "verify",
]
