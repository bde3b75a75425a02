"""One batch of a data set: its forward and its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from backpack.backward.block import without_autocast
from backpack.context import backpack, disable, extend
from backpack.curvature.losses.denominators import denominator as of_loss
from backpack.dataset.batch_contents import apply, moved, samples_of, split
from backpack.dataset.batches import Batch
from backpack.dataset.collection import Collection, parameters_of, part_of
from backpack.dataset.model_loss import ModelLoss
from backpack.modules.forward_hooks import EXTENDED
from backpack.modules.loss_calls import is_known_loss
from backpack.modules.parameters import SHARDED
from backpack.modules.thread_state import HERE
from backpack.torch_internals import is_fully_sharded


@dataclass(eq=False)
class BatchPass:
    """Runs the model and a backward pass on one batch after the other, and collects the results.

    ``forward``, ``denominator`` and ``scaler`` are those of ``accumulate``. ``chosen`` holds, by ``savefield``, the
    numbers of the samples that an extension selects, if it does not select all.
    """

    model: Module
    lossfunc: Any
    collection: Collection
    forward: Callable[[Module, Any], tuple[Tensor, Any]] | None
    denominator: Callable[[Any], float] | None
    scaler: Any
    chosen: dict[str, Tensor] = field(default_factory=dict)
    samples: int | None = None
    """How many samples the data set has, where that is known."""
    counted: list[int] = field(default_factory=list)
    factor: float = 1.0
    """The factor with which the gradients of the current batch enter those of the data set."""
    with_gradients: bool = True
    """Whether gradients are wanted: without, a pass from one of PyTorch's losses ends at the model's output."""

    def __post_init__(self) -> None:
        extend(self.model)
        if not isinstance(self.lossfunc, ModelLoss):
            extend(self.lossfunc)
        self.sharded = [module for module in self.model.modules() if is_fully_sharded(module)]
        for module in self.sharded:
            module.reshard()  # type: ignore[operator]
        self.trainable = parameters_of(self.model)
        self.device = next(iter(self.trainable.values())).device

    @property
    def is_sum(self) -> bool:
        """Whether the loss is not divided by anything."""
        return getattr(self.lossfunc, "reduction", None) == "sum"

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note the number of samples at each call of the model."""

        def count(module: Module, args: Any, kwargs: Any) -> None:
            self.counted.append(samples_of((args, kwargs), EXTENDED[module].batch_axis))

        with self.model.register_forward_pre_hook(count, with_kwargs=True):
            yield

    def divided(self, content: Any) -> float:
        """What the loss of a batch divides its sum by, if possible without running the model."""
        if self.denominator is not None:
            return float(self.denominator(content))
        if self.forward is None:
            return of_loss(self.lossfunc, None, split(content)[1])
        if self.sharded:
            raise ValueError("With forward= and fully_shard(), pass denominator= as well.")
        with torch.set_grad_enabled(isinstance(self.lossfunc, ModelLoss)), disable():
            output, target = self.forward(self.model, moved(content, self.device))
        return of_loss(self.lossfunc, output, target)

    def run(self, batch: Batch, reference: float) -> tuple[Tensor, float]:
        """Run one batch and collect its results; returns its loss, and what this loss divides its sum by.

        The latter, divided by ``reference``, is the weight of the batch in the loss of the whole data set.
        """
        content = moved(batch.content, self.device)
        self.counted.clear()
        output, target = (self.forward or apply)(self.model, content)
        if batch.rows is not None and self.counted[:1] != [batch.rows]:
            raise ValueError(
                f"The first tensor of a batch has {batch.rows} samples, but the model was called with "
                f"{self.counted[:1]}: let the model's first tensor come first in the batch."
            )
        if self.denominator is not None:
            divided = float(self.denominator(batch.content))
        else:  # from the targets on the CPU, if they came there: no need to wait for the GPU
            divided = of_loss(self.lossfunc, output, target if self.forward else split(batch.content)[1])
        with self._finite(divided):
            loss = self.lossfunc(output, target)
            if loss.dim():
                raise ValueError(f"The loss must be reduced to a number; it has shape {list(loss.shape)}.")
            self._differentiate(loss, output, (divided or 1.0) / reference, batch)
        return loss.detach(), divided

    @contextmanager
    def _finite(self, divided: float) -> Iterator[None]:
        """Let the loss be a sum, which is zero, if it would divide by zero since no entry of the batch counts."""
        if divided:
            yield
            return
        reduction, self.lossfunc.reduction = self.lossfunc.reduction, "sum"
        try:
            yield
        finally:
            self.lossfunc.reduction = reduction

    def _differentiate(self, loss: Tensor, output: Any, factor: float, batch: Batch) -> None:
        collection = self.collection
        ends = not (self.with_gradients or self.sharded) and isinstance(output, Tensor) and output.requires_grad
        ends = ends and is_known_loss(self.lossfunc)  # another may stand for a loss inside of the model
        scale = 1.0
        if self.scaler is not None:
            loss, scale = self.scaler.scale(loss), self.scaler.get_scale()
        parts = {
            extension.savefield: part_of(
                extension, self.chosen.get(extension.savefield), batch.numbers, factor, scale, self.samples
            )
            for extension in collection.extensions
        }
        for part in parts.values():
            if not batch.counts:
                part.places = None
        # All processes of a sharded model pull back the same columns.
        wanted = [part.extension for part in parts.values() if self.sharded or part.places is not None]
        self.factor = factor / scale if batch.counts else 0.0
        with without_autocast(self.device), backpack(*wanted, sample_ids=batch.ids):
            HERE.blocks[-1].loss_factor = scale
            HERE.blocks[-1].taker = partial(collection.take, parts)
            HERE.blocks[-1].only = None if collection.only is None else collection.wants
            if ends:
                torch.autograd.grad(loss, output)
            else:
                self._backward_sharded(loss) if self.sharded else self._backward(loss)
        if self.scaler is not None and not collection.gradients_are_finite():
            raise OverflowError(
                f"A gradient, scaled by {scale:g}, is not finite: give the scaler a smaller init_scale."
            )
        collection.merge(parts)

    def _take_gradient(self, name: str, grad: Tensor) -> Tensor | None:
        """Add the gradient of a large parameter at once; PyTorch gets a tensor without memory in its place."""
        if HERE.muted or HERE.inner is not None or grad.is_sparse:
            return None
        self.collection.add_gradients({name: grad}, self.factor)
        return grad.new_zeros(()).expand(grad.shape)

    def _backward(self, loss: Tensor) -> None:
        """Collect the gradients of one batch, without touching ``.grad``."""
        parameters, large = self.collection.parameters, self.collection.large
        hooks = [parameters[name].register_hook(partial(self._take_gradient, name)) for name in large]
        try:
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        named = zip(parameters, grads, strict=True)
        left = {name: grad for name, grad in named if grad is not None and (name not in large or grad.is_sparse)}
        self.collection.add_gradients(left, self.factor)

    def _backward_sharded(self, loss: Tensor) -> None:
        """As ``_backward``, for a sharded model, which reduces gradients only when they arrive at ``.grad``."""
        found: set[str] = set()
        before = {name: parameter.grad for name, parameter in self.trainable.items()}
        handles = []

        def take(name: str, grad: Tensor) -> None:
            found.add(name)
            self.collection.add_gradients({name: grad}, self.factor)

        for whole in SHARDED:
            name = self.collection.name_of(whole)
            if name is not None:
                handles.append(whole.register_hook(partial(take, name)))
        try:
            for parameter in self.trainable.values():
                parameter.grad = None
            loss.backward()
            own = self.collection.parameters
            left = {name: p.grad for name, p in own.items() if name not in found and p.grad is not None}
            self.collection.add_gradients(left, self.factor)
        finally:
            for handle in handles:
                handle.remove()
            for name, parameter in self.trainable.items():
                parameter.grad = before[name]
