"""What ``accumulate`` returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

from torch import Tensor

from backpack.extensions.backprop_extension import BackpropExtension, Result


@dataclass(eq=False, repr=False)
class Accumulated(Mapping[str, dict[str, Any]]):
    """Results for a data set; those of an extension are on the parameters as well.

    ``loss`` and ``grad`` (by parameter name) are those of the whole data set, which has this many ``samples``.
    The object is a mapping of each ``savefield`` to its ``results``, a dictionary by parameter name:
    ``found["kfac"]["0.weight"]``, ``found.kfac``, or, with types, ``found[extension]``.

    ``places`` says by ``savefield`` which samples the rows of results of single samples belong to, where this is not
    their order: if the loader draws its own order, by their number in the data set; if results stay on their process,
    by their number among the selected samples.
    """

    loss: Tensor
    samples: int
    grad: dict[str, Tensor] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    places: dict[str, Tensor] = field(default_factory=dict)

    @overload
    def __getitem__(self, key: str) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, key: BackpropExtension[Result]) -> dict[str, Result]: ...

    def __getitem__(self, key: str | BackpropExtension[Any]) -> dict[str, Any]:
        savefield = key if isinstance(key, str) else key.savefield
        if savefield not in self.results:
            raise KeyError(f"{savefield}: there are results of {', '.join(self.results) or 'no extension'} only")
        return self.results[savefield]

    def __getattr__(self, name: str) -> dict[str, Any]:
        found: dict[str, dict[str, Any]] = self.__dict__.get("results", {})
        if name not in found:
            raise AttributeError(f"Accumulated has no attribute {name!r}, but results of {', '.join(found)}.")
        return found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __repr__(self) -> str:
        """Short: what there is, without the tensors."""
        return f"Accumulated({self.samples} samples, loss {float(self.loss):.4g}, results: {', '.join(self)})"
