"""Which entries of tensors belong to which sample: layouts, and subsets of the samples."""

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
