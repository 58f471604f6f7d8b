"""How many requests a second a tenant may send: a bucket of tokens that fills at that rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from heddle_server.api.errors import RateLimitExceeded

MAX_RETRY_SECONDS = 3600

# A change waits for the disk and is a line in the audit log, refused or not, so that nobody may send any number.
CHANGES_PER_SECOND = 20.0
CHANGES_AT_ONCE = 60


@dataclass
class _Bucket:
    tokens: float
    filled_at: float


class RequestRates:
    """The buckets of all tenants that have a limit, for requests of one kind."""

    def __init__(self, what: str = "requests", clock: Callable[[], float] = time.monotonic) -> None:
        """`what` they are, for people."""
        self._what = what
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, tenant: str, requests_per_second: float | None, at_once: int = 1) -> None:
        """One request of a tenant, whose limit may have changed; raises `RateLimitExceeded`.

        A bucket holds what comes in a second, and that many `at_once` at least.
        """
        if requests_per_second is None:
            self._buckets.pop(tenant, None)
            return
        now, size = self._clock(), max(float(at_once), requests_per_second)
        bucket = self._buckets.setdefault(tenant, _Bucket(size, now))
        bucket.tokens = min(size, bucket.tokens + (now - bucket.filled_at) * requests_per_second)
        bucket.filled_at = now
        if bucket.tokens < 1:
            seconds = math.ceil((1 - bucket.tokens) / requests_per_second)
            raise RateLimitExceeded(
                f"You may send {requests_per_second:g} {self._what} a second, and have sent more.",
                retry_after_seconds=min(max(seconds, 1), MAX_RETRY_SECONDS),
            )
        bucket.tokens -= 1
