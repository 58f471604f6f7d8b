"""Counters per adapter, of which there may be thousands, in a bounded number of time series."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

OTHER = "_other"  # no adapter can have this name
MAX_SHOWN = 200
_OVERTAKE_FACTOR = 2  # so that two adapters of about equal use do not take turns


@dataclass
class _Counts:
    requests: Counter[str] = field(default_factory=Counter)  # by outcome
    tokens: Counter[str] = field(default_factory=Counter)  # by kind

    def add(self, other: _Counts) -> None:
        self.requests.update(other.requests)
        self.tokens.update(other.tokens)


class AdapterCounters(Collector):
    """The most used names have series of their own; everything else is counted together as `OTHER`.

    No series ever goes backwards. A name that comes to be among the most used begins its own series with its next
    request; what was counted for it before stays in `OTHER`. A name that is overtaken gives its series up but not its
    counts, so that it would go on where it stopped. A deleted name's counts move to `OTHER`.
    """

    def __init__(self, max_shown: int = MAX_SHOWN) -> None:
        self._max_shown = max_shown
        self._uses: Counter[str] = Counter()  # of every name, wherever its requests were counted
        self._own: dict[str, _Counts] = {}  # of every name that has or had a series
        self._shown: set[str] = set()
        self._other = _Counts()
        self._is_registered: Callable[[str], bool] = lambda name: True

    def watch(self, is_registered: Callable[[str], bool]) -> None:
        """Names that are not registered any more are forgotten at every scrape."""
        self._is_registered = is_registered

    def count(self, name: str, outcome: str, num_prompt_tokens: int, num_generated_tokens: int) -> None:
        """One request that used the adapter has ended."""
        self._uses[name] += 1
        counts = self._own.setdefault(name, _Counts()) if self._is_shown(name) else self._other
        counts.requests[outcome] += 1
        counts.tokens["prompt"] += num_prompt_tokens
        counts.tokens["generated"] += num_generated_tokens

    def num_uses(self, name: str) -> int:
        """Requests since the name was first used."""
        return self._uses[name]

    def collect(self) -> Iterator[Metric]:
        self._forget_deleted()
        requests = CounterMetricFamily(
            "heddle_adapter_requests",
            "Requests that used the adapter, by outcome.",
            labels=["adapter", "outcome"],
        )
        tokens = CounterMetricFamily(
            "heddle_adapter_tokens", "Tokens of requests that used the adapter.", labels=["adapter", "kind"]
        )
        for name, counts in [*((name, self._own[name]) for name in sorted(self._shown)), (OTHER, self._other)]:
            for outcome, count in counts.requests.items():
                requests.add_metric([name, outcome], count)
            for kind, count in counts.tokens.items():
                tokens.add_metric([name, kind], count)
        yield requests
        yield tokens

    def _is_shown(self, name: str) -> bool:
        """Whether the name has a series of its own, in place of a far less used one if need be."""
        if name in self._shown:
            return True
        if len(self._shown) >= self._max_shown:
            least_used = min(self._shown, key=self._uses.__getitem__)
            if self._uses[name] <= _OVERTAKE_FACTOR * self._uses[least_used]:
                return False
            self._shown.remove(least_used)
        self._shown.add(name)
        return True

    def _forget_deleted(self) -> None:
        for name in [name for name in self._uses if not self._is_registered(name)]:
            del self._uses[name]
            self._shown.discard(name)
            if counts := self._own.pop(name, None):
                self._other.add(counts)
