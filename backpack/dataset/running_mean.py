"""Running means over steps of what an extension computes, by parameter name."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from backpack.context import results
from backpack.extensions import EKFAC, BatchDotGrad, GaussNewtonStep, GGNGram, Variance
from backpack.extensions.backprop_extension import BackpropExtension, Result
from backpack.extensions.matrix_products import MatrixProduct
from backpack.extensions.merge_batches import Joined, Listed, Summed, wide
from backpack.samples import Subset


class RunningMean(Mapping[str, Result]):
    """Mean over steps of what an extension stores, a mapping of parameter names to results.

    ``update(model)`` after each backward pass adds what is on the parameters then. With ``decay``, results of ``k``
    steps before have ``decay**k`` times the weight of the last ones; weights add up to one from the first step on, as
    in Adam (Kingma & Ba, 2015, section 3). With ``decay=None``, all steps have the same weight. Of lists of Kronecker
    factors, each factor has its own mean. Means of 16-bit results are in ``float32``.

    A parameter without a result in a step, as an expert that no sample was sent to, keeps its mean and its weights: its
    mean is over those steps that it took part in. What was read stays as it is when further steps are added. ::

        diagonal = DiagGGNMC()
        mean = RunningMean(diagonal, decay=0.95)
        for X, y in batches:
            with backpack(diagonal):
                lossfunc(model(X), y).backward()
            mean.update(model)
            mean["0.weight"]

    Args:
        extension: One whose results are sums or means over samples: tensors, or lists of tensors. Passes may run
            another instance, as with another ``subsampling``, if it has the same ``savefield``.
        decay: From 0 (the last step alone) to 1, or ``None``.

    Raises:
        TypeError: ``extension`` is no instance of an extension.
        ValueError: Its results do not add up, or ``decay`` is not within its bounds.
    """

    def __init__(self, extension: BackpropExtension[Result], decay: float | None = 0.95) -> None:
        if not isinstance(extension, BackpropExtension):
            raise TypeError(f"RunningMean() takes an instance of an extension, as DiagGGNMC(); got {extension!r}.")
        if not isinstance(extension.batches, (Summed, Listed)):
            raise ValueError(f"RunningMean() takes results that add up, and {extension!r} {_why(extension)}.")
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and less than 1, or None for a plain mean; got {decay}.")
        self.extension, self.decay = extension, decay
        self._means: dict[str, Any] = {}
        self._steps: dict[str, int] = {}

    def __getitem__(self, name: str) -> Result:
        mean: Result = self._means[name]
        return mean

    def __iter__(self) -> Iterator[str]:
        return iter(self._means)

    def __len__(self) -> int:
        return len(self._means)

    def __repr__(self) -> str:
        return f"RunningMean({self.extension!r}, decay={self.decay})"

    def update(self, model: Module) -> None:
        """Add what the last backward pass stored on the parameters of ``model``; call it once for each pass.

        Raises:
            ValueError: No parameter has a result, or the model has other parameters than before.
        """
        found: dict[str, Any] = results(model, self.extension)
        if not found:
            raise ValueError(
                f"No parameter of the model has .{self.extension.savefield}: run backward() inside of "
                f"backpack({self.extension!r}) before update()."
            )
        gone = self._means.keys() - dict(model.named_parameters()).keys()
        if gone:
            raise ValueError(
                f"The model has no parameter {min(gone)!r}, of which there is a mean already: update() takes the same "
                f"model in each step. Begin another RunningMean for another model."
            )
        for name in found.keys() & self._means.keys():
            shapes, before = ([list(t.shape) for t in _listed(value)] for value in (found[name], self._means[name]))
            if shapes != before:
                raise ValueError(
                    f"The result of parameter {name} has the shape {shapes}, and its mean {before}: update() takes the "
                    f"same model in each step. Begin another RunningMean for another model."
                )
        for name, result in found.items():
            step = self._steps[name] = self._steps.get(name, 0) + 1
            new = [wide(tensor.detach()) for tensor in _listed(result)]
            old = _listed(self._means[name]) if step > 1 else new
            means = [_weighted(a, b, self._weight(step)) for a, b in zip(old, new, strict=True)]
            self._means[name] = means if isinstance(result, list) else means[0]

    def _weight(self, step: int) -> float:
        """That of the last of so many steps."""
        return 1 / step if self.decay is None else (1 - self.decay) / (1 - self.decay**step)

    def state_dict(self) -> dict[str, Any]:
        """The state, of tensors, lists, dictionaries, numbers and strings.

        ``means`` and ``steps`` are by parameter name.
        """
        return {
            "extension": _kind(self.extension),
            "decay": self.decay,
            "steps": dict(self._steps),
            "means": dict(self._means),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state as if there had been no interruption.

        Raises:
            ValueError: The state is of another extension or ``decay``.
        """
        own = {"extension": _kind(self.extension), "decay": self.decay}
        if not {*own, "steps", "means"} <= state.keys():
            raise ValueError(f"This is no state of a RunningMean; its keys are {', '.join(map(repr, state))}.")
        for key, value in own.items():
            if state[key] != value:
                raise ValueError(
                    f"The state of the RunningMean has the {key} {state[key]}, and this one {value}: give both "
                    f"the same."
                )
        self._steps, self._means = dict(state["steps"]), dict(state["means"])


def _listed(value: Any) -> list[Tensor]:
    return value if isinstance(value, list) else [value]


def _weighted(old: Tensor, new: Tensor, weight: float) -> Tensor:
    """The mean of two tensors, with this weight of the new one, in new memory."""
    return new.clone() if weight == 1 else torch.lerp(old.to(new), new, weight)


def _kind(extension: BackpropExtension) -> str:
    """What says which numbers an extension computes: the call that makes it, without what may differ in each step."""
    plain = copy.copy(extension)
    plain.subset = Subset()
    vars(plain).pop("savefield", None)
    if "chunk_size" in vars(plain):
        vars(plain)["chunk_size"] = None
    return repr(plain)


def _why(extension: BackpropExtension) -> str:
    """Why results do not add up, and what to do instead."""
    if isinstance(extension.batches, Joined) or isinstance(extension, (BatchDotGrad, GGNGram)):
        return (
            "has results of single samples, which are others in each step. Take what sums over samples, as "
            "DiagGGNExact in place of BatchDiagGGNExact or SumGradSquared in place of BatchGrad"
        )
    if isinstance(extension, EKFAC):
        return "has another basis in each step. Average KFAC, and decompose the mean by utils.kroneckers.eigh_kfacs()"
    if isinstance(extension, Variance):
        return "has none. Average SumGradSquared, and subtract the square of the mean gradient in the end"
    if isinstance(extension, GaussNewtonStep):
        return "has a step, solved for with one batch. Average KFAC, and take the step that its mean gives"
    if isinstance(extension, MatrixProduct):
        return "has functions. Average a diagonal or KFAC"
    return "does not say that its do. If they are sums over samples, set batches = Summed(degree) in its class"
