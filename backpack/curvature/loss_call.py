"""A call of an extended loss: from its input on, seeds are pulled back.

What has to hold for that is checked here: the input comes from an extended module, and shows where its samples lie.
Extensions that share their seeds share a pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Module

from backpack.backward.collector import Prepared
from backpack.bystanders import undisturbed
from backpack.compat import is_fully_sharded
from backpack.engine import Block, muted, without_autocast
from backpack.graph import Graph, edge_of
from backpack.graph.looped import counts_backward_passes
from backpack.losses import LossRoot, loss_root
from backpack.samples import AnyLayout, Layout
from backpack.samples.notes import Note, leaves_of

PASSES: dict[str, Any] = {}
"""How curvature is pulled back: the root's columns by themselves (``SeedPass``), their mean over the batch, with second
derivatives of the model. The files of the passes add them."""

LOSS = "backpack loss"


def has_second_derivatives_of_model(block: Block) -> bool:
    """Whether an extension of a block may have to run the model again, with functions that have second derivatives."""
    return any(PASSES[extension.backprop].twice for extension in block.second_order)


@dataclass(eq=False)
class LossCall:
    """One call of an extended loss."""

    loss: Module
    input: Tensor
    edge: GradientEdge
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def place(self) -> tuple[Node, int]:
        """The edge of the input, as a key."""
        return edge_of(self.edge)

    def grad(self, layout: AnyLayout, outer: Tensor) -> Tensor:
        """The gradient of the loss with respect to its input, by samples, ``[n, d]``."""
        create = torch.is_grad_enabled()
        with torch.enable_grad():
            point = self.input if create else self.input.detach().requires_grad_()
            value = self.loss.forward(point, *self.args, **self.kwargs)
            (grad,) = torch.autograd.grad(value, point, outer if value.dim() else None, create_graph=create)
        return layout.split(grad).reshape(layout.n, -1)


def leave_loss(loss: Module, args: Any, kwargs: Any, output: Tensor) -> None:
    """Note at the node that computed the output of a loss what it was called with."""
    kwargs = dict(kwargs)
    input, args = (args[0], args[1:]) if args else (kwargs.pop("input", None), args)
    if not isinstance(input, Tensor) or not input.requires_grad or output.grad_fn is None:
        return
    node = input.grad_fn
    if node is output.grad_fn:  # handed through: a node must not hold itself
        return
    edge = get_gradient_edge(input) if node is None else GradientEdge(node, input.output_nr)
    metadata: Any = output.grad_fn.metadata
    metadata[LOSS] = output.output_nr, LossCall(loss, input, edge, args, kwargs)


def losses_in(graph: Graph) -> Iterator[tuple[Node, int, LossCall]]:
    """The calls of losses whose outputs are in a graph."""
    for node, left in graph.notes.items():
        if LOSS in left:
            yield node, *left[LOSS]


@dataclass(eq=False)
class Origin:
    """Where seeds begin: at the input of a loss.

    ``notes``: of the calls of extended modules that it comes from, by the edge of their output; ``prepare``: gives
    what is known of the graph from an edge on, with the notes of module calls in it.
    """

    call: LossCall
    prepared: Prepared
    notes: Mapping[tuple[Node, int], Note]
    prepare: Callable[..., tuple[Prepared, Mapping[tuple[Node, int], Note]]]
    passed: dict[Node, list[Any]] = field(default_factory=dict)
    """The calls of modules, by the node that computed their output, where a block reads them."""

    def run(self, block: Block, outer: Tensor) -> None:
        """Compute the second-order extensions of a block; ``outer`` is the cotangent of the loss."""
        with undisturbed([self.call.input]):
            self._run(block, outer)

    def _run(self, block: Block, outer: Tensor) -> None:
        self._check(outer, block.loss_factor)
        loss, input = self.call.loss, self.call.input
        modules = [module for note in self.notes.values() if (module := note.module()) is not None]
        for extension in block.second_order:
            if extension.backprop != "sqrt" and any(is_fully_sharded(m) for one in modules for m in one.modules()):
                raise RuntimeError(
                    f"{type(extension).__name__} needs parts of the graph by themselves, for which fully_shard() does "
                    f"not gather parameters. Use a model without it, or another extension."
                )
        layout = self.prepared.begin[self.call.place]
        assert isinstance(layout, Layout)

        @cache
        def root() -> LossRoot:
            with muted(), without_autocast(input.device):
                return loss_root(loss, input, layout, self.call.args, self.call.kwargs, outer)

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
            with without_autocast(input.device):
                PASSES[extensions[0].backprop](block, extensions, self, root, outer, last).run()

    def _check(self, outer: Tensor, factor: float) -> None:
        loss = self.call.loss
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and counts_backward_passes(self.call.edge):
            raise RuntimeError(
                "DistributedDataParallel(static_graph=True) would take the pull-back of seeds for its first backward "
                "pass: leave static_graph out, or run one backward pass without second-order extensions before."
            )
        for value in leaves_of((self.call.args, self.call.kwargs)):
            if isinstance(value, Tensor) and value.requires_grad:
                raise RuntimeError(
                    f"A further argument of {type(loss).__name__}, of shape {list(value.shape)}, requires a "
                    f"gradient: second-order extensions differentiate the loss by its first argument alone."
                )
        if outer.dim() == 0 and outer.item() != factor:
            warnings.warn(
                f"The output of {type(loss).__name__} was multiplied by a factor ({outer.item():.3g}) before "
                f"backward(): second-order extensions are those of the loss itself, without the factor.",
                stacklevel=2,
            )
