"""Whose entry is it: layouts of samples, and subsets of them."""

from backpack.samples.ids import SampleIds
from backpack.samples.layouts import (
    AnyLayout,
    Layout,
    Rows,
    Scattered,
    completed,
    found_layout,
    layouts,
    same,
)
from backpack.samples.subsets import Subset

__all__ = [
    "AnyLayout",
    "Layout",
    "Rows",
    "SampleIds",
    "Scattered",
    "Subset",
    "completed",
    "found_layout",
    "layouts",
    "same",
]
