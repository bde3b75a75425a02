"""The forward pass: which functions use which parameters, on which samples.

While an extended module runs, every PyTorch function that it calls passes through a ``Recording``. A call that
combines a parameter with data is recorded, as a ``Call``, and its output gets a hook that hands the cotangent on
during the backward pass. A tensor that is computed from parameters alone (a parametrized weight, a sum of
adapters) is a source like a parameter: its uses are recorded, and its individual gradients are pulled on to the
parameters.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from backpack.bystanders import Guarding, guarded, undisturbed
from backpack.operations import EXPANDED, REPLACED, RULES
from backpack.samples import Layout, Rows, layouts
from backpack.uses import PullbackUse, Use

START = "backpack start"
CALL = "backpack call"
_REGISTER_HOOK = Tensor.register_hook


@dataclass(eq=False)
class Source:
    """A parameter, or a tensor computed from parameters alone (``parameters`` says which)."""

    tensor: Tensor
    parameters: tuple[Tensor, ...]
    name: str
    parents: tuple[Source, ...] = ()
    discarded: bool = False

    @property
    def void(self) -> bool:
        """Whether it turned out to hold samples after all."""
        return self.discarded or any(parent.void for parent in self.parents)


class Parameters:
    """Those of a module, by their numbers: what each is as a source, and a weak reference."""

    def __init__(self, sources: Iterable[Source] = ()) -> None:
        self.sources = {id(source.tensor): source for source in sources}
        self.references = [ref(source.tensor) for source in self.sources.values()]


@dataclass(eq=False)
class Call:
    """One call that combines sources with data: its uses, and where the samples lie in its output."""

    function: Any
    n: int
    sources: list[Source]
    layouts: Sequence[Layout]
    shape: torch.Size
    outputs: int
    problem: str | None = None
    uses: list[tuple[Source, Use]] = field(default_factory=list)
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    alternative: Source | None = None
    """The output as a tensor without samples, where the shapes allow that too."""
    recomputed: bool = False
    """Whether its inputs are freed until a checkpointed region is computed again."""
    edges: list[list[GradientEdge | None]] | None = None
    """Then, of the data of each use; what comes back is cut off from the graph."""

    @property
    def name(self) -> str:
        """For messages."""
        return f"{_name(self.function)} of parameter {' and '.join(dict.fromkeys(s.name for s in self.sources))}"

    @property
    def layout(self) -> Layout:
        """The only layout that is left."""
        return self.layouts[0]

    def check(self) -> None:
        """Raise where the samples of this call cannot be told apart, or its inputs were overwritten."""
        if self.problem is not None:
            raise RuntimeError(f"{self.name} {self.problem}.")
        for tensor, version in self.versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"An input of {self.name}, of shape {list(tensor.shape)}, was modified in place after it was used: "
                    f"the individual gradients of the parameter need its old value. Use an out-of-place operation."
                )

    def rows(self, index: Tensor | None) -> Rows:
        return Rows(self.layout, index)


class Recording(Guarding):
    """One forward pass of an extended module.

    Args:
        parameters: Of the module.
        inputs: All that the module is called with; axis ``axis`` of the first tensor counts the samples.
        axis: The sample axis of that tensor.
        deliver: Called with each call and each of its outputs; attaches what brings the cotangent.
        settled: What earlier passes have found out about layouts.
        replace: Replace fused functions by others, which have second derivatives.
        modes: Which parts of the module are in training mode: what it does to samples is checked once for each choice.
    """

    def __init__(
        self,
        parameters: Parameters,
        inputs: Any,
        axis: int,
        deliver: Callable[[Call, int, Tensor, torch.Size], None],
        settled: dict[Any, tuple[Any, ...]],
        replace: bool = False,
        modes: tuple[bool, ...] = (),
    ) -> None:
        super().__init__()
        self._deliver, self.replace = deliver, replace
        self.fused = False
        self.random: list[Tensor] | None = None
        self._settled = settled
        self.sources = parameters.sources.copy()
        tensors = tensors_in(inputs)
        self.data = {id(tensor): ref(tensor) for tensor in tensors}
        self._first = next((t for t in tensors if t.dim() > axis), None)
        self.n: int | None = None if self._first is None else self._first.shape[axis]
        self.grouped = False
        self.uses: dict[int, int] = {}
        self.calls: list[ref[Call]] = []
        self.tensors = parameters.references.copy()
        self.inputs = [get_gradient_edge(t) for t in tensors if t.requires_grad]
        for edge in self.inputs:
            mark_start(edge)
        self.widest = 1
        self._anchor: tuple[GradientEdge, Layout, torch.Size] | None = None
        self._undecided: list[tuple[Any, Call, GradientEdge]] = []
        self._unchecked: list[tuple[Call, GradientEdge]] = []
        self._mode = ("samples apart", modes)
        self._count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in REPLACED:
            self.fused = True
            if self.replace:
                with self:
                    out = REPLACED[func](*args, **kwargs)
                if out is not NotImplemented:
                    return out
        if func in EXPANDED:  # there may be fused functions in it, also where all its parameters are frozen
            with self:
                return looked_into(func)(*args, **kwargs)
        if func is _REGISTER_HOOK:
            args = (args[0], guarded(args[1]))
        tensors = among(args, kwargs)
        known = self.sources
        sources = list(filter(None, map(known.get, map(id, tensors))))
        if not sources:
            out = func(*args, **kwargs)
            for result in [out] if isinstance(out, Tensor) else among((out,), {}):
                if result.requires_grad:
                    self.tensors.append(ref(result))
                elif any(map(self._is_data, tensors)):
                    self.data[id(result)] = ref(result)
            return out
        given = args
        if func not in RULES and is_in_place(func) and id(args[0]) not in self.sources:
            given = (args[0].clone(), *args[1:])
        out = func(*args, **kwargs)
        if id(out) in known and not is_in_place(func):
            return out  # the argument itself, as of ``weight.type_as(x)``: no use yet
        results = [ref(o) for o in ([out] if isinstance(out, Tensor) else among((out,), {})) if o.requires_grad]
        self.tensors += results
        if results and torch.is_grad_enabled():
            self._observe(func, given, kwargs, out, tensors, sources)
        return out

    def _is_data(self, tensor: Tensor) -> bool:
        """Whether a tensor is computed from the samples."""
        if id(tensor) in self.sources:
            return False
        if tensor.requires_grad:
            return True
        known = self.data.get(id(tensor))
        return known is not None and known() is tensor

    def _may_be_data(self, tensor: Tensor) -> bool:
        """Whether a constant has a first axis of the samples' number."""
        return id(tensor) not in self.sources and tensor.dim() > 0 and tensor.shape[0] == self.n

    def _observe(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        tensors: list[Tensor],
        sources: list[Source],
    ) -> None:
        if any(map(self._is_data, tensors)):
            self._record(func, args, kwargs, out, tensors, sources)
        elif any(map(self._may_be_data, tensors)) or self._spreads(sources, out):
            self._derive(sources, out)
            self._record(func, args, kwargs, out, tensors, sources, self.sources[id(out)])
        else:
            self._derive(sources, out)

    def _spreads(self, sources: list[Source], out: Any) -> bool:
        """Whether sources without a sample axis were copied to one a sample, as it seems."""
        if not self.n or self.n == 1 or not isinstance(out, Tensor):
            return False
        for source in (s.tensor for s in sources):
            own = [1] * (out.dim() - source.dim()) + list(source.shape)
            grown = [size for size, before in zip(out.shape, own, strict=False) if before == 1 and size % self.n == 0]
            if source.numel() >= out.numel() or not grown:
                return False
        return True

    def _derive(self, sources: list[Source], out: Any) -> None:
        parameters = tuple({id(p): p for s in sources for p in s.parameters}.values())
        name = " and ".join(dict.fromkeys(s.name for s in sources))
        for tensor in among((out,), {}):
            if tensor.requires_grad and id(tensor) not in self.sources:
                self.sources[id(tensor)] = Source(tensor, parameters, name, tuple(sources))

    def _record(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        tensors: list[Tensor],
        sources: list[Source],
        alternative: Source | None = None,
    ) -> None:
        given, outputs = out, [out] if isinstance(out, Tensor) else among((out,), {})
        out = outputs[0]
        rule = RULES.get(func)
        operation = None if rule is None else rule(given, *args, **kwargs)
        axes = range(out.dim()) if operation is None else operation.axes
        found: Sequence[Layout] = ()
        problem = None
        grouped = operation.grouped if operation is not None and not self.calls else ()
        if grouped and any(tensor is self._first for tensor in grouped):
            self.n, self.grouped = out.shape[0], True
        if self.n is None:
            problem = "cannot be told by samples, since the module was called without a tensor"
        elif self.n == 0:
            problem = "has a batch of size 0, which has no individual gradients"
        else:
            found = layouts(out.shape, self.n, axes)
            if operation is not None and operation.broadcast and self.n > 1:
                found = [f for f in found if not any(_occupies(s.tensor, out, f.axis) for s in sources)]
            if given is not out and operation is None:
                problem = "returns several tensors, and there is no rule for it"
            elif not found:
                problem = (
                    f"has an output of shape {list(out.shape)}, in which no axis of the {self.n} samples can be found "
                    f"(the samples are counted along the first axis of the first tensor given to the extended module)"
                )
        if len(sources) > 1:
            sources = list(dict.fromkeys(sources))
        call = Call(func, self.n or 0, sources, found, out.shape, len(outputs), problem, alternative=alternative)
        if operation is not None and operation.refused is not None:
            call.problem = operation.refused
        explained, uses = operation.uses if operation is not None else (), call.uses
        for source in sources:
            before = len(uses)
            for tensor, use in explained:
                if tensor is source.tensor:
                    uses.append((source, use))
            if len(uses) == before:
                if given is not out and call.problem is None:
                    call.problem = "returns several tensors, of which the parameter is no weight"
                uses += [(source, use) for use in self._pullbacks(func, args, kwargs, source, call)]
        call.versions = [(t, t._version) for _, use in call.uses for t in use.recorded() if not t.is_inference()]
        bases = [_own_base(output, args) for output in outputs]
        self._decide(call, bases[0], len(axes))
        self.calls.append(ref(call))
        counts = self.uses
        for source, _ in call.uses:
            for parameter in source.parameters:
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
        returned = list(map(id, outputs))  # as what is overwritten is
        above = [t for t in tensors if t.requires_grad and id(t) not in self.sources and id(t) not in returned]
        for place, (output, base) in enumerate(zip(outputs, bases, strict=True)):
            if output.requires_grad:
                self.widest = max(self.widest, output.numel())
                mark_call(base, call, first=not above and bool(call.uses))
                self._deliver(call, place, base, output.shape)

    def _pullbacks(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], source: Source, call: Call
    ) -> Iterator[Use]:
        """The function's own vector-Jacobian product, for each place that the source is given at."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        possible = [
            (place, leaf)
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and call.n and layouts(leaf.shape, call.n, range(leaf.dim()))
        ]
        data = [place for place, leaf in possible if self._is_data(leaf)]
        computed = [(place, self.sources[id(leaf)]) for place, leaf in possible if id(leaf) in self.sources]
        spread = [(place, partial(getattr, other, "void")) for place, other in computed if other is not source]
        function = _out_of_place(func) if is_in_place(func) else func
        for place, leaf in enumerate(leaves):
            if leaf is source.tensor:
                yield PullbackUse(function, leaves, spec, place, data, spread)

    def _decide(self, call: Call, out: Tensor, axes: int) -> None:
        """Choose the layout; where the shapes leave a choice, that is done when the module has run."""
        self._count += 1
        found = call.layouts
        certain = len(found) == 1 and (axes == 1 or (found[0].axis == 0 and found[0].factor == 1))
        if not found:
            if call.alternative is not None:
                call.problem = None
                self._adopt(call, [])
            return
        if call.n == 1:
            self._adopt(call, found)
            return
        if certain and call.alternative is None:
            if self._mode not in self._settled and call.problem is None and out.requires_grad:
                self._unchecked.append((call, get_gradient_edge(out)))
            if self._anchor is None and out.requires_grad:
                self._anchor = (get_gradient_edge(out), found[0], call.shape)
            return
        key = (self.replace, self._count, call.name, tuple((f.axis, f.factor > 1, f.strided) for f in found))
        known = self._settled.get(key)
        if known is None:
            self._undecided.append((key, call, get_gradient_edge(out)))
        else:
            self._adopt(call, [f for f in found if (f.axis, f.factor > 1, f.strided) == known])

    def _adopt(self, call: Call, layouts: Sequence[Layout]) -> None:
        """Keep these layouts only; none: the output holds no samples."""
        if layouts:
            call.layouts = layouts
            if call.alternative is not None:
                call.alternative.discarded = True
        else:
            call.uses = []
        call.alternative = None  # it holds the output, whose hook holds the call

    def settle(self, outputs: list[tuple[Tensor, Layout]]) -> None:
        """Decide between the layouts that the shapes allow, by which entries the first half of the samples reaches.

        ``outputs``: those of the module, and where their samples lie.
        """
        undecided, self._undecided, unchecked, self._unchecked = self._undecided, [], self._unchecked, []
        if not undecided and not unchecked:
            return
        calls = [call for _, call, _ in undecided] + [call for call, _ in unchecked]
        edges = [edge for _, _, edge in undecided] + [edge for _, edge in unchecked]
        grads: Sequence[Tensor | None] = [None] * len(edges)
        if outputs:
            seeds = [half_of(output, layout) for output, layout in outputs]
            with undisturbed(self.tensors), suppress(RuntimeError):  # the samples can't be told then
                grads = torch.autograd.grad(
                    [output for output, _ in outputs], edges, seeds, retain_graph=True, allow_unused=True
                )
            self._settled[self._mode] = ()
        grads = [None if grad is None else grad.reshape(call.shape) for call, grad in zip(calls, grads, strict=True)]
        for (key, call, edge), grad in zip(undecided, grads, strict=False):
            self._choose(key, call, grad)
            call.alternative = None
            if not call.uses:  # it holds no samples
                unmark_start(edge)
        for (call, _), grad in zip(unchecked, grads[len(undecided) :], strict=True):
            if grad is not None and not grad.isnan().any() and not is_of_first_half(grad, call.layout):
                self._settled.pop(self._mode, None)
                call.problem = (
                    "belongs to a module in which samples are mixed, as by BatchNorm in training mode: what is "
                    "computed of one depends on others, so that no gradient belongs to one of them. Call .eval() on "
                    "what mixes them, or replace it by something that treats each sample by itself"
                )

    def layout_of(self, output: Tensor, place: int, axis: int) -> Layout | None:
        """Where the samples lie in an output of the module; ``None`` if that cannot be told.

        They are looked for along ``axis``; failing that, by what the output depends on.
        """
        if not self.n or output.dim() == 0:
            return None
        if output.dim() > axis and output.shape[axis] == self.n:
            return Layout(self.n, axis)
        possible = layouts(output.shape, self.n, range(output.dim()))
        key = (place, tuple((f.axis, f.factor > 1, f.strided) for f in possible))
        if key in self._settled:
            possible = [f for f in possible if (f.axis, f.factor > 1, f.strided) == self._settled[key]]
        elif self.n > 1:
            possible = [layout for layout in possible if self._anchored(output, layout)]
        if len(possible) != 1:
            return None
        self._settled[key] = (possible[0].axis, possible[0].factor > 1, possible[0].strided)
        return possible[0]

    def _anchored(self, output: Tensor, layout: Layout) -> bool:
        """Whether the first half of the samples, in this layout, depends on the first half of a certain call."""
        if self._anchor is None:
            return False
        edge, known, shape = self._anchor
        half = half_of(output, layout)
        grad: Tensor | None = None
        with undisturbed(self.tensors), suppress(RuntimeError):
            (grad,) = torch.autograd.grad(output, edge, half, retain_graph=True, allow_unused=True)
        return grad is not None and bool(grad.any()) and is_of_first_half(grad.reshape(shape), known)

    def _choose(self, key: Any, call: Call, grad: Tensor | None) -> None:
        if grad is None or not grad.any():
            if len(call.layouts) > 1 or call.alternative is not None:
                call.problem = (
                    f"has an output of shape {list(call.shape)} that may hold {call.n} samples in several ways, and "
                    f"the module's output does not tell which: let it have the samples along its first axis"
                )
            return
        fitting = [layout for layout in call.layouts if is_of_first_half(grad, layout)]
        if len(fitting) == 1:
            self._adopt(call, fitting)
            self._settled[key] = (fitting[0].axis, fitting[0].factor > 1, fitting[0].strided)
        elif not fitting and call.alternative is not None:
            self._adopt(call, [])
            self._settled[key] = ()
        else:
            call.problem = (
                f"has an output of shape {list(call.shape)} in which the {call.n} samples cannot be told apart: "
                + ("each of them depends on others" if not fitting else "several axes may hold them")
            )


def mark_start(edge: GradientEdge) -> None:
    """Note at a node that a pull-back may stop there; what held the nodes could be held by one of them."""
    metadata: Any = edge.node.metadata
    metadata[(START, edge.output_nr)] = True


def unmark_start(edge: GradientEdge) -> None:
    """Undo ``mark_start``."""
    metadata: Any = edge.node.metadata
    metadata.pop((START, edge.output_nr), None)


def mark_call(output: Tensor, call: Call, first: bool) -> None:
    """Note at a node that it computed the output of a call; ``first``: that a pull-back may stop there."""
    metadata: Any = output.grad_fn.metadata  # type: ignore[union-attr]
    metadata[(CALL, output.output_nr)] = ref(call)
    if first:
        metadata[(START, output.output_nr)] = True


def call_at(edge: GradientEdge) -> Call | None:
    """The call whose output an edge stands for."""
    metadata: Any = edge.node.metadata
    found = metadata.get((CALL, edge.output_nr))
    return None if found is None else found()


def is_start(edge: GradientEdge) -> bool:
    """Whether a pull-back may stop at an edge: it is a first use of a parameter, or an input of an extended module."""
    metadata: Any = edge.node.metadata
    return (START, edge.output_nr) in metadata


def _occupies(source: Tensor, out: Tensor, axis: int) -> bool:
    """Whether a broadcast parameter has an axis of its own where the samples would be."""
    place = axis - (out.dim() - source.dim())
    return place >= 0 and source.shape[place] != 1


def _own_base(out: Tensor, args: tuple[Any, ...]) -> Tensor:
    """What a function computed, where it returns a view of that in another shape, as ``F.linear`` does for sequences.

    An operation in place on the view would take the view's own node out of the graph.
    """
    base = out._base
    if base is None or base.grad_fn is None or base.numel() != out.numel():
        return out
    given = any(base is tensor or base is tensor._base for tensor in among(args, {}))
    return base if base.is_contiguous() and out.is_contiguous() and not given else out


def among(args: Iterable[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """All tensors among the arguments, one level of lists deep."""
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += [entry for entry in value if isinstance(entry, Tensor)]
    return found


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of a nested structure."""
    if isinstance(value, Tensor):
        return [value]
    if type(value) in (tuple, list):
        return [tensor for entry in value for tensor in tensors_in(entry)]
    if value is None or (type(value) is dict and not value):
        return []
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def half_of(output: Tensor, layout: Layout) -> Tensor:
    """Entries between 0.5 and 2.5 in the first half of the samples, zero in the others."""
    seed = torch.arange(output.numel(), device=output.device).cos().add(1.5).to(output.dtype).reshape(output.shape)
    return seed * (layout.owners(output.shape, output.device) < layout.n // 2)


def is_of_first_half(grad: Tensor, layout: Layout) -> bool:
    """Whether all entries but those of the first half of the samples are zero."""
    others = layout.owners(grad.shape, grad.device) >= layout.n // 2
    return not bool((grad.ne(0) & others).any())


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func)).strip("_")


def is_in_place(func: Any) -> bool:
    """Whether a function overwrites its first argument."""
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name not in ("__invert__",))


def _out_of_place(func: Any) -> Callable[..., Any]:
    return lambda first, *args, **kwargs: func(first.clone(), *args, **kwargs)


@cache
def looked_into(func: Any) -> Callable[..., Any]:
    """A Python function of PyTorch that does not hand itself to a mode as a whole."""
    scope = {**func.__globals__, "has_torch_function": lambda tensors: False}
    inner = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    inner.__kwdefaults__ = func.__kwdefaults__
    return inner
