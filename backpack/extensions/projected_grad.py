"""Random projections of individual gradients."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.merge_batches import Joined
from backpack.modules.parameters import is_transposed_kernel, name_of
from backpack.uses import Derived, Individual
from backpack.utils.eigen import applied_to_vectors, exchanges_axes
from backpack.utils.kroneckers import Eigen, apply_kfac_mat_prod
from backpack.utils.projections import KINDS, Projection, generator_of

Scale = Tensor | list[Tensor] | Eigen
"""What multiplies a gradient: its entries one by one, a Kronecker product, or one in its eigenbasis."""


class ProjectedGrad(BackpropExtension[Tensor]):
    """Random projections of the individual gradients, ``grad_projected`` of shape ``[N, k]`` with ``k <= dim``.

    Dot products of projections are, on average over seeds, those of the gradients, as ``BatchGrad`` scales them. A
    gradient, seen as a matrix ``G[r c]``, is projected from both sides, to ``R^T G C`` with ``a`` rows and ``b``
    columns (``k = a b``, about ``sqrt(dim)`` each). No individual gradient is formed in linear layers, convolutions and
    tables. A side that is no longer than its projection stays as it is. The variance of a squared norm, relative to
    its square, is at most ``(1 + 2/a) (1 + 2/b) - 1`` (Johnson & Lindenstrauss, 1984; Achlioptas, 2003).

    The random matrices depend on ``seed``, and on the name and the shape of the parameter: they are the same in all
    batches and processes, and on all machines (Gaussian ones up to rounding). Over a data set, ``accumulate`` with
    ``stream=`` makes a store of features on disk.

    Args:
        dim: The number of entries that a gradient is projected to, at most.
        kind: The distribution of the matrices' entries: ``"rademacher"``, ``"gaussian"``, or ``"sparse"``, of which two
            thirds are zero.
        seed: Another number gives other matrices.
        across: ``"parameter"``: each parameter has projections of its own. ``"model"``: projections of the gradient
            over all parameters, ``[N, dim]``, one tensor that all of them share.
        scale: What multiplies the gradients of each parameter before they are projected, by name: a tensor of its
            shape (entry by entry), a list of Kronecker factors as of ``KFAC``, or an ``Eigen`` as of ``EKFAC``. With
            inverse square roots, dot products are those with the inverse.

    Raises:
        ValueError: ``dim`` is not positive, ``kind`` or ``across`` is none of these. In the backward pass: ``scale``
            has nothing for a parameter, or of another shape; two parameters have one name.
        TypeError: ``scale`` is no mapping.
    """

    savefield = "grad_projected"
    batches = Joined(1)

    def __init__(
        self,
        dim: int,
        kind: str = "rademacher",
        seed: int = 0,
        across: str = "parameter",
        scale: Mapping[str, Scale] | None = None,
        subsampling: Any = None,
        savefield: str | None = None,
    ) -> None:
        super().__init__(savefield, subsampling=subsampling)
        if dim < 1:
            raise ValueError(f"dim must be positive, got {dim}.")
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}; got {kind!r}.")
        if across not in ("parameter", "model"):
            raise ValueError(f"across must be 'parameter' or 'model', got {across!r}.")
        if scale is not None and not isinstance(scale, Mapping):
            raise TypeError(f"scale must map names of parameters to what multiplies their gradients, got {scale!r}.")
        self.dim, self.kind, self.seed, self.across, self.scale = dim, kind, seed, across, scale
        self.needs_all_parameters = self.is_of_model = across == "model"
        self._drawn: dict[Any, Projection] = {}

    def check(self, parameters: Any, samples: int) -> None:
        names = [name_of(parameter) for parameter in parameters]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(
                f"ProjectedGrad: several parameters have the name {min(twice)}, so that their projections would not "
                f"be independent. Extend the model as a whole, in place of its parts."
            )
        for name, parameter in zip(names, parameters, strict=True):
            if self.scale is None:
                return
            if name not in self.scale:
                raise ValueError(
                    f"ProjectedGrad: scale has nothing for parameter {name} of shape {list(parameter.shape)}. Add it, "
                    f"or freeze the parameter with requires_grad_(False)."
                )
            sizes = _sizes(self.scale[name])
            is_entrywise = isinstance(self.scale[name], Tensor)
            if sizes != parameter.shape if is_entrywise else sizes.numel() != parameter.numel():
                raise ValueError(
                    f"ProjectedGrad: scale of parameter {name} has shape {list(sizes)}, but the parameter has "
                    f"{list(parameter.shape)}."
                )

    def _projection(self, parameter: Tensor, name: str) -> Projection:
        shape = torch.Size((*parameter.shape, 2)) if parameter.is_complex() else parameter.shape
        key = name, shape, parameter.dtype, parameter.device
        if key not in self._drawn:
            generator = generator_of(self.seed, self.kind, self.dim, name, tuple(shape))
            drawn = Projection.draw(shape, self.dim, self.kind, generator)
            self._drawn[key] = drawn.to(parameter.real if parameter.is_complex() else parameter)
        return self._drawn[key]

    def compute(self, grads: Individual) -> Tensor:
        return self.projected(grads, grads.parameter, name_of(grads.parameter))

    measure = compute

    def projected(self, grads: Individual, parameter: Tensor, name: str) -> Tensor:
        """The projections of a parameter's gradients; across the model, its share in that of all parameters."""
        own = self._projection(parameter, name)
        found = self._scaled(grads, parameter, name).projected(own.rows, own.columns, own.sizes)[0].flatten(1)
        return found if self.across == "parameter" else own.spread(found, self.dim)

    def _scaled(self, grads: Individual, parameter: Tensor, name: str) -> Individual:
        if self.scale is None:
            return grads
        scale = self.scale[name]

        is_kernel = is_transposed_kernel(parameter)
        turned = not isinstance(scale, Tensor) and exchanges_axes(name, scale, parameter.shape, is_kernel)

        def multiplied(gradients: Tensor) -> Tensor:
            if isinstance(scale, Tensor):
                return gradients * scale.to(gradients)
            return applied_to_vectors(partial(_product, scale), gradients, turned).contiguous()

        return Derived(grads, parameter, multiplied)

    def combine(self, measures: dict[Tensor, Tensor], samples: int | None) -> Tensor:
        first, *others = measures.values()
        return sum((other.to(first) for other in others), start=first)


def _sizes(scale: Scale) -> torch.Size:
    if isinstance(scale, Tensor):
        return scale.shape
    return torch.Size([len(factor) for factor in (scale.bases if isinstance(scale, Eigen) else scale)])


def _product(scale: list[Tensor] | Eigen, columns: Tensor) -> Tensor:
    if isinstance(scale, Eigen):
        own = Eigen([basis.to(columns) for basis in scale.bases], scale.eigenvalues.to(columns.real))
        return own.apply(columns)
    return apply_kfac_mat_prod([factor.to(columns) for factor in scale], columns)
