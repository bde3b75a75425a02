"""Kronecker factors by a combination of strategies."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from backpack.extensions.kronecker import FACTORS, KroneckerExtension


class HBP(KroneckerExtension[list[Tensor]]):
    """Kronecker factors by the strategies given: a list of tensors.

    For what they are and for ``approx``, see ``KroneckerExtension``. The instances that have a name:

    ============================ ======================== ====================
    ``loss_hessian_strategy``    ``backprop_strategy``    as
    ============================ ======================== ====================
    ``"sampling"``               ``"sqrt"``               ``KFAC(mc_samples)``
    ``"exact"``                  ``"sqrt"``               ``KFLR()``
    ``"sum"`` or ``"exact"``     ``"average"``            ``KFRA()``
    ============================ ======================== ====================

    ``"sampling"`` with ``"average"`` is KFRA with the loss's Hessian estimated from ``mc_samples`` labels.

    Other curvatures than ``"ggn"`` need ``"average"``: to the mean curvature that is pulled back through a module comes
    ``R``, the sum over samples of the second derivatives of the module, weighed by the gradient in its output (Dangel,
    Harmeling & Hennig, 2020, section 3). Modules with parameters must be linear in them. With ``"sqrt"``, ``R`` is left
    out, as the original does.

    Args:
        curv_type: ``"ggn"``, the generalized Gauss-Newton matrix; ``"hessian"``, with ``R``; ``"pch-abs"`` and
            ``"pch-clip"``, with the absolute values or positive parts of the eigenvalues of ``R`` (Chen & Hsieh, 2018).
        loss_hessian_strategy: ``"exact"``, ``"sampling"``, or ``"sum"`` (the Hessian summed over samples).
        backprop_strategy: ``"sqrt"`` (the columns of a root) or ``"average"`` (their mean after each module).
        ea_strategy: ``"E[J^T E(H) J]"``.

    Raises:
        ValueError: Any other strategy, or ``"sum"`` with ``"sqrt"``: the summed Hessian has no columns of samples.

    Warns:
        UserWarning: The factors are those of ``"ggn"``, since the columns of ``"sqrt"`` know no ``R``.
    """

    batches = FACTORS

    def __init__(
        self,
        curv_type: str,
        loss_hessian_strategy: str,
        backprop_strategy: str,
        ea_strategy: str,
        savefield: str = "hbp",
        mc_samples: int = 1,
        subsampling: Any = None,
        approx: str | None = None,
    ) -> None:
        _one_of("curv_type", curv_type, "ggn", "hessian", "pch-abs", "pch-clip")
        _one_of("loss_hessian_strategy", loss_hessian_strategy, "exact", "sampling", "sum")
        _one_of("backprop_strategy", backprop_strategy, "sqrt", "average")
        _one_of("ea_strategy", ea_strategy, "E[J^T E(H) J]")
        if loss_hessian_strategy == "sum" and backprop_strategy == "sqrt":
            raise ValueError(
                'loss_hessian_strategy="sum" needs backprop_strategy="average": a sum over samples has no columns of '
                'samples. Take "exact" for "sqrt".'
            )
        fisher = "mc" if loss_hessian_strategy == "sampling" else "exact"
        super().__init__(savefield, subsampling, None, mc_samples, approx, fisher)
        self.curv_type, self.loss_hessian_strategy = curv_type, loss_hessian_strategy
        self.backprop_strategy, self.ea_strategy = backprop_strategy, ea_strategy
        self.backprop = backprop_strategy
        if curv_type != "ggn":
            if backprop_strategy == "average":
                self.backprop = f"average {curv_type}"
            else:
                warnings.warn(
                    f'curv_type="{curv_type}" with backprop_strategy="sqrt" gives the factors of "ggn": columns of a '
                    f'root of the loss Hessian know no second derivatives of the model. Take "average" for these.',
                    stacklevel=2,
                )


def _one_of(name: str, given: str, *known: str) -> None:
    if given not in known:
        raise ValueError(f"HBP: {name} must be {' or '.join(map(repr, known))}, got {given!r}.")
