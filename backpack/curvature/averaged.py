"""Averaged curvature: the mean over the batch is pulled back through a chain of modules, one module at a time.

With ``H`` the curvature in the output of a module, that in its input is ``1/N sum_n J_n^T H J_n`` (Botev, Ritter &
Barber, 2017, section 4). Many modules have a closed form (``mean_curvature.py``). For all others, and for parameters
of other modules than linear maps, the rows of a root of ``H`` are pulled back for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Module, Sequential

from backpack.curvature.columns import Columns
from backpack.curvature.loss_term import PASSES, modules_of
from backpack.curvature.mean_curvature import (
    AFFINE,
    CONVOLUTIONS,
    ELEMENTWISE,
    MAPS,
    SAME,
    Mean,
    in_closed_form,
    is_one_of,
)
from backpack.curvature.module_chain import Link, ModuleChain
from backpack.curvature.rerun import agree, is_observed, run_again
from backpack.curvature.seeds import SeedPass
from backpack.curvature.spliced_graph import SplicedGraph
from backpack.extensions.interface import Curvature
from backpack.graph import is_complex, is_recomputed, shape_of, variable_of
from backpack.graph.users_hooks import forget_retained
from backpack.memory import at_a_time
from backpack.modules.loss_calls import LossCall
from backpack.modules.thread_state import muted
from backpack.nodes import Place, use_of
from backpack.samples import Layout, Subset
from backpack.torch_internals import pull_back
from backpack.uses import Cotangents, DenseUse, Individual
from backpack.uses.base import accumulate
from backpack.uses.kronecker import averaged_factors
from backpack.uses.second_moments import second_moment

LARGEST = 2**14
"""How many entries one sample's output may have, since the curvature in it is a dense matrix."""


class AveragedPass(SeedPass):
    """For extensions whose curvature is averaged over the batch after each module.

    ``wanted``: whether a module before the present one has parameters; ``sign``: the sign of the root that is pulled
    back; ``curvature``: of a linear map, the curvature in its output, ``[p, c, q, p, c, q]`` with its channels ``c``.
    """

    reads_all_uses = True
    wanted = True
    sign = 1
    curvature: Tensor | None = None

    def run(self) -> None:
        """Pull back the mean curvature and store the results.

        Raises:
            RuntimeError: The model is no chain of modules, losses have different inputs, or running the model once
                more gives something else.
            ValueError: A module has too many outputs for a dense curvature matrix.
        """
        ids = self.block.ids
        if ids is not None and prod(ids.shape) != self.n:
            raise RuntimeError(
                f"{self._name} averages the curvature over the rows of a module's output, so "
                f"that each row must be a sample of its own: leave sample_ids out, or use KFLR."
            )
        self.loss = self._common_loss()
        rows = self.extensions[0].subset.rows(self.n, self.device)
        self.chain = ModuleChain(self.prepared.graph, self.notes, self.loss.place)
        self._check_chain()
        links = [Link(module, self._linear_map(module)) for module in self.chain.modules]
        first = [link.learns for link in links].index(True)
        needed = links[first:]
        if not self._read_functions(needed):
            self._run_modules(links, first, rows)
        first_term, *others = self._seeds(0, self.columns)
        seeds = sum(others, start=first_term)
        columns = (seeds if rows is None else seeds[:, rows]).flatten(0, 1)
        columns = columns if len(columns) else columns.new_zeros(1, columns.shape[1])  # of a loss without curvature
        mean = Mean(columns, True)
        mean = mean if len(mean.given) <= mean.given.shape[1] else Mean(mean.matrix)
        try:
            for link in reversed(needed):
                self.wanted = link is not needed[0]
                mean = self._step(link, mean)
        finally:
            self._clear()

    def _common_loss(self) -> LossCall:
        """The call of the first loss; all others have the same input."""
        first, *others = [term.call for term in self.terms]
        if any(other.place != first.place for other in others):
            raise RuntimeError(
                f"{self._name} averages the curvature after each module of a chain, but the losses of this "
                f"backward pass, {' and '.join(type(term.call.loss).__name__ for term in self.terms)}, have different "
                f"inputs. Call backward() for each loss by itself, or use KFLR."
            )
        return first

    def _check_chain(self) -> None:
        """Raise unless the model is a chain of real functions that share no parameters."""
        name, chain = self._name, self.chain
        if not chain.calls or not chain.has_all_calls or chain.is_one_module:
            model = " after a ".join(dict.fromkeys(type(module).__name__ for module in modules_of(self.notes)))
            raise RuntimeError(
                f"{name} averages the curvature after each module of a chain, but the model, a {model}, is no "
                f"torch.nn.Sequential of one input whose output is that of the loss, nor a chain of modules that were "
                f"extended one by one. Write it as a Sequential, of any modules, or use KFLR."
            )
        parameters = [id(p) for module in chain.modules for p in module.parameters()]
        if len(set(parameters)) < len(parameters):
            raise RuntimeError(f"{name}: two modules of the chain share a parameter. Use KFLR for such a model.")
        if any(map(is_complex, self.spliced.nodes)):
            raise RuntimeError(
                f"{name} averages the curvature of real numbers, but the model has complex ones. Use KFLR."
            )
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{name}: its results cannot be differentiated, as create_graph=True asks for. Use KFLR."
            )

    def _read_functions(self, links: Sequence[Link]) -> bool:
        """Read off the graph what elementwise functions returned; ``False``: the model has to run again.

        The graph is enough if linear layers follow each other, with at most one elementwise function between two of
        them. Its slopes are what the graph makes of ones.
        """
        modules = self._root_module.modules()
        if len(self.chain.calls) > 1 or any(is_observed(module) or "forward" in vars(module) for module in modules):
            return False
        found: list[tuple[Link, tuple[Tensor, GradientEdge]]] = []
        function: Link | None = None
        x: Tensor | None = None
        for link in reversed(links):
            node = link.node if link is links[0] or is_one_of(link.module, (nn.Linear,)) else None
            if node is not None and self.prepared.owners.owned[node, 0] == Layout(self.n):
                shape = torch.Size(shape_of(node, 0))
                if x is None and node is not self.loss.edge.node:
                    return False
                if x is not None and (len(x) != shape[0] or x.numel() != shape.numel()):
                    return False
                if x is not None and function is not None:
                    found.append((function, (x, GradientEdge(node, 0))))
                function, x = None, self._input_of(node)
                if x is None:
                    return False
                self._check_size(link.module, shape)
            elif x is not None and function is None and x.requires_grad and is_one_of(link.module, ELEMENTWISE):
                function = link
            elif x is None or not is_one_of(link.module, SAME):
                return False
        for link, between in found:
            link.between = between
        return True

    def _input_of(self, node: Node) -> Tensor | None:
        """The input of a linear map, as its node saved it."""
        for planned in self.prepared.plan.uses[node]:
            use = use_of(Place(node, planned.k, planned.number, planned.layout))
            if isinstance(use, DenseUse):
                return use.inputs[0]
        return None

    @property
    def _root_module(self) -> Module:
        """A module that holds all modules of the chain."""
        return Sequential(*self.chain.modules)

    def _check_size(self, module: Module, shape: torch.Size) -> None:
        size = shape[1:].numel()
        if size > LARGEST:
            raise ValueError(
                f"{self._name} needs the curvature in the output of {type(module).__name__}, of shape {list(shape)}: "
                f"a matrix of {size} rows. At most {LARGEST} are formed. Use KFAC."
            )

    def _run_modules(self, links: Sequence[Link], first: int, rows: Tensor | None) -> None:
        """Run the model again on the selected samples, and note the inputs of its modules."""
        name, root = self._name, self._root_module
        args = self.chain.calls[-1].arguments
        if any(module.training and module._buffers for module in root.modules()):
            raise RuntimeError(f"{name} runs the model once more, which would update running statistics: call eval().")
        x = args[0][0] if rows is None else args[0][0].index_select(0, rows)
        n = len(x)
        with torch.no_grad(), torch.random.fork_rng(enabled=root.training), run_again(root):
            for place, link in enumerate(links):
                link.x, module = x, link.module
                x = module(x if is_one_of(module, AFFINE) else x.clone())  # it may work in place
                if not isinstance(x, Tensor) or x.dim() == 0 or len(x) != n:
                    raise RuntimeError(
                        f"{name}: {type(module).__name__} in the chain returns no tensor whose first axis counts the "
                        f"{n} samples. Use KFLR."
                    )
                if place >= first:
                    self._check_size(module, x.shape)
        expected = self.loss.input if rows is None else self.loss.input.index_select(0, rows)
        if not agree(x, expected):
            raise RuntimeError(
                f"{name} runs the model once more, module by module, and that gave another output than the forward "
                f"pass: is there dropout in training mode? Call eval() first."
            )

    def _step(self, link: Link, mean: Mean) -> Mean:
        """The curvature in a module's output to that in its input; the module's parameters are computed."""
        if link.learns:
            if link.node is None:
                return self._through_root(link, mean)
            self._compute_factors(link.module, link.node, mean)
        return self._through(link, mean) if self.wanted else mean

    def _through(self, link: Link, mean: Mean) -> Mean:
        """The curvature in the input of a module that has no parameters, or whose parameters are computed already."""
        if is_one_of(link.module, ELEMENTWISE):
            slope = self._slope(link).to(mean.given.dtype)
            return Mean(second_moment(slope, 1 / len(slope)).mul_(mean.matrix))
        found = in_closed_form(link.module, link.x, mean)
        return self._through_root(link, mean) if found is None else found

    def _slope(self, link: Link) -> Tensor:
        """The derivative of an elementwise function, ``[n, d]``."""
        if link.between is not None:
            out, edge = link.between
            with muted():
                (slope,) = pull_back([out], [edge], [torch.ones_like(out)])
            forget_retained()
            rows = self.extensions[0].subset.rows(self.n, slope.device)
            slope = slope.reshape(self.n, -1)
            return slope if rows is None else slope.index_select(0, rows)
        x = link.input.detach().requires_grad_()
        with torch.enable_grad(), muted(), run_again(link.module):
            out = link.module(x.clone())
            (slope,) = torch.autograd.grad(out, x, torch.ones_like(out))
        return slope.flatten(1)

    def _linear_map(self, module: Module) -> Node | None:
        """The node that used a module's parameters, if these are the parameters of one linear map."""
        if not is_one_of(module, MAPS) or getattr(module, "padding_idx", None) is not None:
            return None
        own = {id(p) for p in module._parameters.values() if p is not None and p.requires_grad}
        nodes = {node for key in own for node in self._users.get(key, ())}
        if len(nodes) != 1:
            return None
        (node,) = nodes
        leaves = [planned.leaf for planned in self.prepared.plan.uses[node]]
        found = {id(variable_of(leaf)) for leaf in leaves if leaf is not None}
        return node if found == own and None not in leaves and not is_recomputed(node) else None

    @cached_property
    def _users(self) -> dict[int, list[Node]]:
        """The nodes that use each parameter, by its ``id``."""
        found: dict[int, list[Node]] = {}
        for node, uses in self.prepared.plan.uses.items():
            for planned in uses:
                if planned.leaf is not None:
                    found.setdefault(id(variable_of(planned.leaf)), []).append(node)
        return found

    @cached_property
    def _columns(self) -> Columns:
        """Takes the factors of linear maps of the model's own graph to their parameters."""
        return Columns(self, self.spliced)

    def _compute_factors(self, module: Module, node: Node, mean: Mean) -> None:
        """The factors of a linear map, from the curvature itself: the values of cotangents are not needed."""
        size, last, shape = len(mean.matrix), not is_one_of(module, CONVOLUTIONS), shape_of(node, 0)
        channels = shape[-1 if last else 1]
        axes = (size // channels, channels, 1) if last else (1, channels, size // channels)
        self.curvature, self.subset = mean.matrix.reshape(*axes, *axes), self.extensions[0].subset
        self.final = True
        columns, cotangents = self._columns, Cotangents({0: mean.given.new_zeros(()).expand(1, *shape)})
        for planned in self.prepared.plan.uses[node]:
            columns.take_in(planned, columns.arrival(node, planned, cotangents))
        self.curvature = None

    def _value(self, extension: Curvature, grads: Individual) -> Any:
        if self.curvature is not None:
            return averaged_factors(grads, self.curvature, extension.approx)  # type: ignore[attr-defined]
        found = super()._value(extension, grads)
        return found if self.sign > 0 else [-factor for factor in found]

    def _through_root(self, link: Link, mean: Mean) -> Mean:
        """Pull back the rows of a root for each sample; the module's parameters are computed."""
        module, x = link.module, link.input
        n, size = len(x), mean.given.shape[1]
        step = max(1, at_a_time("columns", x.device) // (n * max(x[0].numel(), size)))
        pieces = [(sign, rows) for sign, root in mean.roots() for rows in root.split(step)]
        terms: list[Tensor] = []
        for number, (self.sign, rows) in enumerate(pieces, start=1):
            seeds = rows[:, None].expand(-1, n, -1) / n**0.5
            pulled = self._pull_back(module, x, seeds, final=number == len(pieces))
            if self.wanted:
                accumulate(terms, self.sign * second_moment(pulled.flatten(0, 1).flatten(1)))
        self.sign = 1
        return Mean(terms[0]) if terms else mean

    def _pull_back(self, module: Module, x: Tensor, seeds: Tensor, final: bool = True) -> Tensor:
        """Pull cotangents ``[v, n, ...]`` of a module's output back to its input; its parameters are computed.

        ``final``: these are the last ones for this module.
        """
        x = x.detach().requires_grad_(x.is_floating_point() and self.wanted)
        with torch.enable_grad(), run_again(module):
            out = module(x.clone())  # it may work in place
        if not out.requires_grad:
            return seeds.new_zeros(len(seeds), *x.shape)
        edge = get_gradient_edge(out)
        prepared, spliced = self.prepared, self.spliced
        self.subset = Subset()
        self._switch_to(SplicedGraph([edge]), [Layout(len(out))])
        ends = [get_gradient_edge(x)] if x.requires_grad else []
        pieces = seeds.reshape(len(seeds), *out.shape).split(1 if self.spliced.must_loop else len(seeds))
        found = []
        for number, piece in enumerate(pieces, start=1):
            self.final = final and number == len(pieces)
            columns = Columns(self, self.spliced, ends)
            columns.pull([edge], [piece])
            grads = columns.reached
            found.append(grads[0] if ends and grads[0] is not None else seeds.new_zeros(len(piece), *x.shape))
            columns.finish()
        self.prepared, self.spliced = prepared, spliced
        return torch.cat(found)


PASSES["average"] = AveragedPass
