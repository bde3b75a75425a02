"""Quantities of whole data sets: batch by batch, interruptible, on several processes."""

from backpack.dataset.accumulate import Accumulated, accumulate
from backpack.dataset.across_processes import across_processes

__all__ = ["Accumulated", "accumulate", "across_processes"]
