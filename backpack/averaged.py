"""Second order, averaged: the mean curvature over the batch is pulled back through a chain of modules, one by one.

With ``H`` the curvature in the output of a module, that in its input is ``1/N sum_n J_n^T H J_n`` (Botev, Ritter &
Barber, 2017, section 4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import Module, Sequential

from backpack.bystanders import run_again
from backpack.engine import HERE
from backpack.looped import must_loop
from backpack.samples import Subset
from backpack.seeds import BUDGET, PASSES, SeedPass, agree, landmarks, unique
from backpack.uses.base import accumulate
from backpack.uses.linear_map import second_moment

SHIFT = 1e-13
"""What is added to the diagonal of a curvature, relative to its largest entry, to have a Cholesky decomposition."""

LARGEST = 2**14
"""Entries of one sample's output up to which the curvature in it is formed."""

ELEMENTWISE = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid),
    *(nn.Mish, nn.ReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink),
)
"""Modules whose Jacobians are diagonal."""

AFFINE = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.Flatten, nn.Identity, nn.Unflatten, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
)
"""Modules whose Jacobians, and the cotangents at their parameters' uses, are the same for all samples."""


@dataclass(eq=False)
class Mean:
    """A mean curvature in ``d`` entries: ``given`` as a matrix, or as ``given^T given``; the other, when it is read."""

    given: Tensor
    is_root: bool = True

    @cached_property
    def matrix(self) -> Tensor:
        """``[d, d]``."""
        return self.given.T @ self.given if self.is_root else self.given

    @cached_property
    def root(self) -> Tensor:
        """``S`` of shape ``[v, d]``, ``v <= d``, with ``S^T S`` the curvature."""
        return self.given if self.is_root and len(self.given) <= self.given.shape[1] else _root(self.matrix)


@dataclass(eq=False)
class AveragedPass(SeedPass):
    """For extensions whose curvature is averaged over the batch after each module.

    ``wanted``: whether a module before the present one has parameters; ``sign``: of the part that is pulled back.
    """

    wanted: bool = True
    sign: int = 1

    def run(self) -> None:
        """Pull back the mean curvature and store the results.

        Raises:
            RuntimeError: The model is no chain of modules, or running it once more gives something else.
            ValueError: A module has too many outputs for a dense curvature matrix.
        """
        rows = self.extensions[0].subset.rows(self.layout.n, self.loss.input.device)
        modules, inputs = self._forward(rows)
        self.subset = Subset()
        seeds = self._seeds(0, self.columns)
        mean = Mean((seeds if rows is None else seeds[:, rows]).flatten(0, 1))
        learning = [place for place, module in enumerate(modules) if any(p.requires_grad for p in module.parameters())]
        HERE.inner = self
        try:
            for place in reversed(range(len(modules))):
                self.wanted = place != learning[0]
                mean = self._step(modules[place], inputs[place], mean)
        finally:
            HERE.inner = None
            self.delivery.clear()
            self.results.clear()

    def _forward(self, rows: Tensor | None) -> tuple[list[Module], list[Tensor]]:
        """The modules of the chain, and their inputs, of the selected samples."""
        name = type(self.extensions[0]).__name__
        edge, origin = self.found[0]
        root = origin.root()
        args, kwargs = origin.arguments or (None, None)
        alone = edge == self.loss.edge and len(self.found) == 1
        if (
            root is None
            or not alone
            or args is None
            or len(args) != 1
            or kwargs
            or (root._modules and not _is_sequential(root))
        ):
            raise RuntimeError(
                f"{name} averages the curvature after each module of a chain, but the model, a {type(root).__name__}, "
                f"is no torch.nn.Sequential of one input whose output is that of the loss. Write it as a Sequential, "
                f"of any modules, or use KFLR."
            )
        modules = list(_chain(root))
        parameters = [id(p) for module in modules for p in module.parameters()]
        if len(set(parameters)) < len(parameters):
            raise RuntimeError(f"{name}: two modules of the chain share a parameter. Use KFLR for such a model.")
        if any(module.training and module._buffers for module in root.modules()):
            raise RuntimeError(f"{name} runs the model once more, which would update running statistics: call eval().")
        if torch.is_grad_enabled():
            raise RuntimeError(f"{name}: its results cannot be differentiated, as create_graph=True asks for.")
        inputs, x = [], args[0] if rows is None else args[0].index_select(0, rows)
        n = len(x)
        with torch.no_grad(), torch.random.fork_rng(enabled=root.training), run_again(root):
            for module in modules:
                inputs.append(x)
                x = module(x.clone())  # it may work in place
                if not isinstance(x, Tensor) or x.dim() == 0 or len(x) != n:
                    raise RuntimeError(
                        f"{name}: {type(module).__name__} in the chain returns no tensor whose first axis counts the "
                        f"{n} samples."
                    )
                if x[0].numel() > LARGEST:
                    raise ValueError(
                        f"{name} needs the curvature in the output of {type(module).__name__}, of shape "
                        f"{list(x.shape)}: a matrix of {x[0].numel()} rows. At most {LARGEST} are formed. Use KFAC."
                    )
        expected = self.loss.input if rows is None else self.loss.input.index_select(0, rows)
        if not agree(x, expected):
            raise RuntimeError(
                f"{name} runs the model once more, module by module, and that gave another output than the forward "
                f"pass: is there dropout in training mode? Call eval() first."
            )
        return modules, inputs

    def _step(self, module: Module, x: Tensor, mean: Mean) -> Mean:
        """The curvature in a module's output to that in its input ``x``; parameters on the way."""
        return self._through(module, x, mean)

    def _through(self, module: Module, x: Tensor, mean: Mean, last: bool = True) -> Mean:
        """A curvature in a module's output pulled back to its input ``x``. ``last``: of what is for this module."""
        n, size, nothing = len(x), mean.given.shape[1], Mean(mean.given.new_zeros(1, x[0].numel()))
        if is_one_of(module, ELEMENTWISE):
            slope = self._pull_back(module, x, mean.given.new_ones(1, n, size), last).flatten(2)[0] / n**0.5
            return Mean(mean.matrix * (slope.T @ slope), is_root=False) if self.wanted else nothing
        if is_one_of(module, AFFINE):
            learns = last and any(p.requires_grad for p in module.parameters())
            if x.dim() == 2 and is_one_of(module, (nn.Linear,)) and module._parameters.get("weight") is not None:
                found = self._through_linear(module, mean)
            else:
                pulled = self._pull_back(module, x[:1], mean.root.unsqueeze(1), final=last and not learns)
                found = Mean(pulled.flatten(1))
            if learns:  # the inputs of all samples count, and no more cotangents
                self._pull_back(module, x, mean.given.new_zeros(1, n, size))
            return found if self.wanted else nothing
        terms: list[Tensor] = []
        step = max(1, BUDGET // (n * max(x[0].numel(), size)))
        for start in range(0, len(mean.root), step):
            seeds = mean.root[start : start + step, None].expand(-1, n, -1) / n**0.5
            pulled = self._pull_back(module, x, seeds, final=last and start + step >= len(mean.root))
            if self.wanted:
                accumulate(terms, second_moment(pulled.flatten(0, 1).flatten(1)))
        return Mean(terms[0], is_root=False) if terms else nothing

    def _through_linear(self, module: Module, mean: Mean) -> Mean:
        """A linear layer of one position: the curvature in its output is the factor that both parameters have there."""
        for parameter in (module.weight, module.bias):
            for extension in self.extensions if isinstance(parameter, Tensor) and parameter.requires_grad else ():
                results = self.results.setdefault((id(extension), id(parameter)), [])
                results.append([self.sign * mean.matrix])
                results[:] = [extension.merge(results)]
        weight = module.weight
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            if not self.wanted:
                return mean
            return Mean(mean.root @ weight) if mean.is_root else Mean(weight.T @ mean.given @ weight, is_root=False)

    def _pull_back(self, module: Module, x: Tensor, seeds: Tensor, final: bool = True) -> Tensor:
        """Cotangents ``[v, n, ...]`` of a module's output to those of its input; its parameters are computed.

        ``final``: these are the last ones for this module.
        """
        x = x.detach().requires_grad_(x.is_floating_point() and self.wanted)
        with torch.enable_grad(), run_again(module):
            out = module(x.clone())  # it may work in place
        if not out.requires_grad:
            return seeds.new_zeros(len(seeds), *x.shape)
        edge = get_gradient_edge(out)
        outputs, ends = landmarks(edge)
        self.uses = sum(unique(origin.uses for _, origin in outputs), Counter())
        ends += [get_gradient_edge(x)] if x.requires_grad else []
        pieces = seeds.reshape(len(seeds), *out.shape).split(1 if must_loop(edge) else len(seeds))
        found = []
        for number, piece in enumerate(pieces, start=1):
            self.final = final and number == len(pieces)
            grads = self._pull([edge], ends, [piece])
            found.append(grads if x.requires_grad and grads.dim() > 1 else seeds.new_zeros(len(piece), *x.shape))
            self._finish()
        return torch.cat(found)


PASSES["average"] = AveragedPass


def is_one_of(module: Module, kinds: tuple[type[Module], ...]) -> bool:
    """Whether the forward pass of a module is that of one of these classes."""
    return any(type(module).forward is cls.forward for cls in kinds if isinstance(module, cls))


def _is_sequential(module: Module) -> bool:
    return isinstance(module, Sequential) and type(module).forward is Sequential.forward


def _chain(module: Module) -> Iterator[Module]:
    """The modules that a sequential one, however nested, runs one after the other."""
    if not _is_sequential(module):
        yield module
        return
    for child in module._modules.values():
        yield from _chain(child)  # type: ignore[arg-type]


def _root(curvature: Tensor) -> Tensor:
    """``S`` with ``S^T S`` the curvature, up to rounding."""
    wide = curvature.double()  # in float32, eigenvalues do not always converge
    shifted = wide + torch.diag_embed(SHIFT * wide.diagonal().amax().expand(len(wide)))
    factor, problem = torch.linalg.cholesky_ex(shifted)
    if problem.item() == 0:
        return factor.T.to(curvature.dtype)
    values, vectors = torch.linalg.eigh(wide)
    return (vectors * values.clamp(min=0).sqrt()).T.to(curvature.dtype)
