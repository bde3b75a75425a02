"""Quantities of first order that depend on more than the samples: projections, directions, weights, groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import BatchDotGrad, ClippedGrad, ProjectedGrad, WeightedGrad
from backpack.extensions.backprop_extension import BackpropExtension

from . import close
from .first_order import norms_of, real_rows


def required(samples: int) -> dict[str, tuple[Any, ...]]:
    """The arguments that extensions need, by their name, for a batch of so many samples."""
    return {
        "ClippedGrad": (0.1,),
        "GaussNewtonStep": (0.1,),
        "HBP": ("ggn", "exact", "sqrt", "E[J^T E(H) J]"),
        "ProjectedGrad": (4,),
        "WeightedGrad": (torch.arange(float(samples)),),
    }


Gradients = Mapping[str, Tensor]
"""Individual gradients ``[N, *p]`` by parameter name."""


class Product(nn.Module):
    """One parameter, of any shape, whose individual gradients are the inputs; it has any name."""

    def __init__(self, name: str, parameter: Tensor) -> None:
        super().__init__()
        *path, last = name.split(".")
        module: nn.Module = self
        for part in path:
            module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(torch.zeros_like(parameter)))

    def forward(self, x: Tensor) -> Tensor:
        (parameter,) = self.parameters()
        product = x.conj() * parameter
        return (product.real if product.is_complex() else product).reshape(len(x), -1).sum(1)


def projection(name: str, parameter: Tensor, extension: ProjectedGrad) -> Tensor:
    """The matrix ``[k, p]`` of a projection of a parameter's gradients: what it makes of unit vectors."""
    p, model = parameter.numel(), extend(Product(name, parameter))
    units = torch.eye(p, dtype=parameter.dtype)
    if parameter.is_complex():
        units = torch.stack([units, 1j * units], 1).flatten(0, 1)
    with backpack(extension):
        model(units.reshape(len(units), *parameter.shape)).sum().backward()
    (own,) = model.parameters()
    return vars(own)[extension.savefield].T


@dataclass
class Case:
    """An extension, made for individual gradients of all and the selected samples, and its truth by parameter."""

    degree: int
    make: Callable[[Gradients, Any, list[int]], BackpropExtension[Tensor]]
    true: Callable[[Gradients, Any, list[int]], Callable[[str, Tensor], Tensor]]
    is_clipping: bool = False
    """Whether it is not defined where samples are mixed."""


def directions(grads: Gradients) -> dict[str, Tensor]:
    """Three directions for each parameter, the last of which is zero."""
    made = {}
    for name, g in grads.items():
        generator = torch.Generator().manual_seed(len(made))
        drawn = torch.randn(3, *g.shape[1:], dtype=g.dtype, generator=generator)
        drawn[2] = 0
        made[name] = drawn
    return made


def weights(rows: list[int]) -> Tensor:
    """Of both signs."""
    return torch.arange(len(rows), dtype=torch.float64) - 0.75


def scales(grads: Gradients) -> dict[str, Tensor]:
    """A positive factor for each entry of each parameter."""
    return {name: 1 + d[0].abs() for name, d in directions(grads).items()}


def selected(grads: Gradients, rows: list[int]) -> dict[str, Tensor]:
    return {name: g[rows] for name, g in grads.items()}


def weighted_sum(g: Tensor, factors: Tensor) -> Tensor:
    return torch.einsum("n,n...->...", factors.to(g.dtype), g)


def projected(**options: Any) -> Case:
    """Of each parameter by itself."""

    def true(grads: Gradients, w: Any, rows: list[int]) -> Callable[[str, Tensor], Tensor]:
        return lambda name, g: real_rows(g) @ projection(name, g[0], ProjectedGrad(**options)).T

    return Case(1, lambda grads, w, rows: ProjectedGrad(**options, subsampling=w), true)


def projected_across_the_model(**options: Any) -> Case:
    def true(grads: Gradients, w: Any, rows: list[int]) -> Callable[[str, Tensor], Tensor]:
        terms = []
        for name, g in selected(grads, rows).items():
            terms.append(real_rows(g) @ projection(name, g[0], ProjectedGrad(across="model", **options)).T)
        return lambda name, g: torch.stack(terms).sum(0)

    return Case(1, lambda grads, w, rows: ProjectedGrad(across="model", **options, subsampling=w), true)


def scaled_and_projected(**options: Any) -> Case:
    def true(grads: Gradients, w: Any, rows: list[int]) -> Callable[[str, Tensor], Tensor]:
        factors = scales(grads)
        return lambda name, g: real_rows(g * factors[name]) @ projection(name, g[0], ProjectedGrad(**options)).T

    return Case(1, lambda grads, w, rows: ProjectedGrad(**options, scale=scales(grads), subsampling=w), true)


def clipped_by(make: Callable[[Gradients, Any, list[int]], ClippedGrad], per: str, factors: Any) -> Case:
    """``factors``: of the norms, given the mean norm of all samples' gradients."""

    def true(grads: Gradients, w: Any, rows: list[int]) -> Callable[[str, Tensor], Tensor]:
        own = selected(grads, rows)
        group = {name: {"model": 0, "groups": place % 2, "parameter": name}[per] for place, name in enumerate(own)}

        def of(name: str, g: Tensor) -> Tensor:
            members = {other: own[other] for other in own if group[other] == group[name]}
            return weighted_sum(g, factors(norms_of(members), mean_norm(grads)))

        return of

    return Case(1, make, true, is_clipping=True)


def mean_norm(grads: Gradients) -> float:
    return float(norms_of(grads).mean())


def at_most(norms: Tensor, bound: float) -> Tensor:
    return (bound / norms.clamp(min=1e-30)).clamp(max=1)


def two_groups(grads: Gradients) -> list[list[str]]:
    names = list(grads)
    return [names[::2], names[1::2]]


def direction_products(grads: Gradients, w: Any, rows: list[int]) -> Callable[[str, Tensor], Tensor]:
    made = directions(grads)
    return lambda name, g: real_rows(g) @ real_rows(made[name]).T


def products_with_rows(grads: Gradients, w: Any, rows: list[int]) -> Callable[[str, Tensor], Tensor]:
    return lambda name, g: real_rows(g) @ real_rows(grads[name][[-1, 0]]).T


CASES = {
    "projected": projected(dim=6),
    "projected to one number": projected(dim=1, seed=5),
    "projected, Gaussian": projected(dim=9, kind="gaussian", seed=3),
    "projected across the model": projected_across_the_model(dim=8, kind="sparse"),
    "scaled and projected": scaled_and_projected(dim=5, seed=1),
    "against directions": Case(
        1, lambda grads, w, rows: BatchDotGrad(against=directions(grads), subsampling=w), direction_products
    ),
    "against samples": Case(2, lambda grads, w, rows: BatchDotGrad(against=[-1, 0], subsampling=w), products_with_rows),
    "weighted": Case(
        1,
        lambda grads, w, rows: WeightedGrad(weights(rows), subsampling=w),
        lambda grads, w, rows: lambda name, g: weighted_sum(g, weights(rows)),
    ),
    "clipped by parameter": clipped_by(
        lambda grads, w, rows: ClippedGrad(0.2 * mean_norm(grads), w, per="parameter"),
        "parameter",
        lambda norms, mean: at_most(norms, 0.2 * mean),
    ),
    "clipped by groups": clipped_by(
        lambda grads, w, rows: ClippedGrad(0.4 * mean_norm(grads), w, per=two_groups(grads)),
        "groups",
        lambda norms, mean: at_most(norms, 0.4 * mean),
    ),
    "normalized": clipped_by(
        lambda grads, w, rows: ClippedGrad(subsampling=w, rule=lambda norms: 1 / (norms + mean_norm(grads))),
        "model",
        lambda norms, mean: 1 / (norms + mean),
    ),
}
"""What is computed -> how, and its truth from individual gradients."""


def make_all(grads: Gradients, given: Any, rows: list[int]) -> dict[str, BackpropExtension[Tensor]]:
    """All cases for one subset, each with a name of its own for results."""
    made = {}
    for place, (name, case) in enumerate(CASES.items()):
        made[name] = case.make(grads, given, rows)
        made[name].savefield = f"result_{place}"
    return made


def check_all(
    results: Callable[[BackpropExtension[Tensor]], Mapping[str, Tensor]],
    made: Mapping[str, BackpropExtension[Tensor]],
    grads: Gradients,
    given: Any,
    rows: list[int],
) -> None:
    """Results by extension and parameter, against individual gradients of all samples."""
    floor = 1e-5 * max(g.abs().max() for g in grads.values())
    for case, extension in made.items():
        true, found = CASES[case].true(grads, given, rows), results(extension)
        for name, g in selected(grads, rows).items():
            largest = max(g.abs().max(), floor)
            assert close(found[name], true(name, g), largest ** CASES[case].degree), (case, name)
