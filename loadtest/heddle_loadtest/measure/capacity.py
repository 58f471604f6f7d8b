"""The highest rate that a target sustains: which rate to try next. Runs nothing.

Rates go up by doubling until one is not sustained, then the gap is halved on a logarithmic scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from heddle_loadtest.measure.goodput import wilson_interval

TARGET_SHARE = 0.95
TOLERANCE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One run at one rate."""

    rate: float  # requests per second, as asked for
    num_kept: int  # requests that kept the service level
    num_requests: int  # all that ended, failed ones included
    is_valid: bool  # whether the client kept up; if not, a broken level may be the client's fault

    @property
    def share(self) -> float:
        """Of the requests that kept the service level; 0 without requests."""
        return self.num_kept / self.num_requests if self.num_requests else 0.0

    @property
    def share_interval(self) -> tuple[float, float]:
        """95 %, Wilson's."""
        return wilson_interval(self.num_kept, self.num_requests)

    def is_sustained(self, target_share: float = TARGET_SHARE) -> bool:
        """Whether enough requests kept the service level, by the point estimate.

        A late client only adds to latencies, which count from the scheduled times: what was kept all the same was kept.
        """
        return self.num_requests > 0 and self.share >= target_share


def next_rate(
    probes: Sequence[Probe],
    low: float,
    high: float,
    tolerance: float = TOLERANCE,
    target_share: float = TARGET_SHARE,
) -> float | None:
    """The rate to try next, within low (> 0) and high; None when the search is over.

    It is over when the highest sustained rate and the lowest other one are within `tolerance` of each other, when
    `low` is not sustained, or when `high` is. One failed rate counts against all rates above it.
    """
    if not 0 < low <= high:
        raise ValueError(f"rates from {low} to {high}: the lower one must be positive and not above the other")
    if not probes:
        return low
    sustained = sustained_rate(probes, target_share)
    failed = min((probe.rate for probe in probes if not probe.is_sustained(target_share)), default=None)
    if sustained is None:  # there is a failed one, then; below it nothing is known but perhaps for `low`
        return low if failed is not None and failed > low else None
    if failed is None:
        return min(2 * sustained, high) if sustained < high else None
    return math.sqrt(sustained * failed) if failed > (1 + tolerance) * sustained else None


def sustained_rate(probes: Sequence[Probe], target_share: float = TARGET_SHARE) -> float | None:
    """The highest rate sustained below every one that was not; None if there is none."""
    failed = min((probe.rate for probe in probes if not probe.is_sustained(target_share)), default=math.inf)
    return max((p.rate for p in probes if p.is_sustained(target_share) and p.rate < failed), default=None)
