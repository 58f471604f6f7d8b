"""A set of measured values, boiled down. Knows no requests and no units."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True, slots=True)
class Distribution:
    """The values' number, mean, percentiles (linear between the two nearest, as numpy's default) and largest."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    p99_9: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self | None:
        """The distribution of `values`, or None if there are none."""
        array = np.fromiter(values, dtype=np.float64)
        if not array.size:
            return None
        p50, p90, p99, p99_9 = (float(value) for value in np.percentile(array, (50, 90, 99, 99.9)))
        return cls(array.size, float(array.mean()), p50, p90, p99, p99_9, float(array.max()))

    def to_json(self) -> dict[str, float]:
        """The fields by name, rounded to what a clock can tell."""
        return {name: round(value, 6) for name, value in asdict(self).items()}
