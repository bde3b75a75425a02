"""What each extended loss of a backward pass adds to the curvature, and how its extensions share pull-backs.

The curvature of a sum of losses is the sum of theirs, and its root has the columns of all their roots, in the order of
the calls. So the losses of a backward pass share a pull-back. Extensions that share their seeds do too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import Module

from backpack.backward.block import Block, without_autocast
from backpack.backward.collector import Prepared
from backpack.curvature.losses import LossRoot, in_float32, loss_gradient, loss_root
from backpack.graph import Edge
from backpack.graph.users_hooks import undisturbed
from backpack.graph.vmap_limits import counts_backward_passes
from backpack.modules.calls import Note
from backpack.modules.loss_calls import LossCall
from backpack.modules.thread_state import muted
from backpack.samples import AnyLayout, Layout
from backpack.torch_internals import is_fully_sharded

PASSES: dict[str, Any] = {}
"""The class of the pass for each way to pull curvature back, such as ``"sqrt"``. The files of the passes add them."""


@dataclass(eq=False)
class Term:
    """What the call of an extended loss adds to the curvature.

    ``outer``: the cotangent of the loss's output; ``layout``: where the samples lie in its input. Seeds are
    ``[v, n, d]``.
    """

    call: LossCall
    outer: Tensor
    layout: AnyLayout

    @cached_property
    def root(self) -> LossRoot:
        """The root of the loss's Hessian with respect to its input."""
        call = self.call
        with muted(), without_autocast(call.input.device):
            return loss_root(call.loss, call.input, self.layout, call.args, call.kwargs, self.outer)

    def none(self, count: int) -> Tensor:
        """As many seeds as ``count`` says, all zero."""
        size = prod(self.layout.split(self.call.input.detach().to("meta")).shape[1:])
        return self.call.input.new_zeros(count, self.layout.n, size)

    def grad(self) -> Tensor:
        """The gradient of the loss with respect to its input, ``[n, d]``."""
        call, create = self.call, torch.is_grad_enabled()
        with torch.enable_grad(), muted():
            point = call.input if create else call.input.detach().requires_grad_()
            grad = self.grad_at(point, create_graph=create)
        return self.layout.split(grad).reshape(self.layout.n, -1)

    def grad_at(self, point: Tensor, create_graph: bool) -> Tensor:
        """The gradient of the loss with respect to its input at ``point``, in the form of the input."""
        call = self.call
        return loss_gradient(call.loss, point, call.args, call.kwargs, self.outer, create_graph)

    def wide_grad(self) -> Tensor:
        """The gradient of the loss with respect to its input, ``[n, d]``; of 16 bits, it is computed in ``float32``."""
        call = self.call
        point, args, kwargs, outer = in_float32(call.loss, call.input.detach(), call.args, call.kwargs, self.outer)
        point = point.detach().requires_grad_()
        with torch.enable_grad(), muted():
            grad = loss_gradient(call.loss, point, args, kwargs, outer, create_graph=False)
        return self.layout.split(grad).reshape(self.layout.n, -1)

    def placed(self, seeds: Tensor, chosen: Tensor | None, is_selected: bool) -> Tensor:
        """Seeds ``[v, n, d]`` in the form of the loss's input, zero for all but the ``chosen`` samples.

        ``is_selected``: the form is that of an input with these samples alone.
        """
        layout = self.layout
        shape = layout.split(self.call.input).shape[1:]
        if chosen is not None and is_selected:
            seeds, layout = seeds[:, chosen], fewer(layout, len(chosen))
        elif chosen is not None:
            seeds = seeds * seeds.new_zeros(layout.n).index_fill(0, chosen, 1)[:, None]
        return layout.join(seeds.reshape(*seeds.shape[:2], *shape), leading=1).to(self.call.input.dtype)


def fewer(layout: AnyLayout, n: int) -> Layout:
    """The layout of a tensor with ``n`` of the samples."""
    assert isinstance(layout, Layout)
    return Layout(n, layout.axis)


def modules_of(notes: Mapping[Edge, Note]) -> Iterator[Module]:
    """The modules that left these notes, as far as they still exist."""
    return (module for note in notes.values() if (module := note.module()) is not None)


@dataclass(eq=False)
class Origin:
    """Where seeds begin: at the inputs of losses, whose curvatures add up.

    ``terms``: the losses, in the order of their calls; ``notes``: the notes of the calls of extended modules that their
    inputs come from, by the edge of their output; ``prepare``: the function that prepares a graph from some edges on,
    and returns it with the notes of module calls in it.
    """

    terms: Sequence[Term]
    prepared: Prepared
    notes: Mapping[Edge, Note]
    prepare: Callable[..., tuple[Prepared, Mapping[Edge, Note]]]
    module_io: dict[Node, list[Any]] = field(default_factory=dict)
    """The calls of modules, by the node that computed their output, if a block reads them."""

    def run(self, block: Block, chosen: Sequence[Any], last: bool = True) -> None:
        """Compute those second-order extensions of a block that are chosen; ``last``: there are no others left."""
        with undisturbed([term.call.input for term in self.terms]):
            self._run(block, chosen, last)

    def _run(self, block: Block, chosen: Sequence[Any], last: bool) -> None:
        for term in self.terms:
            self._check(term, block.loss_factor)
        roots = list(modules_of(self.notes))
        for extension in chosen:
            if extension.backprop != "sqrt" and any(is_fully_sharded(m) for root in roots for m in root.modules()):
                raise RuntimeError(
                    f"{type(extension).__name__} needs parts of the graph by themselves, for which fully_shard() does "
                    f"not gather parameters. Use a model without it, or another extension."
                )
        if any(extension.semidefinite for extension in chosen):
            notices = []
            for term in self.terms:
                term.root.require_semidefinite()
                notices.append(term.root.notice)
            if any(extension.seeds != "gradient" for extension in chosen):
                for notice in dict.fromkeys(filter(None, notices)):
                    warnings.warn(notice, stacklevel=2)
        groups: dict[Any, list[Any]] = {}
        for extension in chosen:
            how = (extension.seeds, extension.mc_samples, extension.chunk_size, extension.whole, extension.backprop)
            key = (extension.subset.key, *how)
            groups.setdefault(key, []).append(extension)
        for place, extensions in enumerate(groups.values()):
            is_last = last and place == len(groups) - 1 and not block.first_order and not block.with_rules
            with without_autocast(self.terms[0].call.input.device):
                PASSES[extensions[0].backprop](block, extensions, self, is_last).run()

    def _check(self, term: Term, factor: float) -> None:
        call, outer = term.call, term.outer
        loss = call.loss
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and counts_backward_passes(call.edge):
            raise RuntimeError(
                "DistributedDataParallel(static_graph=True) would take the pull-back of seeds for its first backward "
                "pass: leave static_graph out, or run one backward pass without second-order extensions before."
            )
        for value in call.further_arguments:
            if value.requires_grad:
                raise RuntimeError(
                    f"A further argument of {type(loss).__name__}, of shape {list(value.shape)}, requires a "
                    f"gradient: second-order extensions differentiate the loss by its first argument alone. "
                    f"Give it as .detach(), if its gradient is not wanted; or write a loss module of the model's whole "
                    f"output that computes both arguments, and extend() that."
                )
        if outer.dim() == 0 and outer.item() != factor:
            warnings.warn(
                f"The output of {type(loss).__name__} was multiplied by a factor ({outer.item():.3g}) before "
                f"backward(): second-order extensions are those of the loss itself, without the factor. "
                f"Let the loss be a module that multiplies by it, and extend() that.",
                stacklevel=2,
            )
