"""Quantities of whole data sets: batch by batch, interruptible, on several processes."""

from backpack.dataset.accumulate import Accumulated, accumulate
from backpack.dataset.across_processes import across_processes
from backpack.dataset.curvature_store import CurvatureStore
from backpack.dataset.running_mean import RunningMean

__all__ = ["Accumulated", "CurvatureStore", "RunningMean", "accumulate", "across_processes"]
