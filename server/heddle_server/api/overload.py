"""Refuses early what the server could not answer in time, instead of queueing it.

Knows requests, tenants and tokens, and how many tokens the engine computes; neither HTTP nor adapters, and no clock
but the one it is given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from heddle_server.api.errors import InvalidRequest, Overloaded, RateLimitExceeded, TenantOverloaded
from heddle_server.messages import EngineStats

MAX_RETRY_SECONDS = 30
KEPT_FREE = 8  # one place in so many, while one tenant has all the others
_RATE_MEMORY_SECONDS = 10.0  # of busy steps: older ones count for less
_RATE_MIN_SECONDS = 1.0  # of busy steps, before their rate is believed
_RATE_MAX_AGE_SECONDS = 30.0  # since the last busy step: what was measured longer ago may not hold any more
_ANSWER_WEIGHT = 0.05  # of one more answer in the mean length

Reason = Literal["requests", "tenant", "wait", "quota"]


class TokenRate:
    """Tokens per second that the engine computes when it has all the work it can take.

    An engine with little to do computes few tokens a second, which says nothing of what it could: such steps are not
    counted.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: EngineStats | None = None
        self._busy_at = -math.inf
        self._tokens = 0.0
        self._seconds = 0.0

    @property
    def value(self) -> float | None:
        """None when nothing is known."""
        is_fresh = self._clock() - self._busy_at <= _RATE_MAX_AGE_SECONDS
        is_known = is_fresh and self._seconds >= _RATE_MIN_SECONDS and self._tokens > 0
        return self._tokens / self._seconds if is_known else None

    def observe(self, stats: EngineStats, *, is_busy: bool) -> None:
        """The engine's counts after one more step."""
        last, self._last = self._last, stats
        if not is_busy or last is None or stats.step_seconds <= last.step_seconds:  # or a new engine
            return
        seconds = stats.step_seconds - last.step_seconds
        if self._clock() - self._busy_at > _RATE_MAX_AGE_SECONDS:
            self._tokens = self._seconds = 0.0
        kept = math.exp(-seconds / _RATE_MEMORY_SECONDS)
        self._tokens = self._tokens * kept + stats.num_computed_tokens - last.num_computed_tokens
        self._seconds = self._seconds * kept + seconds
        self._busy_at = self._clock()


@dataclass
class _Load:
    """What one tenant has in flight."""

    tenant: str
    num_requests: int = 0
    num_queued: int = 0  # of those, without a first token
    queued_tokens: int = 0  # of their prompts
    num_cold: int = 0  # of those queued, whose adapter was not on the device when they came
    cold_tokens: int = 0  # of their prompts
    refused_at: float = -math.inf  # a tenant that was turned away a moment ago still wants its share


class Place:
    """One request's place in the server, from `LoadGate.enter` to `leave`."""

    def __init__(self, gate: LoadGate, load: _Load) -> None:
        self._gate = gate
        self._load = load
        self._num_queued_tokens: int | None = None
        self._is_cold = False
        load.num_requests += 1

    def take_more(self, num_places: int) -> list[Place]:
        """Places for the other answers of the same request; raises `Overloaded`, and `InvalidRequest` if there never
        can be so many."""
        self._gate.check_places(self._load, num_places)
        return [Place(self._gate, self._load) for _ in range(num_places)]

    def queue(self, places: Sequence[Place], num_prompt_tokens: Sequence[int], *, is_cold: bool = False) -> None:
        """The prompts of all answers of the request, this one's among them, are known and go to the engine together.

        Raises `Overloaded` if too many came before meanwhile, and `RateLimitExceeded` if the tenant may not have so
        much more waiting; then none of them waits. `is_cold`: the adapter has to come to the device first.
        """
        self._gate.check_wait(self._load)
        self._gate.check_queued(self._load, sum(num_prompt_tokens))
        for place, num_tokens in zip(places, num_prompt_tokens, strict=True):
            place._num_queued_tokens, place._is_cold = num_tokens, is_cold
            self._load.num_cold += is_cold
            self._load.cold_tokens += is_cold * num_tokens
            self._load.num_queued += 1
            self._load.queued_tokens += num_tokens

    def start(self) -> None:
        """The first token is there."""
        if self._num_queued_tokens is not None:
            self._load.num_queued -= 1
            self._load.queued_tokens -= self._num_queued_tokens
            self._load.num_cold -= self._is_cold
            self._load.cold_tokens -= self._is_cold * self._num_queued_tokens
            self._num_queued_tokens = None

    def count_answer(self, num_tokens: int) -> None:
        """The whole answer is there: others of about its length will follow."""
        self._gate.count_answer(num_tokens)

    def leave(self) -> None:
        """The request has ended, however it did."""
        self.start()
        self._load.num_requests -= 1


class LoadGate:
    """Who may come in.

    At most `max_requests` are in flight, each tenant's fair share of them while others want theirs, and no request
    is let in whose first token would come later than `max_wait_seconds`. That wait is estimated: the tokens that will
    be computed before it, over the measured rate. As the engine shares its time between tenants, only as many of
    another tenant's tokens come first as the tenant has queued itself.
    """

    def __init__(
        self,
        *,
        max_requests: int,
        max_wait_seconds: float,
        max_batch_tokens: int,
        max_batch_requests: int,
        on_refused: Callable[[Reason], None] = lambda reason: None,
        queued_token_limit: Callable[[str], int | None] = lambda tenant: None,
        is_shared: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`queued_token_limit` is asked how many prompt tokens a tenant may have waiting; None = any number.

        Where the server `is_shared`, nobody gets the last places alone: somebody else may come any moment.
        """
        self._max_requests = max_requests
        self._max_wait_seconds = max_wait_seconds
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_requests = max_batch_requests
        self._on_refused = on_refused
        self._queued_token_limit = queued_token_limit
        self._is_shared = is_shared
        self._clock = clock
        self._rate = TokenRate(clock)
        self._loads: dict[str, _Load] = {}
        self._mean_answer_tokens = 0.0

    @property
    def num_requests(self) -> int:
        return sum(load.num_requests for load in self._loads.values())

    def enter(self, tenant: str) -> Place:
        """A place for one more request; raises `TenantOverloaded` or `Overloaded`."""
        self._drop_idle()
        load = self._loads.setdefault(tenant, _Load(tenant))
        num_requests, share = self.num_requests, self._max_requests // len(self._loads)
        if len(self._loads) > 1 and load.num_requests >= max(1, share):
            self._on_refused("tenant")
            raise TenantOverloaded(
                f"You have {load.num_requests} requests in flight, your share while others wait for theirs. "
                "Try again when some of them have ended."
            )
        if num_requests >= self._max_places(is_alone=len(self._loads) == 1):
            load.refused_at = self._clock()
            self._on_refused("requests")
            raise Overloaded(f"The server has {num_requests} requests in flight, as many as it takes. Try again later.")
        self.check_wait(load)
        return Place(self, load)

    def check_wait(self, load: _Load) -> None:
        """Raises `Overloaded` when one more request of this tenant would wait too long."""
        wait = self._wait_seconds(load)
        if wait is None or wait <= self._max_wait_seconds:
            return
        load.refused_at = self._clock()
        self._on_refused("wait")
        excess = math.ceil(wait - self._max_wait_seconds)
        raise Overloaded(
            f"The first token would come in about {wait:.0f} s, and the server queues nothing for longer than "
            f"{self._max_wait_seconds:g} s. Try again later.",
            retry_after_seconds=min(max(excess, 1), MAX_RETRY_SECONDS),
        )

    def check_queued(self, load: _Load, num_prompt_tokens: int) -> None:
        """Raises `RateLimitExceeded` where so many tokens more would be over the tenant's limit.

        One request may always wait, however long it is: otherwise it never could be answered.
        """
        limit = self._queued_token_limit(load.tenant)
        if limit is None or not load.num_queued or load.queued_tokens + num_prompt_tokens <= limit:
            return
        self._on_refused("quota")
        raise RateLimitExceeded(
            f"Your prompts that wait have {load.queued_tokens} tokens, this request's have {num_prompt_tokens}, "
            f"and {limit} may wait. Try again when some of them are being answered."
        )

    def check_places(self, load: _Load, num_places: int) -> None:
        """Raises `Overloaded` where so many more are not free, and `InvalidRequest` where they never can be."""
        if num_places >= self._max_places(is_alone=True):
            raise InvalidRequest(
                f"{num_places + 1} answers at once are more than this server ever takes. Ask for fewer.", param="n"
            )
        if self.num_requests + num_places > self._max_places(is_alone=len(self._loads) == 1):
            load.refused_at = self._clock()
            self._on_refused("requests")
            raise Overloaded(
                f"The server has {self.num_requests} requests in flight and no places for {num_places} more answers. "
                "Try again later, or ask for fewer at once."
            )

    def _max_places(self, *, is_alone: bool) -> int:
        kept_free = self._max_requests // KEPT_FREE if is_alone and self._is_shared() else 0
        return self._max_requests - kept_free

    def observe(self, stats: EngineStats) -> None:
        """The engine has done one more step."""
        loads = self._loads.values()
        # What waits for an adapter keeps no engine busy, however much it is.
        num_tokens = sum(load.queued_tokens - load.cold_tokens for load in loads)
        num_requests = sum(load.num_requests - load.num_cold for load in loads)
        # More than it can take into one step waited for it, so that it computed as much as it can.
        is_busy = num_tokens >= self._max_batch_tokens or num_requests > self._max_batch_requests
        self._rate.observe(stats, is_busy=is_busy)

    def count_answer(self, num_tokens: int) -> None:
        """A request has got its whole answer, of so many tokens."""
        self._mean_answer_tokens += _ANSWER_WEIGHT * (num_tokens - self._mean_answer_tokens)

    @property
    def _is_batch_full(self) -> bool:
        return self.num_requests > self._max_batch_requests

    def _wait_seconds(self, load: _Load) -> float | None:
        """Until the first token of a request that came now; None while the engine's rate is not known."""
        rate = self._rate.value
        if rate is None:
            return None
        own = self._backlog(load)
        return sum(min(own, self._backlog(each)) for each in self._loads.values()) / rate

    def _backlog(self, load: _Load) -> float:
        """Tokens that its queued requests stand for: where the batch is full, each waits for an answer to end."""
        answers = load.num_queued * self._mean_answer_tokens if self._is_batch_full else 0.0
        return load.queued_tokens + answers

    def _drop_idle(self) -> None:
        recently = self._clock() - MAX_RETRY_SECONDS
        for tenant in [name for name, load in self._loads.items() if not load.num_requests]:
            if self._loads[tenant].refused_at < recently:
                del self._loads[tenant]
