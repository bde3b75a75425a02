"""The backward pass of first order: it computes the results of each parameter as soon as all its uses are reached.

A prehook of each node that uses a parameter receives the complete cotangents of the node's outputs just before the node
runs, while its saved tensors are still there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.backward.arrivals import Arrival, Contributions
from backpack.backward.block import Block, without_autocast
from backpack.backward.collector import Collector, Prepared
from backpack.backward.mixed_regions import place_in, pull_through
from backpack.extensions.interface import Quantity, without_rules
from backpack.graph import Edge, count_outputs, kind, variable_of
from backpack.graph.users_hooks import observed, undisturbed
from backpack.modules.parameters import name_of
from backpack.modules.thread_state import HERE
from backpack.nodes import FORMS
from backpack.samples import Subset
from backpack.torch_internals import pull_back
from backpack.uses import Cotangents, Explicit, Parts


class FirstOrderPass(Collector):
    """Collects what arrives in one backward pass, and computes the extensions of a block that need no second order."""

    def __init__(self, block: Block, prepared: Prepared) -> None:
        super().__init__(prepared)
        self.block = block
        self.postponed: dict[Quantity, dict[Tensor, tuple[Contributions | Explicit, Tensor]]] = {}
        extensions = block.first_order
        self.is_simple = not (
            block.debug
            or any(e.rules or e.has_rules_only or e.needs_all_parameters or e.against is not None for e in extensions)
        )
        self.reads_again = any(e.needs_all_parameters and not e.is_of_model for e in extensions)
        self.groups = [(group[0].subset, [name for e in group for name in e.reads], group) for group in block.groups]
        devices = {variable_of(leaf).device.type for leaf in self.plan.expected}
        self.under_autocast = any(map(torch.is_autocast_enabled, devices))

    @property
    def may_defer(self) -> bool:
        """Whether some use may have no normal form, so that its node is called by itself."""
        uses = ((kind(node), planned) for node, uses in self.plan.uses.items() for planned in uses)
        return any(planned.leaf is None or planned.sent is not None or name not in FORMS for name, planned in uses)

    def prehooks(self) -> Iterator[tuple[Node, Callable[..., None]]]:
        """The nodes that have to be hooked for this pass, each with its prehook."""
        yield from ((node, partial(self._arrived, node)) for node in self.plan.uses)
        yield from ((node, partial(self._entered, node)) for node in self.plan.entries)

    def _arrived(self, node: Node, grads: Sequence[Tensor | None]) -> None:
        """The cotangents of a node's outputs are complete."""
        if HERE.muted or HERE.inner is not None:
            return
        cotangents = Cotangents({number: grad[None] for number, grad in enumerate(grads) if grad is not None})
        if not cotangents:
            return
        if self.under_autocast:
            with without_autocast(next(iter(cotangents.values())).device):
                self._receive(node, cotangents)
        else:
            self._receive(node, cotangents)

    def _receive(self, node: Node, cotangents: Cotangents) -> None:
        """Take the cotangents of a node's outputs to all uses of parameters by this node."""
        simple = self.is_simple and not self.is_partial
        for planned in self.plan.uses[node]:
            arrival = self.arrival(node, planned, cotangents)
            if simple and planned.is_alone and not arrival.turned:
                self._compute_alone(planned.leaf, arrival)  # type: ignore[arg-type]
            else:
                self.take_in(planned, arrival)

    def _compute_alone(self, leaf: Node, arrival: Arrival) -> None:
        """Compute the results of a parameter whose only use was reached, without collecting contributions."""
        block, parameter = self.block, variable_of(leaf)
        for subset, names, extensions in self.groups:
            grads = arrival.individual(subset, parameter.shape, parameter.dtype)
            grads.parameter = parameter
            grads.prepare(names)
            for extension in extensions:
                block.store(parameter, extension.savefield, extension.compute(grads))
        block.parameter_done(parameter)

    def _is_last(self, leaf: Node) -> bool:
        """Whether one more arrival completes a parameter whose results are computed at once."""
        return self.contributions(leaf).count + 1 == self.plan.expected[leaf] and not self.reads_again

    def add(self, contributions: Contributions, arrival: Arrival, leaf: Node | None = None) -> None:
        """Add an arrival, or its individual gradients if they can't be computed any more when the node has run."""
        if not arrival.runs_node or (leaf is not None and self._is_last(leaf)):
            contributions.arrivals.append(arrival)
            return
        for key, subset in self.subsets.items():
            pulled = Explicit(arrival.individual(subset, contributions.shape, contributions.dtype).dense())
            contributions.pulled.setdefault(key, []).append(pulled)

    @property
    def subsets(self) -> dict[Any, Subset]:
        """The subsets of samples of all extensions, and those that some compare them with, by key."""
        both = (subset for extension in self.block.first_order for subset in (extension.subset, extension.against))
        return {subset.key: subset for subset in both if subset is not None}

    def _entered(self, node: Node, _: Any) -> None:
        """All that enters a region through a node has arrived: pull it on to the parameters before the node runs."""
        if not (HERE.muted or HERE.inner is not None or self.is_partial or node not in self.entering):
            self.enter(node)

    def enter(self, node: Node) -> None:
        """Pull what entered a region through a node on to the parameters behind it."""
        entered = self.entering.pop(node)
        with without_autocast(next(iter(entered.values())).device):
            (leaf, *others) = self.plan.entries[node]
            place = None if others or node in self.plan.mixed else place_in(node, leaf)
            for key, subset in self.subsets.items():
                if place is not None:
                    part = Parts({place: entered[0].individual(subset)}, variable_of(leaf).shape)
                    self.contributions(leaf).pulled.setdefault(key, []).append(part)
                    continue
                grads = {number: found.individual(subset).dense()[0] for number, found in entered.items()}
                one_by_one = node in self.plan.mixed
                for leaf, grad in pull_through(self.graph, self.places, node, grads, one_by_one).items():
                    if leaf in self.plan.expected:
                        self.contributions(leaf).pulled.setdefault(key, []).append(Explicit(grad[None]))
            for leaf in self.plan.entries[node]:
                self.count(leaf)

    def completed(self, leaf: Node, contributions: Contributions) -> None:
        """Compute the results of a parameter."""
        block, parameter = self.block, contributions.tensor
        assert parameter is not None
        name = name_of(parameter)
        if contributions.arrivals or contributions.pulled:
            for group in block.groups:
                extensions = without_rules(group, parameter, name)
                if extensions:
                    self._compute(contributions, name, extensions)
        block.parameter_done(parameter)
        if not self.reads_again:
            contributions.arrivals, contributions.pulled = [], {}

    def _compute(self, contributions: Contributions, name: str, extensions: list[Quantity]) -> None:
        block, parameter = self.block, contributions.tensor
        grads = contributions.individual(extensions[0].subset)
        is_kept = self.reads_again and grads.is_small
        reads = [name for extension in extensions for name in extension.reads]
        grads.prepare(["dense", *reads] if is_kept else reads)
        for extension in extensions:
            if block.debug:
                print(f"[DEBUG] {type(extension).__name__} on parameter {name} {list(parameter.shape)}")
            grads.others = None if extension.against is None else contributions.individual(extension.against)
            if extension.needs_all_parameters:
                measures = self.postponed.setdefault(extension, {})
                measures[parameter] = Explicit(grads.dense()) if is_kept else contributions, extension.measure(grads)
            else:
                block.store(parameter, extension.savefield, extension.compute(grads))

    def take(self, targets: Sequence[GradientEdge], found: Sequence[Tensor | None]) -> None:
        """Take in cotangents that reached the outputs of nodes which do not run."""
        arrived: dict[Node, list[Tensor | None]] = {}
        for target, grad in zip(targets, found, strict=True):
            count = count_outputs(target.node)
            arrived.setdefault(target.node, [None] * count)[target.output_nr] = grad
        for node, grads in arrived.items():
            self._arrived(node, grads)

    def pull_on(self, ends: dict[Edge, Tensor]) -> None:
        """Send cotangents on to the uses below edges at which the pass has ended, without gradients of parameters."""
        targets = self.outputs_of(self.lowest([node for node, _ in ends], self.plan.uses))
        if not targets:
            return
        edges = [GradientEdge(node, number) for node, number in ends]
        with undisturbed(observed(self.graph)):
            self.take(targets, pull_back(edges, targets, list(ends.values()), torch.is_grad_enabled()))

    def finish(self) -> None:
        """Compute what had to wait for the end of the pass, regions that it did not run, and joint results."""
        self.take_deferred()
        for node in self.entered():
            self.enter(node)
        for extension, own in self.postponed.items():
            measures = {parameter: measure for parameter, (_, measure) in own.items()}
            joint = extension.combine(measures, self.block.averaged)
            for parameter, (found, _) in own.items():
                value = joint
                if not extension.is_of_model:
                    with without_autocast(parameter.device):
                        grads = found if isinstance(found, Explicit) else found.individual(extension.subset)
                        grads.parameter = parameter
                        value = extension.compute_jointly(grads, joint)
                self.block.store(parameter, extension.savefield, value)
        self.postponed.clear()

    @property
    def missed(self) -> list[Tensor]:
        """Parameters of which not all uses were reached."""
        parameters = map(variable_of, self.plan.expected)
        return [parameter for parameter in parameters if id(parameter) not in self.block.finished]
