"""Parameters of extended modules: their names, and the modules that own them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

from torch import Tensor
from torch.nn import Module
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(eq=False)
class ParameterInfo:
    """A parameter of extended modules: its name, and the modules that own it."""

    name: str
    references: list[ref[Module]] = field(default_factory=list)
    explained: set[bool] = field(default_factory=set)
    """Modes of training in which its gradient was compared with what was delivered."""

    @property
    def owners(self) -> list[Module]:
        """The owners that still exist."""
        return [owner for reference in self.references if (owner := reference()) is not None]

    @property
    def training(self) -> bool:
        """Whether one of them is in training mode."""
        return any(owner.training for reference in self.references if (owner := reference()) is not None)

    def add(self, owner: Module, path: str) -> None:
        """Add a module that owns the parameter; the name is the path in the largest model that was extended."""
        if path.endswith(f".{self.name}"):
            self.name = path
        self.references[:] = [ref(known) for known in self.owners if known is not owner] + [ref(owner)]


PARAMETERS: Any = WeakTensorKeyDictionary()
"""Parameter to ``ParameterInfo``."""


_by_number: dict[int, tuple[ref[Tensor], ParameterInfo]] = {}


def info_of(parameter: Tensor) -> ParameterInfo | None:
    """The ``ParameterInfo`` of a parameter; faster than ``PARAMETERS.get``."""
    known = _by_number.get(id(parameter))
    if known is not None and known[0]() is parameter:
        return known[1]
    found = PARAMETERS.get(parameter)
    if found is not None:
        number = id(parameter)
        _by_number[number] = (ref(parameter, lambda _: _by_number.pop(number, None)), found)
    return found


def listed(names: Sequence[str]) -> str:
    """The first three of some names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def name_of(parameter: Tensor) -> str:
    """The path of a parameter in the model that was extended; of a gathered one, that of the sharded one."""
    reference = SHARDED.get(parameter) if SHARDED else None
    sharded = None if reference is None else reference()
    known = info_of(parameter if sharded is None else sharded)
    return "of an extended module" if known is None else known.name


def forget_parameter(parameter: Tensor) -> None:
    """Forget a parameter."""
    _by_number.pop(id(parameter), None)
    PARAMETERS.pop(parameter, None)


SHARDED: Any = WeakTensorKeyDictionary()
"""Whole parameter that a fully sharded module has gathered to a weak reference to the sharded one."""


def trainable(module: Module) -> list[Tensor]:
    """The parameters of the module itself that receive gradients."""
    return [p for p in module._parameters.values() if p is not None and p.requires_grad]


def is_transposed_kernel(parameter: Tensor) -> bool | None:
    """Whether a parameter is the weight of a transposed convolution; ``None``: its modules do not tell."""
    info = info_of(parameter)
    owners = [] if info is None else info.owners
    plain = [
        isinstance(module, _ConvTransposeNd)
        for module in owners
        if isinstance(module, _ConvNd)
        and type(module).forward.__module__ == _ConvNd.__module__
        and module._parameters.get("weight") is parameter
    ]
    return plain[0] if plain and len(plain) == len(owners) else None
