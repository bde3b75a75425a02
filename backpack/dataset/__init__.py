"""Quantities of whole data sets: batch by batch, interruptible, on several processes."""

from backpack.dataset.accumulate import Accumulated, accumulate

__all__ = ["Accumulated", "accumulate"]
