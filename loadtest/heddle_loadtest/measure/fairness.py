"""How evenly the target served those who asked. Knows no latencies' distributions.

Speed is relative: the time that one's answers would have taken at the run's mean time to first token and mean time per
later token, over the time they took. So who asks for long answers is no faster than who asks for short ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from heddle_loadtest.client.result import RequestResult
from heddle_loadtest.measure.ending import Ending, ending_of


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast one of them was served, beside the run's average."""

    name: str
    relative_speed: float  # 1 is the average, 0.5 took twice the time

    def to_json(self) -> dict[str, object]:
        """The fields by name."""
        return {"name": self.name, "relative_speed": round(self.relative_speed, 6)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fairness:
    """Jain's index over adapters, or over tenants: 1 is even, 1 / count is all for one and nothing for the others."""

    count: int  # of those who asked
    answered: float | None  # over the share of one's requests that were answered; None if nobody had an answer
    speed: float | None  # over the relative speeds of those who had answers; None as well
    slowest: Speed | None
    fastest: Speed | None

    def to_json(self) -> dict[str, object]:
        """The fields by name."""
        return {
            "count": self.count,
            "answered": None if self.answered is None else round(self.answered, 6),
            "speed": None if self.speed is None else round(self.speed, 6),
            "slowest": self.slowest.to_json() if self.slowest else None,
            "fastest": self.fastest.to_json() if self.fastest else None,
        }


@dataclass(slots=True)
class _Served:
    """Times and tokens of the answers with content; an answer of one token has no time after the first."""

    num_requests: int = 0
    num_ok: int = 0
    num_first: int = 0
    num_later: int = 0  # tokens after the first
    first_seconds: float = 0.0  # until the first tokens
    later_seconds: float = 0.0  # from there to the last

    def add(self, result: RequestResult) -> None:
        self.num_requests += 1
        self.num_ok += result.is_ok
        if result.is_ok and result.ttft_seconds is not None:
            self.num_first += 1
            self.first_seconds += result.ttft_seconds
            if result.tpot_seconds is not None:
                self.num_later += result.num_output_tokens - 1
                self.later_seconds += result.end_to_end_seconds - result.ttft_seconds

    @property
    def seconds(self) -> float:
        return self.first_seconds + self.later_seconds

    def seconds_at_pace_of(self, run: _Served) -> float:
        """What its answers would have taken at the run's mean times to the first and per later token."""
        later_seconds = self.num_later * run.later_seconds / run.num_later if run.num_later else 0.0
        return self.num_first * run.first_seconds / run.num_first + later_seconds


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
    run = _Served()
    for result in results:
        if ending_of(result) is not Ending.ABANDONED:
            served.setdefault(key_of(result), _Served()).add(result)
            run.add(result)
    if len(served) < 2:
        return None
    speeds = [
        Speed(name, entry.seconds_at_pace_of(run) / entry.seconds) for name, entry in served.items() if entry.seconds
    ]
    return Fairness(
        count=len(served),
        answered=jain_index([entry.num_ok / entry.num_requests for entry in served.values()]),
        speed=jain_index([speed.relative_speed for speed in speeds]),
        slowest=min(speeds, key=attrgetter("relative_speed"), default=None),
        fastest=max(speeds, key=attrgetter("relative_speed"), default=None),
    )
