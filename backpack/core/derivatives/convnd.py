"""A switch of the original for the memory that convolutions take."""

from __future__ import annotations

from typing import Any


class weight_jac_t_save_memory:
    """Context in which convolutions save memory. They always do here, so that it changes nothing."""

    def __init__(self, save_memory: bool = True) -> None:
        self.save_memory = save_memory

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, *exception: Any) -> None:
        """Do nothing."""
