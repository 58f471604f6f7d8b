"""What the self-check puts on the fake server: schedules drawn here, by hand, and the settings they are for.

Draws nothing through the workload generators, so that what checks the client shares no code with what feeds it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from heddle_loadtest.mock.settings import MockSettings
from heddle_loadtest.workload.names import BASE
from heddle_loadtest.workload.schedule import Schedule, ScheduledRequest


@dataclass(frozen=True)
class Phase:
    """One schedule, and the server it is for."""

    name: str
    settings: MockSettings
    schedule: Schedule
    cold_ids: frozenset[int] = frozenset()  # requests that are the first for their adapter

    @property
    def num_requests(self) -> int:
        """In all."""
        return len(self.schedule.requests)

    def count_faults(self) -> tuple[int, int]:
        """How many requests the settings' seed refuses, and how many of the others it breaks off."""
        draws, refused, broken = random.Random(self.settings.seed), 0, 0
        for _ in range(self.num_requests):
            is_refused = draws.random() < self.settings.error_rate
            is_broken = draws.random() < self.settings.break_rate
            refused += is_refused
            broken += is_broken and not is_refused
        return refused, broken


def selfcheck_phases() -> tuple[Phase, ...]:
    """Closed loop, open loop, cold adapters, errors: 15 seconds in all."""
    return closed_loop(), open_loop(), cold_adapters(), errors()


def closed_loop(num_streams: int = 8, num_rounds: int = 14) -> Phase:
    """Streams that ask again as soon as they have their answer."""
    requests = make_requests([None] * (num_streams * num_rounds), num_tokens=20)
    return Phase("closed loop", MockSettings(), Schedule(requests=requests, streams={"": num_streams}))


def open_loop(rate: float = 25.0, num_requests: int = 100) -> Phase:
    """Independent users."""
    times = poisson_times(rate, num_requests, seed=1)
    return Phase("open loop", MockSettings(), Schedule(requests=make_requests(times, num_tokens=20)))


def cold_adapters(num_adapters: int = 30) -> Phase:
    """A new adapter every tenth of a second, each asked for again a second later."""
    settings = MockSettings(num_adapters=num_adapters, num_slots=num_adapters)
    firsts = [(index / 10, name) for index, name in enumerate(settings.adapter_names)]
    uses = sorted([*firsts, *((at + 1.05, name) for at, name in firsts)])
    names = [name for _, name in uses]
    requests = make_requests([at for at, _ in uses], num_tokens=10, adapters=names)
    cold_ids = frozenset(names.index(name) for name in settings.adapter_names)
    return Phase("cold adapters", settings, Schedule(requests=requests), cold_ids)


def errors(rate: float = 40.0, num_requests: int = 100) -> Phase:
    """A fifth is refused, a fifth of the rest breaks off half way."""
    settings = MockSettings(error_rate=0.2, break_rate=0.2, seed=5)
    times = poisson_times(rate, num_requests, seed=2)
    return Phase("errors", settings, Schedule(requests=make_requests(times, num_tokens=20)))


def poisson_times(rate: float, num_requests: int, seed: int) -> list[float]:
    """Times in seconds with exponential gaps."""
    draws, at_seconds, times = random.Random(seed), 0.0, []
    for _ in range(num_requests):
        at_seconds += draws.expovariate(rate)
        times.append(at_seconds)
    return times


def make_requests(
    times: Sequence[float | None], num_tokens: int, adapters: Iterable[str] | None = None
) -> tuple[ScheduledRequest, ...]:
    """One request for each time, of the base unless adapters are given."""
    names = [BASE] * len(times) if adapters is None else adapters
    return tuple(
        ScheduledRequest(
            id=index,
            at_seconds=at_seconds,
            adapter=adapter,
            prompt=f"question {index}",
            max_tokens=num_tokens,
            ignore_eos=True,
            temperature=0.0,
            seed=index,
        )
        for index, (at_seconds, adapter) in enumerate(zip(times, names, strict=True))
    )
