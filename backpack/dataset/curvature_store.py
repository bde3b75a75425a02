"""Curvature of a data set that is read from files, one layer at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backpack.dataset.checkpoint import State, read
from backpack.dataset.store_files import file_of, file_of_run
from backpack.modules.parameters import listed
from backpack.utils.eigen import applied_to_vectors, exchanges_axes
from backpack.utils.kroneckers import Eigen, apply_inv_kfac_mat_prod, eigh_kfacs, pi_damping

Curvature = Tensor | list[Tensor] | Eigen
"""A diagonal, Kronecker factors, or an eigendecomposition."""


class CurvatureStore(Mapping[str, Curvature]):
    """What ``accumulate(..., store=folder)`` has written: the result of each parameter by its name, read when asked.

    ``store["0.weight"]`` is what ``found["ekfac"]["0.weight"]`` would be, on the CPU. The products below hold the
    result of one parameter in memory at a time::

        store = CurvatureStore(folder)
        influence = store.inner_products(gradients_of_queries, gradients_of_samples, damping=1e-3)

    Args:
        folder: The folder.
        savefield: The ``savefield`` of the extension, if there were several.

    Raises:
        FileNotFoundError: There is no such run in the folder.
        ValueError: Files are missing, damaged or of another run; or the run had several extensions.
    """

    def __init__(self, folder: str | os.PathLike[str], savefield: str | None = None) -> None:
        self.folder = Path(folder)
        runs = sorted(self.folder.glob(file_of_run(self.folder, 0, "*").name))
        if not runs:
            raise FileNotFoundError(f"{self.folder} is no folder that accumulate(..., store=folder) has written to.")
        run = read(runs[0], tensors=False)
        paths = {name: file_of(self.folder, name) for name in run["names"]}
        if missing := [name for name, path in paths.items() if not path.exists()]:
            raise ValueError(
                f"{self.folder} is not complete, the files of {listed(missing)} are missing: make the same call of "
                f"accumulate() again, which computes what is missing."
            )
        files = {name: read(path, tensors=False) for name, path in paths.items()}
        for name, file in files.items():
            if file["identity"] != run["identity"]:
                raise ValueError(f"{paths[name]} is of another run than {runs[0].name!r} in its folder.")
        fields = list(dict.fromkeys(field for file in files.values() for field in file["results"]))
        if savefield is None and len(fields) != 1:
            raise ValueError(
                f"{self.folder} has results of {', '.join(fields) or 'no extension'}: give the savefield of one."
            )
        self.savefield = savefield or fields[0]
        if self.savefield not in fields:
            raise ValueError(f"{self.folder} has results of {', '.join(fields)}, but none of {savefield}.")
        self.shapes = {
            name: torch.Size(file["shape"]) for name, file in files.items() if self.savefield in file["results"]
        }
        """The shapes of the parameters that have a result, by name."""

    def __repr__(self) -> str:
        return f"CurvatureStore({str(self.folder)!r}, {self.savefield!r}): {len(self)} parameters"

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Curvature:
        return self._read(name)[0]

    def _read(self, name: str) -> tuple[Curvature, bool | None]:
        """The result of a parameter, and whether it refers to the parameter with its first two axes exchanged."""
        if name not in self.shapes:
            raise KeyError(f"{name}: there are results of {listed(list(self.shapes))} only")
        state: State = read(file_of(self.folder, name))
        result: Any = state["results"][self.savefield]
        return Eigen(**result) if isinstance(result, dict) else result, state["transposed"]

    def inverse_product(
        self, vectors: Mapping[str, Tensor], damping: float, factored: bool = False
    ) -> dict[str, Tensor]:
        """``(G + damping I)^-1 v`` for the block ``G`` of each parameter, and several vectors.

        Args:
            vectors: By name of the parameter ``[V, *p]``, as the rows of ``BatchGrad``. Not all parameters are needed.
            damping: What is added to the diagonal of each block. With Kronecker factors, this decomposes them in each
                call; the results of ``EKFAC`` are decomposed already.
            factored: Whether to add the damping to the Kronecker factors instead, as ``pi_damping`` divides it
                (Martens & Grosse, 2015, section 6.3).

        Returns:
            By name ``[V, *p]``, on the device and in the data type of the vectors.

        Raises:
            KeyError: There is no result for a parameter.
            ValueError: Vectors have a wrong shape, a damped block is singular, or the damping is negative.
        """
        self._check(vectors, damping)
        return {name: self._solve(name, given, damping, factored) for name, given in vectors.items()}

    def inner_products(
        self, left: Mapping[str, Tensor], right: Mapping[str, Tensor], damping: float, factored: bool = False
    ) -> Tensor:
        """``v^H (G + damping I)^-1 w``, summed over parameters, for each pair of vectors: ``[V, W]``.

        Args:
            left: By name of the parameter ``[V, *p]``.
            right: By name ``[W, *p]``, of the same parameters.
            damping: As for ``inverse_product``.
            factored: As for ``inverse_product``.

        Raises:
            KeyError: There is no result for a parameter.
            ValueError: The names differ; or as for ``inverse_product``.
        """
        if left.keys() != right.keys() or not left:
            others = sorted(left.keys() ^ right.keys())
            raise ValueError(
                f"Both sides of inner products need vectors for the same parameters, and at least for one; "
                f"{listed(others) or 'none'} has them on one side only."
            )
        self._check(left, damping)
        self._check(right, damping)
        few, many = (left, right) if _count(left) < _count(right) else (right, left)
        total: Tensor | None = None
        for name, own in few.items():
            pair = self._solve(name, own, damping, factored), many[name]
            solved, other = (vectors.reshape(len(vectors), self.shapes[name].numel()) for vectors in pair)
            term = solved.conj() @ other.T if few is left else other.conj() @ solved.T
            total = term if total is None else total + term
        assert total is not None
        return total

    def _check(self, vectors: Mapping[str, Tensor], damping: float) -> None:
        if not damping >= 0:
            raise ValueError(f"damping must not be negative, got {damping}.")
        if unknown := [name for name in vectors if name not in self.shapes]:
            raise KeyError(f"{listed(unknown)}: there are results of {listed(list(self.shapes))} only")
        counts = {name: len(own) if own.dim() else 0 for name, own in vectors.items()}
        for name, own in vectors.items():
            if own.shape[1:] != self.shapes[name] or own.dim() == 0:
                raise ValueError(
                    f"The vectors for {name} have the shape {list(own.shape)}; it must be [V, "
                    f"{', '.join(map(str, self.shapes[name]))}], for V vectors."
                )
        if len(set(counts.values())) > 1:
            raise ValueError(f"There must be as many vectors for each parameter; got {counts}.")

    def _solve(self, name: str, vectors: Tensor, damping: float, factored: bool) -> Tensor:
        found, known = self._read(name)
        result = _moved(found, vectors.device)
        if factored and not isinstance(result, list):
            raise ValueError(f"factored=True is for Kronecker factors, and {self.savefield} has none: leave it out.")
        if isinstance(result, Tensor):
            damped = result.double() + damping
            if bool((damped == 0).any()):
                raise ValueError(f"The diagonal for {name} has zeros: give a positive damping.")
            return (vectors / damped).to(vectors.dtype)
        turned = exchanges_axes(name, result, self.shapes[name], known)

        def solved(columns: Tensor) -> Tensor:
            if isinstance(result, list) and factored:
                return apply_inv_kfac_mat_prod(result, columns, pi_damping(result, damping))
            eigen = eigh_kfacs(result) if isinstance(result, list) else result
            return eigen.apply_inverse(columns, damping)

        return applied_to_vectors(solved, vectors.to(_first(result).dtype), turned).to(vectors.dtype)


def _count(vectors: Mapping[str, Tensor]) -> int:
    return len(next(iter(vectors.values())))


def _first(result: list[Tensor] | Eigen) -> Tensor:
    return result.bases[0] if isinstance(result, Eigen) else result[0]


def _moved(result: Curvature, device: torch.device) -> Curvature:
    if isinstance(result, Eigen):
        return Eigen([basis.to(device) for basis in result.bases], result.eigenvalues.to(device))
    return [factor.to(device) for factor in result] if isinstance(result, list) else result.to(device)
