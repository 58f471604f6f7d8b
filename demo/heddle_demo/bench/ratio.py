"""How one thing compares with another that was measured in turn with it: a ratio and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Self

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Ratio:
    """The ratio of two medians with a bootstrap interval."""

    value: float
    low: float
    high: float
    num_pairs: int

    @classmethod
    def of(cls, baseline: Sequence[float], candidate: Sequence[float], seed: int = 0) -> Self:
        """`candidate` over `baseline`, whose i-th values were measured one right after the other.

        Percentile bootstrap over the pairs (Efron 1979): neighbours are drawn together, so that what slows the
        machine for both of a pair does not widen the interval.
        """
        pairs = np.array([baseline, candidate], dtype=np.float64)  # [2, num_pairs]
        num_pairs = pairs.shape[1]
        draws = np.random.default_rng(seed).integers(num_pairs, size=(NUM_RESAMPLES, num_pairs))
        medians = np.median(pairs[:, draws], axis=2)  # [2, num_resamples]
        tail = 100 * (1 - CONFIDENCE) / 2
        low, high = np.percentile(medians[1] / medians[0], [tail, 100 - tail])
        return cls(median(candidate) / median(baseline), float(low), float(high), num_pairs)

    def __str__(self) -> str:
        return f"{self.value:.3f}x [{self.low:.3f}, {self.high:.3f}]"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
