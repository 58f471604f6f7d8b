"""A set of measured values, boiled down. Knows no requests and no units."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Distribution:
    """The values' number, mean, percentiles and largest."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self | None:
        """The distribution of `values`, or None if there are none."""
        ordered = sorted(values)
        if not ordered:
            return None
        p50, p90, p99 = (percentile(ordered, percent) for percent in (50, 90, 99))
        return cls(len(ordered), math.fsum(ordered) / len(ordered), p50, p90, p99, ordered[-1])

    def to_json(self) -> dict[str, float]:
        """The fields by name, rounded to what a clock can tell."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Percentile of ascending values, linear between the two nearest, as numpy's default; at least one value."""
    position = (len(ordered) - 1) * percent / 100
    lower, upper = math.floor(position), math.ceil(position)
    return ordered[lower] + (ordered[upper] - ordered[lower]) * (position - lower)
