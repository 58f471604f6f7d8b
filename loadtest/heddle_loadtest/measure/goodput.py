"""Goodput: the requests that kept the service level. Knows no latencies but those that the level limits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from heddle_loadtest.client.result import RequestResult
from heddle_loadtest.measure.ending import Ending, ending_of
from heddle_loadtest.workload.spec import Slo

_Z_95 = 1.959963984540054  # the standard normal's 97.5 % quantile


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Failed requests count as broken, abandoned ones not at all."""

    num_kept: int
    num_requests: int
    share: float | None  # num_kept / num_requests; None without requests
    share_low: float  # 95 % Wilson interval; 0 to 1 without requests
    share_high: float
    requests_per_second: float  # of those that kept it

    def to_json(self) -> dict[str, object]:
        """The fields by name."""
        return {
            "num_kept": self.num_kept,
            "num_requests": self.num_requests,
            "share": None if self.share is None else round(self.share, 6),
            "share_interval": [round(self.share_low, 6), round(self.share_high, 6)],
            "requests_per_second": round(self.requests_per_second, 3),
        }


def goodput_of(results: Sequence[RequestResult], elapsed_seconds: float, slo: Slo) -> Goodput:
    """The goodput of `results`, which ended within `elapsed_seconds`."""
    ended = [result for result in results if ending_of(result) is not Ending.ABANDONED]
    num_kept = sum(keeps(result, slo) for result in ended)
    low, high = wilson_interval(num_kept, len(ended))
    return Goodput(
        num_kept=num_kept,
        num_requests=len(ended),
        share=num_kept / len(ended) if ended else None,
        share_low=low,
        share_high=high,
        requests_per_second=num_kept / elapsed_seconds if elapsed_seconds else 0.0,
    )


def keeps(result: RequestResult, slo: Slo) -> bool:
    """Whether one request kept every limit that is set.

    An answer without content breaks a limit on its first token; one of a single token has no time per token to limit.
    """
    if not result.is_ok or (slo.ttft_seconds is not None and result.ttft_seconds is None):
        return False
    pairs = (
        (result.ttft_seconds, slo.ttft_seconds),
        (result.tpot_seconds, slo.tpot_seconds),
        (result.end_to_end_seconds, slo.end_to_end_seconds),
    )
    return _all_within(pairs)


def wilson_interval(num_kept: int, num_requests: int, z: float = _Z_95) -> tuple[float, float]:
    """The score interval of a share, right even near 0 and 1 where the usual one leaves [0, 1].

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927):
    centre (p + z²/2n) / (1 + z²/n), half width z / (1 + z²/n) · sqrt(p(1-p)/n + z²/4n²).
    """
    if num_requests == 0:
        return 0.0, 1.0
    share, weight = num_kept / num_requests, z * z / num_requests
    centre = (share + weight / 2) / (1 + weight)
    half_width = math.sqrt(share * (1 - share) * weight + weight * weight / 4) / (1 + weight)
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def _all_within(pairs: Iterable[tuple[float | None, float | None]]) -> bool:
    return all(value is None or limit is None or value <= limit for value, limit in pairs)
