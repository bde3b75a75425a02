"""The sum of clipped individual gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.merge_batches import BatchShare, Summed
from backpack.modules.parameters import name_of
from backpack.samples import Subset
from backpack.uses import Individual

Rule = Callable[[Tensor], Tensor]
"""Takes the norms ``[N]`` of individual gradients to the factors ``[N]`` that these are multiplied by."""


class ClippedGrad(BackpropExtension[Tensor]):
    """Sum of the individual gradients, each clipped to a norm over all parameters, ``grad_clipped`` of shape ``p``.

    Sample ``n``'s gradient, as ``BatchGrad`` scales it, is multiplied by ``min(1, max_norm / norm_n)``, where
    ``norm_n`` is its Euclidean norm over all parameters that receive a gradient. The individual gradients are not
    stored; inputs and cotangents of all layers are held until the backward pass ends. The clipping of DP-SGD (Abadi et
    al., 2016, Algorithm 1). After a backward pass, ``norms`` has the norms of all selected samples.

    Args:
        max_norm: The bound. With groups, one for each of them if it is a sequence.
        per: Over what the norms are taken: ``"model"``, all parameters; ``"parameter"``, each of them by itself; or
            groups, as a sequence of collections of parameters (or of their names).
        rule: A function of the norms ``[N]`` that returns the factors ``[N]`` in place of ``max_norm``, such as
            ``lambda norms: 1 / (norms + 0.01)`` (Bu et al., 2023, section 3.2).
        per_sample: Whether norms are those of the samples' own losses: in a mean over ``N`` samples, ``N`` times those
            of their shares in it. ``grad_clipped`` has the scale of the loss in any case. The loss must be extended.

    Raises:
        TypeError: ``rule`` is no function.
        ValueError: ``max_norm`` is not positive, or neither it nor ``rule`` is given, or both; ``per`` is none of
            these, or has another number of groups than ``max_norm`` has bounds. In the backward pass: a parameter is in
            no group or in several; ``rule`` returns something else.
    """

    savefield = "grad_clipped"
    reads = ("norms",)
    needs_all_parameters = True
    bounds_influence = True
    batches = Summed(1)
    fixes_scale = True

    def __init__(
        self,
        max_norm: float | Sequence[float] | None = None,
        subsampling: Any = None,
        savefield: str | None = None,
        per: str | Sequence[Iterable[Tensor | str]] = "model",
        rule: Rule | None = None,
        per_sample: bool = False,
    ) -> None:
        super().__init__(savefield, subsampling=subsampling)
        if isinstance(per, str) and per not in ("model", "parameter"):
            raise ValueError(f"per must be 'model', 'parameter' or a sequence of groups of parameters, got {per!r}.")
        if (max_norm is None) == (rule is None):
            raise ValueError("ClippedGrad takes either max_norm, a bound, or rule, a function of the norms.")
        if rule is not None and not callable(rule):
            raise TypeError(f"rule must be a function that takes norms [N] to factors [N], got {rule!r}.")
        self.max_norm, self.rule, self.per_sample = max_norm, rule, per_sample
        self.per = per if isinstance(per, str) else [list(group) for group in per]
        self.needs_own_losses = per_sample
        bounds = list(max_norm) if isinstance(max_norm, Sequence) else [max_norm]
        if any(bound is not None and not bound > 0 for bound in bounds):
            raise ValueError(f"max_norm must be positive, got {max_norm}.")
        if isinstance(max_norm, Sequence) and (isinstance(self.per, str) or len(bounds) != len(self.per)):
            raise ValueError(
                f"max_norm has {len(bounds)} bounds: give one, or as many as there are groups of parameters in per."
            )
        self._factor, self._samples = 1.0, 0
        self._norms: dict[Any, Tensor] = {}

    @property
    def norms(self) -> Any:
        """Norms of the last backward pass, ``[N]``; for each group, or parameter by name, if there are several.

        Raises:
            AttributeError: There was no backward pass.
        """
        if not self._norms:
            raise AttributeError(f"There are no norms yet: call backward() inside of backpack({self!r}).")
        if self.per == "model":
            return self._norms[0]
        return dict(self._norms) if self.per == "parameter" else [self._norms[k] for k in sorted(self._norms)]

    def check(self, parameters: Sequence[Tensor], samples: int) -> None:
        for parameter in [] if isinstance(self.per, str) else parameters:
            count = sum(_is_in(parameter, name_of(parameter), group) for group in self.per)
            if count != 1:
                raise ValueError(
                    f"ClippedGrad: parameter {name_of(parameter)} of shape {list(parameter.shape)} is in {count} of "
                    f"the groups in per. Each parameter must be in one; freeze with requires_grad_(False) what is not "
                    f"to be clipped."
                )

    def group_of(self, parameter: Tensor, name: str) -> Any:
        """The group of a parameter: equal for those over which a norm is taken."""
        if self.per == "model":
            return 0
        if self.per == "parameter":
            return name
        return next(k for k, group in enumerate(self.per) if _is_in(parameter, name, group))

    def measure(self, grads: Individual) -> Tensor:
        return grads.norms()[0]

    def combine(self, measures: dict[Tensor, Tensor], samples: int | None) -> dict[Any, Tensor]:
        squares: dict[Any, list[Tensor]] = {}
        for parameter, squared in measures.items():
            squares.setdefault(self.group_of(parameter, name_of(parameter)), []).append(squared)
        scale = self._factor * ((self._samples or samples or 1) if self.per_sample and samples is not None else 1)
        self._norms.clear()
        for group, own in squares.items():
            total = torch.stack([squared.to(own[0]) for squared in own]).sum(0)
            self._norms[group] = total.sqrt() * scale
        return {group: self.factors(group, norms) for group, norms in self._norms.items()}

    def factors(self, group: Any, norms: Tensor) -> Tensor:
        """What the gradients of a group are multiplied by, given their norms ``[N]``."""
        if self.rule is None:
            bound = self.max_norm[group] if isinstance(self.max_norm, Sequence) else self.max_norm
            assert bound is not None
            return bound / norms.clamp(min=bound)
        factors = self.rule(norms)
        if not isinstance(factors, Tensor) or factors.shape != norms.shape:
            raise ValueError(
                f"ClippedGrad: rule must take norms of shape {list(norms.shape)} to a tensor of factors of this shape; "
                f"it returned {list(factors.shape) if isinstance(factors, Tensor) else factors!r}."
            )
        return factors

    def compute_jointly(self, grads: Individual, joint: dict[Any, Tensor]) -> Tensor:
        group = self.group_of(grads.parameter, name_of(grads.parameter))
        return grads.weighted_total(joint[group].to(grads.parameter.device))

    def on_batch(self, share: BatchShare) -> ClippedGrad:
        part = self.with_subset(Subset(share.rows))
        part._norms = {}
        part._factor, part._samples = share.factor, share.samples or 0
        return part


def _is_in(parameter: Tensor, name: str, group: Sequence[Tensor | str]) -> bool:
    return any(member is parameter or (isinstance(member, str) and member == name) for member in group)
