"""Percentiles, geometric means, and how numbers are printed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def percentile(samples: Sequence[float], percent: float) -> float:
    """The value below which that share of the samples lies, interpolated linearly; NaN without samples."""
    if not samples:
        return math.nan
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive values; NaN without values, or if one is NaN."""
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs)) if logs else math.nan


def ratio(numerator: float, denominator: float) -> float:
    """The quotient; NaN where the denominator is 0 or either is NaN."""
    return numerator / denominator if denominator else math.nan


def number(value: float, digits: int) -> str:
    """Fixed digits; ``-`` for NaN."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
