"""What a backward pass has delivered so far: cotangents, by the parameters whose uses they reached."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from backpack.recorder import Call, Source
from backpack.samples import Subset
from backpack.uses import Cotangents, Individual, PullbackUse, Use, join
from backpack.watched import SHARDED


@dataclass(eq=False)
class Arrival:
    """Cotangents ``[v, ...]`` that reached the outputs of one use."""

    call: Call
    number: int
    grads: Cotangents

    @property
    def use(self) -> Use:
        """Which use of the call it is; of a checkpointed region its inputs come late."""
        return self.call.uses[self.number][1]

    def individual(self, subset: Subset, shape: torch.Size, dtype: torch.dtype) -> Individual:
        """The individual gradients of the samples in ``subset``."""
        self.call.check()
        device = next(iter(self.grads.values())).device
        rows = self.call.rows(subset.rows(self.call.n, device))
        return self.use.arrive(self.grads, rows, shape, dtype)


@dataclass(eq=False)
class Contributions:
    """All that reached one parameter, or one tensor computed from parameters."""

    tensor: Tensor
    arrivals: list[Arrival]
    further: dict[Any, list[Individual]]

    def __bool__(self) -> bool:
        return bool(self.arrivals or self.further)

    def individual(self, subset: Subset) -> Individual:
        """The individual gradients of the samples in ``subset``."""
        arrivals = self.arrivals
        counts = {arrival.call.n for arrival in arrivals} if len(arrivals) > 1 else ()
        if len(counts) > 1:
            raise RuntimeError(
                f"A parameter of shape {list(self.tensor.shape)} was used with batches of {sorted(counts)} samples: "
                f"which of them belong together cannot be told. Let one call of the extended module see the whole "
                f"batch."
            )
        if SHARDED and self.tensor.untyped_storage().size() == 0 and any(type(a.use) is PullbackUse for a in arrivals):
            raise RuntimeError(
                f"A parameter of shape {list(self.tensor.shape)} of a fully sharded module is needed again after its "
                f"module's backward pass has freed it: its function has no rule, and it has several uses or an "
                f"extension needs all parameters. Leave its module out of fully_shard()."
            )
        parts = [a.individual(subset, self.tensor.shape, self.tensor.dtype) for a in arrivals]
        return join([*parts, *(self.further.get(subset.key, []) if self.further else [])])

    def explain(self, grad: Tensor) -> bool:
        """Whether they add up to the gradient of the parameter, up to rounding. Synchronizes with the host."""
        eps, sizes = torch.finfo(self.tensor.dtype).eps, []
        for arrival in self.arrivals:  # a total may be small only because its terms cancel
            grads = Cotangents({place: grad.abs() for place, grad in arrival.grads.items()})
            bound = Arrival(arrival.call, arrival.number, grads).individual(
                Subset(), self.tensor.shape, self.tensor.dtype
            )
            sizes.append(_largest(bound.total()))
            del bound
            eps = max(eps, *(torch.finfo(grad.dtype).eps for grad in grads.values()))
        found = self.individual(Subset()).total()
        sizes.append(_largest(found))
        if grad.is_cuda and found.dtype == torch.float32:
            eps = max(eps, 2.0**-11)  # products may be in TF32
        # Not a number: what has overflowed is explained.
        return not bool(_largest(grad.to_dense() - found) > 64 * eps * torch.stack(sizes).sum())


def _largest(tensor: Tensor) -> Tensor:
    """The largest absolute value."""
    return torch.linalg.vector_norm(tensor, torch.inf)


@dataclass(eq=False)
class Delivery:
    """The store of one pass."""

    arrivals: dict[int, list[Arrival]] = field(default_factory=dict)
    further: dict[int, dict[Any, list[Individual]]] = field(default_factory=dict)
    sources: dict[int, Source] = field(default_factory=dict)
    grads: dict[int, ref[Cotangents]] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget all."""
        for store in (self.arrivals, self.further, self.sources, self.grads):
            store.clear()

    def receive(self, call: Call, place: int, grads: Tensor) -> list[Source]:
        """Note the cotangents ``[v, ...]`` of one of a call's outputs; the sources that it is the first for."""
        reference = self.grads.get(id(call))
        known = None if reference is None else reference()
        if known is not None:
            known[place] = torch.cat([known[place], grads]) if place in known else grads
            return []
        found = Cotangents({place: grads})
        self.grads[id(call)] = ref(found)
        reached = []
        for number, (source, _) in enumerate(call.uses):
            if not source.void:
                key = id(source.tensor)
                self.sources[key] = source
                self.arrivals.setdefault(key, []).append(Arrival(call, number, found))
                reached.append(source)
        return reached

    def forget(self, call: Call) -> None:
        """Drop what has arrived from a call."""
        self.grads.pop(id(call), None)
        for arrivals in self.arrivals.values():
            arrivals[:] = [arrival for arrival in arrivals if arrival.call is not call]

    def derive(self, source: Source, parameter: Tensor, key: Any, individual: Individual) -> None:
        """Note individual gradients of a parameter that came through a computed tensor."""
        self.further.setdefault(id(parameter), {}).setdefault(key, []).append(individual)
        self.sources.setdefault(id(parameter), Source(parameter, (parameter,), source.name))

    def fetch(self, tensor: Tensor) -> Contributions:
        """Take out what has reached one parameter."""
        key = id(tensor)
        self.sources.pop(key, None)
        return Contributions(tensor, self.arrivals.pop(key, []), self.further.pop(key, {}))

    def computed(self) -> list[Source]:
        """The sources that are no parameters."""
        return [source for source in self.sources.values() if source.tensor.grad_fn is not None]
