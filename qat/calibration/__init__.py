"""Calibration: ranges from data, by maximum, percentile, squared error or entropy, on shared histograms."""

from .collect import calibrate
from .histogram import Histogram
from .methods import METHODS, find_amax
from .result import Calibration

__all__ = ["METHODS", "Calibration", "Histogram", "calibrate", "find_amax"]
