"""The functions that users call: ``extend`` a model and a loss, then run ``backward`` inside a ``backpack`` block."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar
from weakref import ref

from torch import Tensor
from torch.jit import ScriptModule
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from backpack.backward import STARTS, differentiate
from backpack.backward.block import Block
from backpack.curvature import compute_curvature, may_rerun_model
from backpack.extensions.backprop_extension import FIELDS, BackpropExtension, Result
from backpack.graph.users_hooks import guarded, note_retained
from backpack.memory import keep_what_is_freed
from backpack.modules.forward_hooks import EXTENDED, attach_all, detach, drop_interrupted
from backpack.modules.module_io import forget
from backpack.modules.thread_state import HERE
from backpack.samples import SampleIds
from backpack.torch_internals import checkpoints_explained, is_active

M = TypeVar("M", bound=Module)


def extend(module: M, debug: bool = False, use_converter: bool = False) -> M:
    """Prepare a module, in place, for the computations inside a ``backpack`` block.

    All submodules are extended as well. Extending twice changes nothing. The samples are counted along axis 0 of
    the first tensor that the module is called with (axis 1 for a recurrent layer with ``batch_first=False``); where
    that is cut into bags by offsets (``EmbeddingBag``), each bag is a sample.

    Args:
        module: A model, or a loss.
        debug: Print what is extended.
        use_converter: Accepted for compatibility; no conversion is needed.

    Returns:
        The module itself.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``, or a part of it was scripted or traced.
    """
    if isinstance(module, type) and issubclass(module, Module):
        raise TypeError(f"extend() takes an instance: write extend({module.__name__}(...)) instead of its class.")
    if not isinstance(module, Module):
        remedy = ": take the module instead, such as torch.nn.CrossEntropyLoss() for F.cross_entropy"
        raise TypeError(
            f"extend() takes a torch.nn.Module, got {getattr(module, '__name__', type(module).__name__)}"
            f"{remedy if callable(module) else ''}."
        )
    for name, child in module.named_modules():
        if isinstance(child, ScriptModule) and any(True for _ in child.parameters()):
            raise TypeError(
                f"{name or 'The module'} was compiled by torch.jit, which hides the functions that use its parameters: "
                f"extend the module that it was made from."
            )
    keep_what_is_freed()
    for name, child in module.named_modules() if debug else ():
        print(f"[DEBUG] Extending {name or 'the module'}: {type(child).__name__}")
    attach_all(module)
    return module


def unextend(module: M) -> M:
    """Undo ``extend``: no hook stays behind on the module, its submodules and parameters."""
    for child in module.modules():
        detach(child)
    return module


class backpack:
    """Context in which ``backward`` computes more than the gradient.

    The forward pass may run before. Blocks may be nested; the innermost one counts.

    Args:
        exts: What to compute.
        extension_hook: Called with each extended module without children once all results for it are stored,
            while the backward pass is still under way.
        debug: Print what is computed.
        retain_graph: Let ``module.input0`` and ``module.output`` stay readable after the backward pass.
        sample_ids: Which sample each leading entry of the extended model's output belongs to, as an integer tensor;
            ``-1``: to none. Results have one row for each number up to the largest, or as many as
            ``sample_ids=(ids, count)`` says. ``None``: each entry along the first axis is a sample.

    Raises:
        ValueError: An argument is no instance of an extension, or ``sample_ids`` holds no valid numbers.
        TypeError: ``sample_ids`` holds no integers.
    """

    def __init__(
        self,
        *exts: BackpropExtension,
        extension_hook: Callable[[Module], None] | None = None,
        debug: bool = False,
        retain_graph: bool = False,
        sample_ids: Any = None,
    ) -> None:
        for ext in exts:
            if isinstance(ext, type) and issubclass(ext, BackpropExtension):
                raise ValueError(f"backpack() takes instances: write {ext.__name__}() instead of {ext.__name__}.")
            if isinstance(ext, (list, tuple, set, dict)):
                raise ValueError("backpack() takes extensions one by one: write backpack(*extensions).")
            if not isinstance(ext, BackpropExtension):
                raise ValueError(f"backpack() takes extensions of backpack.extensions, got {type(ext).__name__}.")
        fields = [ext.savefield for ext in exts]
        for twice in {f for f in fields if fields.count(f) > 1}:
            raise ValueError(
                f"Two extensions in one block would both write to .{twice}: give one of them another savefield."
            )
        ids = None if sample_ids is None else SampleIds(sample_ids)
        if ids is not None and ids.leaves_out:
            exts = tuple(ext.among(ids.count) for ext in exts)
        self._arguments = (exts, extension_hook, debug, retain_graph, ids)

    def __enter__(self) -> None:
        drop_interrupted()
        block, blocks = Block(*self._arguments), HERE.blocks
        block.may_rerun_model = may_rerun_model(block)
        self._starts = Starts(block)

        def abandon(_: Any) -> None:
            """Nothing is left that could call ``__exit__``: an interrupt came when it was entered."""
            block.clear()
            if block in blocks:
                blocks.remove(block)

        block.manager = ref(self, abandon)
        blocks.append(block)
        self._starts.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._starts.__exit__(kind, value, trace)
        block = HERE.blocks.pop()
        block.manager = None
        block.clear()
        if HERE.blocks:
            HERE.blocks[-1].ran |= block.ran
        if kind is None and block.extensions and not block.ran:
            warnings.warn(
                "No backward pass of an extended module ran inside this backpack(...) block, so nothing was computed. "
                "Call extend(model) before the forward pass, and loss.backward() inside the block.",
                stacklevel=2,
            )


class Starts(TorchFunctionMode):
    """Intercepts calls inside of a block that start a backward pass, register a tensor's hook, or retain a gradient."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self._block = block

    def __exit__(self, *exception: Any) -> None:
        if is_active(self):
            super().__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in STARTS and HERE.blocks and HERE.blocks[-1] is self._block and not HERE.muted:
            with checkpoints_explained():
                return differentiate(self._block, compute_curvature, func, args, kwargs or {})
        if func is Tensor.register_hook:
            args = (args[0], guarded(args[1]))
        elif func is Tensor.retain_grad:
            note_retained(args[0])
        return func(*args, **(kwargs or {}))


class disable:
    """Context in which forward passes leave no notes."""

    def __enter__(self) -> None:
        HERE.disabled += 1

    def __exit__(self, *exception: Any) -> None:
        HERE.disabled -= 1

    @staticmethod
    def should_store_io() -> bool:
        """Whether forward passes leave notes at present."""
        return HERE.disabled == 0


class CTX:
    """Process-wide switches that scripts for the original use."""

    @staticmethod
    def remove_hooks() -> None:
        """Undo every ``extend`` of this process."""
        for module in list(EXTENDED):
            detach(module)


def memory_cleanup(module: Module) -> None:
    """Delete all results from the module's parameters, and what a retained graph left readable on its submodules."""
    for parameter in module.parameters():
        for field in FIELDS & vars(parameter).keys():
            delattr(parameter, field)
    for child in module.modules():
        forget(child)


def results(model: Module, extension: BackpropExtension[Result]) -> dict[str, Result]:
    """What an extension has stored on the parameters of a model, by parameter name, with its type.

    Parameters without a result (frozen ones, and those that the loss does not depend on) are left out. To read one
    parameter: ``extension.result(parameter)``.

    >>> import torch
    >>> from backpack.extensions import BatchGrad
    >>> model, individual = extend(torch.nn.Linear(2, 3)), BatchGrad(subsampling=[0, 1])
    >>> with backpack(individual):
    ...     model(torch.ones(8, 2)).sum().backward()
    >>> {name: list(g.shape) for name, g in results(model, individual).items()}
    {'weight': [2, 3, 2], 'bias': [2, 3]}
    """
    named = model.named_parameters()
    return {name: extension.result(p) for name, p in named if extension.savefield in vars(p)}


def convert_module_to_backpack(module: M, debug: bool) -> M:
    """Return the module: no conversion is needed."""
    return module
