"""How evenly the target served those who asked. Knows no latencies' distributions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from heddle_loadtest.client.result import RequestResult
from heddle_loadtest.measure.ending import Ending, ending_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Fairness:
    """Jain's index over adapters, or over tenants: 1 is even, 1 / count is all for one and nothing for the others."""

    count: int  # of those who asked
    answered: float | None  # over the share of one's requests that were answered; None if nobody had an answer
    speed: float | None  # over the output tokens one got per second that one's requests took, failed ones included
    slowest: str  # who has the lowest speed
    slowest_tokens_per_second: float
    fastest: str
    fastest_tokens_per_second: float

    def to_json(self) -> dict[str, object]:
        """The fields by name."""
        return {
            "count": self.count,
            "answered": None if self.answered is None else round(self.answered, 6),
            "speed": None if self.speed is None else round(self.speed, 6),
            "slowest": {"name": self.slowest, "tokens_per_second": round(self.slowest_tokens_per_second, 3)},
            "fastest": {"name": self.fastest, "tokens_per_second": round(self.fastest_tokens_per_second, 3)},
        }


@dataclass(slots=True)
class _Served:
    num_requests: int = 0
    num_ok: int = 0
    num_tokens: int = 0
    seconds: float = 0.0

    def add(self, result: RequestResult) -> None:
        self.num_requests += 1
        self.seconds += result.end_to_end_seconds
        if result.is_ok:
            self.num_ok += 1
            self.num_tokens += result.num_output_tokens

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0


def fairness_by_adapter(results: Iterable[RequestResult]) -> Fairness | None:
    """Over the adapters asked for, the base model being one; None with fewer than two."""
    return _fairness(results, "adapter")


def fairness_by_tenant(results: Iterable[RequestResult]) -> Fairness | None:
    """Over the tenants; None with fewer than two."""
    return _fairness(results, "tenant")


def jain_index(values: Sequence[float] | NDArray[np.float64]) -> float | None:
    """(sum x)² / (n · sum x²); None for no values or zeros alone.

    Source: R. Jain, D. Chiu, W. Hawe, "A quantitative measure of fairness and discrimination for resource allocation
    in shared computer systems", DEC-TR-301 (1984).
    """
    array = np.asarray(values, dtype=np.float64)
    squares = float((array * array).sum())
    return float(array.sum()) ** 2 / (array.size * squares) if squares > 0 else None


def _fairness(results: Iterable[RequestResult], attribute: str) -> Fairness | None:
    key_of = attrgetter(attribute)
    served: dict[str, _Served] = {}
    for result in results:
        if ending_of(result) is not Ending.ABANDONED:
            served.setdefault(key_of(result), _Served()).add(result)
    if len(served) < 2:
        return None
    speeds = {name: entry.tokens_per_second for name, entry in served.items()}
    slowest, fastest = min(speeds, key=speeds.__getitem__), max(speeds, key=speeds.__getitem__)
    return Fairness(
        count=len(served),
        answered=jain_index([entry.num_ok / entry.num_requests for entry in served.values()]),
        speed=jain_index(list(speeds.values())),
        slowest=slowest,
        slowest_tokens_per_second=speeds[slowest],
        fastest=fastest,
        fastest_tokens_per_second=speeds[fastest],
    )
