"""A call of an extended loss: from its input on, seeds are pulled back when the cotangent reaches its output.

What has to hold for that is checked here: the input comes from an extended module, and shows where its samples lie.
Extensions that share their seeds share a pass.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import Module

from backpack.bystanders import undisturbed
from backpack.compat import is_fully_sharded
from backpack.engine import Block, muted, without_autocast
from backpack.landmarks import Found, Origin, bystanders, landmarks
from backpack.looped import counts_backward_passes
from backpack.losses import LossRoot, loss_root
from backpack.recorder import half_of, is_of_first_half, tensors_in
from backpack.samples import Layout, layouts

PASSES: dict[str, Any] = {}
"""How curvature is pulled back: the root's columns by themselves (``SeedPass``), their mean over the batch, with second
derivatives of the model. The files of the passes add them."""


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
