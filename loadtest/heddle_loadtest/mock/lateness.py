"""How late the fake server itself was, token by token, in bounded memory. Reads no clock."""

from __future__ import annotations

_BUCKET_SECONDS = 0.0001
_NUM_BUCKETS = 20_000  # what is later than 2 s counts in the last one


class Lateness:
    """Counts by tenths of a millisecond: quantiles are right to that, the maximum exactly."""

    def __init__(self) -> None:
        self._counts = [0] * _NUM_BUCKETS
        self._num_tokens = 0
        self._max_seconds = 0.0

    def add(self, seconds: float) -> None:
        """One token left so much after it was due; less than nothing, by the clock's resolution, is nothing."""
        bucket = int(seconds / _BUCKET_SECONDS)
        self._counts[min(max(bucket, 0), _NUM_BUCKETS - 1)] += 1
        self._num_tokens += 1
        if seconds > self._max_seconds:
            self._max_seconds = seconds

    def quantile(self, share: float) -> float:
        """The upper end of the bucket that holds it, in seconds; 0 if nothing was counted."""
        rank = share * self._num_tokens
        seen = 0
        for index, count in enumerate(self._counts):
            seen += count
            if count and seen >= rank:
                return min((index + 1) * _BUCKET_SECONDS, self._max_seconds)
        return 0.0

    def to_json(self) -> dict[str, float]:
        """What /mock/lateness answers."""
        return {
            "count": self._num_tokens,
            "p50_seconds": self.quantile(0.5),
            "p99_seconds": self.quantile(0.99),
            "max_seconds": self._max_seconds,
        }
