"""Warm and cold: requests by where the target held their adapter when they came. Only heddle says so in its replies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from heddle_loadtest.client.result import RequestResult
from heddle_loadtest.measure.row import Row, row_of
from heddle_loadtest.workload.spec import Slo

TIERS = ("device", "host", "disk")  # from near to far
_WARM_TIER = "device"


@dataclass(frozen=True, slots=True, kw_only=True)
class TtftParts:
    """What the time to the first token went to: means over the requests whose replies say so."""

    num_requests: int
    ttft_seconds: float  # as the client saw it
    queue_seconds: float  # until the target began to compute the request, the adapter's load included
    load_seconds: float  # until the adapter was on the device

    @property
    def queue_share(self) -> float:
        """Of the time to the first token; the load is a part of it."""
        return self.queue_seconds / self.ttft_seconds if self.ttft_seconds > 0 else 0.0

    @property
    def load_share(self) -> float:
        """Of the time to the first token."""
        return self.load_seconds / self.ttft_seconds if self.ttft_seconds > 0 else 0.0

    def to_json(self) -> dict[str, float]:
        """The fields and shares by name."""
        values = asdict(self) | {"queue_share": self.queue_share, "load_share": self.load_share}
        return {name: round(value, 6) for name, value in values.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Temperature:
    """Only requests that name an adapter and whose reply says where it was; a refused request has no such reply."""

    warm: Row  # the adapter was on the device
    cold: Row  # it was not
    tiers: dict[str, Row]  # by tier; the tiers nobody hit are left out
    hit_rates: dict[str, float]  # tier -> share of these requests, all of TIERS; disk is a miss
    parts: TtftParts | None  # over all requests that say, the base model's included

    def to_json(self) -> dict[str, object]:
        """The fields by name."""
        return {
            "warm": self.warm.to_json(),
            "cold": self.cold.to_json(),
            "tiers": {tier: row.to_json() for tier, row in self.tiers.items()},
            "hit_rates": {tier: round(share, 6) for tier, share in self.hit_rates.items()},
            "parts": self.parts.to_json() if self.parts else None,
        }


def temperature_of(results: Sequence[RequestResult], elapsed_seconds: float, slo: Slo | None) -> Temperature | None:
    """The split of `results`; None if no reply says anything of the kind."""
    located = [(tier, result) for result in results if (tier := _tier(result)) is not None]
    parts = ttft_parts(results)
    if not located and parts is None:
        return None
    counts = Counter(tier for tier, _ in located)
    by_tier = {tier: [result for found, result in located if found == tier] for tier in (*TIERS, *counts)}
    warm = by_tier[_WARM_TIER]
    cold = [result for tier, result in located if tier != _WARM_TIER]
    return Temperature(
        warm=row_of(warm, elapsed_seconds, slo),
        cold=row_of(cold, elapsed_seconds, slo),
        tiers={tier: row_of(group, elapsed_seconds, slo) for tier, group in by_tier.items() if group},
        hit_rates={tier: counts[tier] / len(located) for tier in by_tier} if located else {},
        parts=parts,
    )


def ttft_parts(results: Sequence[RequestResult]) -> TtftParts | None:
    """The means over good requests with a reply that tells the queue's part; None if there are none."""
    rows = [
        (result.ttft_seconds, result.server.queue_seconds, result.server.load_seconds or 0.0)
        for result in results
        if result.is_ok
        and result.ttft_seconds is not None
        and result.server is not None
        and result.server.queue_seconds is not None
    ]
    if not rows:
        return None
    ttft_seconds, queue_seconds, load_seconds = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    return TtftParts(
        num_requests=len(rows), ttft_seconds=ttft_seconds, queue_seconds=queue_seconds, load_seconds=load_seconds
    )


def _tier(result: RequestResult) -> str | None:
    return result.server.cache if result.server is not None else None
