"""Second order: roots of the loss Hessian are pulled back by autograd through whatever graph it recorded.

When the cotangent reaches the loss, columns of a root of its Hessian (*seeds*) are sent through the graph from the
loss's input on, some at a time, before the ordinary backward pass goes on. The same hooks as in first order bring
the cotangents to the uses of the parameters, now with a seed axis.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import Module
from torch.utils._pytree import tree_leaves, tree_map

from backpack.bystanders import drawing_again, forget_retained, run_again, undisturbed
from backpack.compat import is_fully_sharded, outside_vmap
from backpack.delivery import Delivery
from backpack.engine import HERE, MARK, Block, Ruled, by_rule, muted, trainable, without_autocast
from backpack.joined import Joined
from backpack.looped import Instead, counts_backward_passes, edges_from
from backpack.losses import LossRoot, loss_root
from backpack.memory import empty
from backpack.passages import Passage
from backpack.pooling import pooled
from backpack.recomputed import drop, is_dropped
from backpack.recorder import Call, Source, half_of, is_of_first_half, is_start, tensors_in
from backpack.samples import Layout, Subset, layouts
from backpack.uses import Derived, Individual

WIDEST = 2**23
"""Entries of the widest layer's output, over all seeds of one pass, that the automatic chunk size aims at."""


class Curvature(Ruled, Protocol):
    """What is needed to know of a second-order extension."""

    savefield: str
    subset: Subset
    reads: tuple[str, ...]
    seeds: str
    mc_samples: int
    chunk_size: int | None

    def compute(self, grads: Individual) -> Any:
        """The result of some seeds for one parameter."""

    additive: bool
    whole: bool
    backprop: str
    semidefinite: bool

    def merge(self, results: list[Any]) -> Any:
        """The result of all seeds, from those of some each."""

    def complete(self, result: Any, grads: Individual) -> Any:
        """Add to the result of all seeds what does not depend on them."""


@dataclass(eq=False)
class Origin:
    """What a forward pass of an extended module leaves at the node of each of its outputs.

    ``place``: of this output among the leaves of all; ``uses``: how often each source was used; ``calls``: all that
    were recorded; ``tensors``: parameters, and what was computed; ``widest``: entries of the largest output of one;
    ``arguments``: of the call, ``None`` if one was overwritten; ``grouped``: whether samples are no rows of them;
    ``output``: its values, where the module may have to run again, and ``random``: what was drawn from then. No node is
    held: what one of them holds would live forever if it held that node in turn.
    """

    n: int
    layout: Layout | None
    place: int
    uses: Counter[int]
    calls: list[ref[Call]]
    tensors: list[ref[Tensor]]
    widest: int
    root: ref[Module]
    arguments: tuple[Any, Any] | None
    input_axis: int

    def alive(self) -> list[Call]:
        """The calls that are still there."""
        return [call for found in self.calls if (call := found()) is not None]

    grouped: bool
    output: Tensor | None
    random: list[Tensor] | None


Found = list[tuple[GradientEdge, Origin]]
"""Outputs of extended modules."""


def landmarks(edge: GradientEdge, instead: Instead | None = None) -> tuple[Found, list[GradientEdge]]:
    """Where a graph passes outputs of extended modules; and where a pull-back may stop.

    It may at the first uses of parameters, and at inputs of extended modules.
    """
    found, ends = [], []
    for at in edges_from(edge, instead):
        metadata: Any = at.node.metadata
        origin = metadata.get((MARK, at.output_nr))
        if origin is not None:
            found.append((at, origin))
        if is_start(at):
            ends.append(at)
    return found, ends


def bystanders(found: Found) -> Iterator[ref[Tensor]]:
    """Parameters, and what was computed on the way to these outputs."""
    for tensors in {id(origin.tensors): origin.tensors for _, origin in found}.values():
        yield from tensors


@dataclass(eq=False)
class LossCall:
    """One call of an extended loss."""

    loss: Module
    input: Tensor
    edge: GradientEdge
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: Block, outer: Tensor) -> None:
        """Compute the second-order extensions of a block; ``outer`` is the cotangent of the loss."""
        found, ends = landmarks(self.edge)
        with undisturbed([self.input, *bystanders(found)]):
            self._run(block, outer, found, ends)

    def _run(self, block: Block, outer: Tensor, found: Found, ends: list[GradientEdge]) -> None:
        if not found:
            raise RuntimeError(
                f"The input of {type(self.loss).__name__} depends on no trainable parameter of an extended module: "
                f"second-order extensions need extend(model) before the forward pass, and parameters that are not "
                f"all frozen."
            )
        self._check(outer, block.loss_factor)
        output, origin = found[0]
        module = origin.root()
        for extension in block.second_order:
            if extension.backprop != "sqrt" and module is not None and any(map(is_fully_sharded, module.modules())):
                raise RuntimeError(
                    f"{type(extension).__name__} needs parts of the graph by themselves, for which fully_shard() does "
                    f"not gather parameters. Use a model without it, or another extension."
                )
        if origin.n == 0:
            raise RuntimeError(
                f"The input of {type(self.loss).__name__}, of shape {list(self.input.shape)}, comes from a batch of "
                f"size 0, which has no curvature."
            )
        block.check_subsets(origin.n, self.input.device)
        with muted():
            layout = self._layout(output, origin)

        @cache
        def root() -> LossRoot:
            with muted(), without_autocast(self.input.device):
                return loss_root(self.loss, self.input, layout, self.args, self.kwargs, outer)

        if any(extension.semidefinite for extension in block.second_order):
            root().require_semidefinite()
            notice = root().notice
            if notice is not None and any(extension.seeds != "gradient" for extension in block.second_order):
                warnings.warn(notice, stacklevel=2)
        groups: dict[Any, list[Any]] = {}
        for extension in block.second_order:
            how = (extension.seeds, extension.mc_samples, extension.chunk_size, extension.whole, extension.backprop)
            key = (extension.subset.key, *how)
            groups.setdefault(key, []).append(extension)
        for place, extensions in enumerate(groups.values()):
            last = place == len(groups) - 1 and not block.first_order and not block.with_rules
            with without_autocast(self.input.device):
                PASSES[extensions[0].backprop](block, extensions, self, root, layout, found, ends, outer, last).run()

    def grad(self, layout: Layout, outer: Tensor) -> Tensor:
        """The gradient of the loss with respect to its input, by samples, ``[n, d]``."""
        create = torch.is_grad_enabled()
        with torch.enable_grad():
            point = self.input if create else self.input.detach().requires_grad_()
            value = self.loss.forward(point, *self.args, **self.kwargs)
            (grad,) = torch.autograd.grad(value, point, outer if value.dim() else None, create_graph=create)
        return layout.split(grad).reshape(layout.n, -1)

    def _check(self, outer: Tensor, factor: float) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and counts_backward_passes(self.edge):
            raise RuntimeError(
                "DistributedDataParallel(static_graph=True) would take the pull-back of seeds for its first backward "
                "pass: leave static_graph out, or run one backward pass without second-order extensions before."
            )
        for value in tensors_in((self.args, self.kwargs)):
            if value.requires_grad:
                raise RuntimeError(
                    f"A further argument of {type(self.loss).__name__}, of shape {list(value.shape)}, requires a "
                    f"gradient: second-order extensions differentiate the loss by its first argument alone."
                )
        if outer.dim() == 0 and outer.item() != factor:
            warnings.warn(
                f"The output of {type(self.loss).__name__} was multiplied by a factor ({outer.item():.3g}) before "
                f"backward(): second-order extensions are those of the loss itself, without the factor.",
                stacklevel=2,
            )

    def _layout(self, output: GradientEdge, origin: Origin) -> Layout:
        """Where the samples lie in the input of the loss."""
        shape = self.input.shape
        axes = (0,) if isinstance(self.loss, torch.nn.CrossEntropyLoss) else range(len(shape))
        possible = layouts(shape, origin.n, axes)
        if self.edge == output:
            possible = [layout for layout in possible if layout == origin.layout]
        elif origin.n > 1:
            possible = [layout for layout in possible if self._fits(layout, output, origin)]
        if len(possible) != 1 and not (possible and origin.n == 1):
            raise RuntimeError(
                f"The input of {type(self.loss).__name__}, of shape {list(shape)}, does not show where the {origin.n} "
                f"samples lie: let them be counted by its first axis, alone or together with the positions, and let "
                f"nothing between the model and the loss mix samples."
            )
        return possible[0]

    def _fits(self, layout: Layout, output: GradientEdge, origin: Origin) -> bool:
        """Whether the first half of the samples, in this layout, comes from the first half of the module's output."""
        seed = half_of(self.input, layout)
        (grad,) = torch.autograd.grad(self.edge, output, seed, retain_graph=True)
        return origin.layout is not None and is_of_first_half(grad, origin.layout)


@dataclass(eq=False)
class SeedPass:
    """Seeds of one kind, for extensions that share them, pulled back chunk by chunk.

    ``outer``: the cotangent of the loss. ``last``: nothing else will be computed for the block, so that modules are
    done when this pass is through them.
    """

    block: Block
    extensions: list[Curvature]
    loss: LossCall
    make_root: Callable[[], LossRoot]
    layout: Layout
    found: Found
    ends: list[GradientEdge]
    outer: Tensor
    last: bool
    delivery: Delivery = field(default_factory=Delivery)
    results: dict[tuple[int, int], list[Any]] = field(default_factory=dict)
    first: bool = True
    final: bool = False
    gathered: bool = False
    selected: bool = False
    batched: bool = True
    batchable: bool = True
    count: int = 0
    start: int = 0
    weights: Tensor | None = None
    finished: set[int] = field(default_factory=set)
    waiting: list[tuple[Call, Source]] = field(default_factory=list)
    late: list[Call] = field(default_factory=list)
    twice = False
    """Whether the model is differentiated twice, so that it is run again where it has fused functions."""

    def __post_init__(self) -> None:
        self.joined = Joined(self.loss.edge)

    def run(self) -> None:
        """Pull back all seeds and store the results."""
        self.subset = self.extensions[0].subset
        edge, rows = self.loss.edge, self.subset.rows(self.layout.n, self.loss.input.device)
        select: Tensor | None = None
        if rows is not None:
            own = self._rerun(rows)
            if own is not None:
                edge, select, self.subset, self.selected = own, rows, Subset(), True
                self.joined, (self.found, self.ends) = Joined(edge), landmarks(edge)
        self.uses = self._count_uses()

        def pull() -> None:
            for number, seeds in self._chunks(edge):
                self.final = number >= self.columns
                self._pull([edge], self.ends, [self._place(seeds, rows, select)])
                if self.final or not self.gathered:
                    self._finish()
                    self.first = False

        HERE.inner = self
        try:
            try:
                pull()
            except RuntimeError:
                if not self.batched:
                    raise
                self._clear()  # a node that looped.py does not know cannot take seeds together, or memory was short
                self.batchable, self.first = False, True
                pull()
        finally:
            HERE.inner = None
            self._clear()

    def _clear(self) -> None:
        for store in (self.delivery, self.results, self.finished, self.waiting, self.late):
            store.clear()

    def _count_uses(self) -> Counter[int]:
        """How often each parameter is used."""
        uses: Counter[int] = Counter()
        for own in unique(origin.uses for _, origin in self.found):
            uses.update(own)
        return uses

    def _chunks(self, edge: GradientEdge) -> Iterator[tuple[int, Tensor]]:
        """Seeds ``[v, n, d]``, some at a time, and how many have been given by then."""
        whole = self.extensions[0].whole
        chunk = 1 if self.columns == 1 and not whole else self._chunk(edge)
        self.gathered = whole and chunk == 1
        if whole and not self.gathered:
            chunk = self.columns
        passes = -(-self.columns // chunk)
        chunk = -(-self.columns // max(1, passes))  # equally many in each
        for start in range(0, self.columns, chunk):
            self.start, stop = start, min(start + chunk, self.columns)
            yield stop, self._seeds(start, stop)
        if self.columns == 0:
            yield 0, self.loss.input.new_zeros(1, self.layout.n, self.loss.input.numel() // self.layout.n)

    def _chunk(self, edge: GradientEdge) -> int:
        """How many seeds are pulled back from an edge at a time."""
        if torch.is_grad_enabled() or not self.batchable or self.joined.must_loop(edge):
            return 1
        return self.extensions[0].chunk_size or max(3, WIDEST // max(origin.widest for _, origin in self.found))

    def _seeds(self, start: int, stop: int) -> Tensor:
        """Some of the seeds, ``[v, n, d]``."""
        kind = self.extensions[0].seeds
        if kind == "gradient":
            return self.root.weighed(self.loss.grad(self.layout, self.outer))[None]
        if kind == "sampled":
            drawn = [self.root.sampled() for _ in range(start, stop)]
            return torch.stack(drawn) / self.columns**0.5 if self.columns > 1 else drawn[0][None]
        return getattr(self.root, kind)(start, stop)

    @property
    def root(self) -> LossRoot:
        """Of the loss's Hessian."""
        return self.make_root()

    @property
    def columns(self) -> int:
        """The number of seeds."""
        first = self.extensions[0]
        if first.seeds in ("sampled", "gradient"):
            return first.mc_samples if first.seeds == "sampled" else 1
        return self.root.columns if first.seeds == "exact" else self.root.documented_columns

    def _place(self, seeds: Tensor, rows: Tensor | None, select: Tensor | None) -> Tensor:
        """``[v, n, d]`` in the form of the loss's input; of the selected samples only."""
        layout = self.layout
        shape = layout.split(self.loss.input).shape[1:]
        if select is not None:
            seeds, layout = seeds[:, select], replace(layout, n=len(select))
        elif rows is not None:
            chosen = torch.zeros(layout.n, dtype=seeds.dtype, device=seeds.device)
            chosen[rows] = 1
            seeds = seeds * chosen[:, None]
        return layout.join(seeds.reshape(*seeds.shape[:2], *shape), leading=1).to(self.loss.input.dtype)

    def _pull(self, edges: list[GradientEdge], ends: list[GradientEdge], seeds: list[Tensor]) -> Tensor:
        """Send seeds, given at each of the edges, through the graph.

        Returns the cotangents that reach the last of the ends (``[v]``: none do).
        """
        create = torch.is_grad_enabled()

        def pull(*seed: Tensor) -> Tensor:
            found = self.joined.grad(edges, ends, seed, create_graph=create)
            return seed[0].new_zeros(()) if found[-1] is None else found[-1]

        self.count = len(seeds[0])
        self.batched = self.count > 1
        try:
            if not self.batched:
                return pull(*(seed[0] for seed in seeds))[None]
            with pooled(() if self.block.reads_passages else self.joined.pooling, self.count, [*edges, *ends]):
                return torch.vmap(pull, randomness="same")(*seeds)  # recomputed activations may draw dropout again
        finally:
            forget_retained()

    def _rerun(self, rows: Tensor | None, rounded: bool = False) -> GradientEdge | None:
        """The graph of the selected samples alone, where running the module on them gives the same output.

        ``rounded``: it was computed in 16 bits before, and is not now.
        """
        edge, origin = self.found[0]
        if edge != self.loss.edge or self.layout.factor > 1 or len(self.found) > 1:
            return None
        outputs = self._run_again(origin, rows)
        expected = self.loss.input if rows is None else self.loss.input.index_select(self.layout.axis, rows)
        if outputs is None or not agree(outputs[origin.place], expected, rounded):
            return None
        return get_gradient_edge(outputs[origin.place])

    def _run_again(self, origin: Origin, rows: Tensor | None) -> list[Any] | None:
        """All outputs of a module, of the selected samples alone, if it can run again."""
        root = origin.root()
        if root is None or origin.arguments is None:
            return None
        if any(map(is_fully_sharded, root.modules())):
            return None  # processes would not gather parameters in step
        if rows is not None and (origin.grouped or any(map(is_observed, root.modules()))):
            return None  # samples can't be selected, or what a hook has kept would be replaced

        def select(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            for axis in (origin.input_axis, 0):
                if rows is not None and value.dim() > axis and value.shape[axis] == origin.n:
                    return value.index_select(axis, rows)
            return value

        args, kwargs = tree_map(select, origin.arguments)
        with torch.enable_grad(), drawing_again(origin.random), run_again(root):
            try:
                return tree_leaves(root(*args, **kwargs))
            except (RuntimeError, ValueError):  # shapes: of a state of all samples, of what counts on all
                return None

    def receive(self, call: Call, place: int, grads: Tensor) -> None:
        """Note cotangents of one of a call's outputs; finish parameters that have no other use."""
        for source in self.delivery.receive(call, place, grads):
            if (
                not self.gathered
                and self.uses[id(source.tensor)] == 1
                and source.tensor.grad_fn is None
                and call.outputs == 1
            ):
                if call.recomputed:
                    self.waiting.append((call, source))
                else:
                    self._compute(source)
        if call.recomputed:
            self.late.append(call)
        if self.waiting:
            self._compute_recomputed()

    def _compute_recomputed(self) -> None:
        """Parameters whose inputs have come back since; then these may go again."""
        ready = [(call, source) for call, source in self.waiting if not is_dropped(call)]
        self.waiting = [pair for pair in self.waiting if pair not in ready]
        for _, source in ready:
            self._compute(source)
        for call, _ in ready:
            if not any(id(source.tensor) in self.delivery.arrivals for source, _ in call.uses):
                drop(call)

    def _finish(self) -> None:
        """Parameters with several uses, and those behind computed tensors."""
        HERE.inner, HERE.muted = None, True
        try:
            for source in self.delivery.computed():
                grads = self.delivery.fetch(source.tensor).individual(self.subset)
                for parameter in source.parameters:
                    derived = Derived(grads, source.tensor, parameter)
                    self.delivery.derive(source, parameter, self.subset.key, derived)
            for source in list(self.delivery.sources.values()):
                self._compute(source)
            self.delivery.clear()
            for call in self.late:
                drop(call)
        finally:
            self.waiting.clear()
            self.late.clear()
            HERE.inner, HERE.muted = self, False

    def _compute(self, source: Source) -> None:
        parameter = source.tensor
        contributions = self.delivery.fetch(parameter)
        extensions = [extension for extension in self.extensions if not by_rule(extension, parameter)]
        for extension in extensions:
            if extension.has_rules_only and self.final:
                extension.missing(source.name)
        extensions = [extension for extension in extensions if not extension.has_rules_only]
        if extensions:
            if self.first:
                for extension in extensions:
                    vars(parameter).pop(extension.savefield, None)  # its memory is needed for the new result
            grads = contributions.individual(self.subset)
            if self.weights is not None:
                rows = self.subset.rows(self.weights.shape[1], self.weights.device)
                grads = grads.weighted(self.weights if rows is None else self.weights[:, rows])
            rooms = [self._room(extension, parameter, grads) for extension in extensions]
            grads.room = next((room for room in rooms if room is not None), None)
            grads.prepare(name for extension in extensions for name in extension.reads)
            self._add(parameter, grads, extensions)
        if self.final and self.last:
            self.finished.add(id(parameter))
            self.block.owners_done(parameter, self.finished)

    def _add(self, parameter: Tensor, grads: Individual, extensions: list[Curvature]) -> None:
        """Add what some seeds give to the results of a parameter."""
        values: list[Any] = []
        for extension in extensions:
            value = self._value(extension, grads)
            room = self._room(extension, parameter, grads)
            results = self.results.setdefault((id(extension), id(parameter)), [])
            if room is None:
                # Results are merged in place: none may be another's.
                values.append(value.clone() if any(value is other for other in values) else value)
                results.append(values[-1])
            elif value is grads.room:
                grads.room = None  # it is where it belongs; what further extensions keep of it are copies
            else:
                room.copy_(value)
            if len(results) > 1 and extension.additive:
                results[:] = [extension.merge(results)]
            if self.final:
                del self.results[id(extension), id(parameter)]  # whoever takes it may free it
                merged = extension.merge(results) if len(results) > 1 else results[0]
                self.block.store(parameter, extension.savefield, extension.complete(merged, grads))

    def _room(self, extension: Curvature, parameter: Tensor, grads: Individual) -> Tensor | None:
        """Where the columns of these seeds, of more to come, belong in a result that keeps those of all."""
        seeds, samples = grads.size
        if extension.additive or torch.is_grad_enabled() or seeds >= self.columns:
            return None
        results = self.results.setdefault((id(extension), id(parameter)), [])
        if not results:
            results.append(empty((self.columns, samples, *parameter.shape), parameter))
        return results[0][self.start : self.start + seeds]

    def _value(self, extension: Curvature, grads: Individual) -> Any:
        """What some seeds give to the result of an extension."""
        return extension.compute(grads)

    def module_passed(self, passage: Passage, g_out: tuple[Tensor | None, ...]) -> None:
        """The cotangents of a module's outputs have arrived."""
        module = passage.module
        for extension in self.extensions:
            if extension.rules and extension.rule_for(module) is not None:
                if len(g_out) > 1 or g_out[0] is None:
                    raise RuntimeError(
                        f"{type(module).__name__} has several outputs: {type(extension).__name__} can't take a rule "
                        f"for it. Do without the rule: none is needed for any module."
                    )
                tap(self, partial(self._keep, (id(extension), id(module))), g_out[0])
        if self.final and self.last:
            known = None if self.selected else passage  # that of the selected samples is not what users expect
            if not trainable(module):
                self.block.module_done(module, known)
            elif known is not None:
                self.block.passages[id(module)] = known

    def _keep(self, key: tuple[int, int], grads: Tensor) -> None:
        """Note the cotangents ``[v, n, ...]`` of a module's output for a rule."""
        rows = None if self.selected else self.subset.rows(self.layout.n, grads.device)
        self.block.pulled.setdefault(key, []).append(grads if rows is None else grads.index_select(1, rows))


PASSES: dict[str, type[SeedPass]] = {"sqrt": SeedPass}
"""How curvature is pulled back: the root's columns by themselves; other files add a mean over the batch, and what has
second derivatives of the model."""


def tap(running: SeedPass, receive: Callable[[Tensor], None], grad: Tensor) -> None:
    """Bring a cotangent to the running pass, as ``[v, ...]``."""
    if running.batched:
        with outside_vmap(grad, running.count) as grads:
            receive(grads)
    else:
        receive(grad[None])


def is_observed(module: Module) -> bool:
    """Whether a user's hook runs with a module's forward pass."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    names = [getattr(hook, "__module__", None) or "" for hook in hooks]
    return not all(name.startswith(("backpack.", "torch.")) for name in names)


def agree(output: Tensor, expected: Tensor, rounded: bool = False) -> bool:
    """Whether two outputs differ by rounding only; ``rounded``: the expected one was computed in 16 bits."""
    if rounded:
        output, expected = output.bfloat16(), expected.bfloat16()
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    size = max(1e-30, expected.abs().max().item())
    same = output.shape == expected.shape and output.dtype == expected.dtype
    return same and torch.allclose(output, expected, rtol=tolerance, atol=tolerance * size)


def unique(counters: Iterable[Counter[int]]) -> list[Counter[int]]:
    """Each object once."""
    return list({id(counter): counter for counter in counters}.values())
