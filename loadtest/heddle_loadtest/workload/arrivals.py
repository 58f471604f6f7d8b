"""When requests of an open loop are due. Knows no adapters, no prompts and no other tenants.

All kinds are one idea: events that come once per unit on average (evenly spaced, exponential or gamma gaps), mapped
through the inverse of the cumulative rate, the number of requests expected until t. Where the rate is constant that is
a division; where it moves, time stretches and shrinks (Cinlar, "Introduction to Stochastic Processes", 1975).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from heddle_loadtest.workload.spec import Bursts, Constant, Diurnal, Gamma, Poisson, Ramp

OpenLoop = Constant | Poisson | Gamma | Bursts | Ramp | Diurnal

_BLOCK = 1024  # events drawn at once
_BISECTIONS = 60  # halves the first bracket to less than a float can tell

Floats = NDArray[np.float64]


def arrival_seconds(arrivals: OpenLoop, random: Generator, seconds: float | None = None) -> Iterator[float]:
    """The due times in order, until `seconds`, without end if None. A ramp needs `seconds`: its rate ends there."""
    end = np.inf if seconds is None else seconds
    to_seconds = _inverse_cumulative_rate(arrivals, random, end)
    for events in _unit_rate_events(arrivals, random):
        for at_seconds in to_seconds(events).tolist():
            if at_seconds > end or at_seconds == np.inf:
                return
            yield at_seconds


def _unit_rate_events(arrivals: OpenLoop, random: Generator) -> Iterator[Floats]:
    """Blocks of ascending events, one per unit on average; evenly spaced ones begin at 0, the others after a gap."""
    last = -1.0 if isinstance(arrivals, Constant) else 0.0
    while True:
        events = last + np.cumsum(_gaps(arrivals, random))
        yield events
        last = events[-1]


def _gaps(arrivals: OpenLoop, random: Generator) -> Floats:
    """A block of gaps with mean 1."""
    match arrivals:
        case Constant():
            return np.ones(_BLOCK)
        case Gamma(cv=cv):
            return random.gamma(shape=1 / cv**2, scale=cv**2, size=_BLOCK)
        case _:
            return random.exponential(size=_BLOCK)


def _inverse_cumulative_rate(arrivals: OpenLoop, random: Generator, end: float) -> Callable[[Floats], Floats]:
    """From a number of requests to when so many are expected: infinity where that is never."""
    match arrivals:
        case Constant(rate=rate) | Poisson(rate=rate) | Gamma(rate=rate):
            return lambda events: events / rate
        case Ramp():
            assert end < np.inf, "checked before: a ramp needs `seconds`"
            return lambda events: _invert_ramp(arrivals, end, events)
        case Diurnal():
            return lambda events: _invert_diurnal(arrivals, events)
        case Bursts():
            return _Phases(arrivals, random, end).invert


def _invert_ramp(ramp: Ramp, end: float, events: Floats) -> Floats:
    """Solves from * t + slope * t**2 / 2 = events; a falling rate reaches 0, and then no more are expected."""
    slope = (ramp.rate_to - ramp.rate_from) / end
    discriminant = ramp.rate_from**2 + 2 * slope * events
    root = np.sqrt(np.maximum(discriminant, 0))
    return np.where(discriminant < 0, np.inf, 2 * events / np.maximum(ramp.rate_from + root, np.finfo(float).tiny))


def _invert_diurnal(diurnal: Diurnal, events: Floats) -> Floats:
    """Bisects; the sine puts the cumulative rate ahead of rate * t, by no more than its bulge."""
    radians_per_second = 2 * np.pi / diurnal.period_seconds
    bulge = diurnal.swing / radians_per_second
    late = events / diurnal.rate
    early = np.maximum(late - 2 * bulge, 0)
    for _ in range(_BISECTIONS):
        middle = (early + late) / 2
        expected = diurnal.rate * (middle + bulge * (1 - np.cos(radians_per_second * middle)))
        early, late = np.where(expected < events, middle, early), np.where(expected < events, late, middle)
    return late


class _Phases:
    """The cumulative rate of bursts, on first: straight lines between knots, drawn as far as they are asked for."""

    def __init__(self, bursts: Bursts, random: Generator, end: float) -> None:
        """No phase is drawn beyond `end`: what is expected after it is expected never."""
        self._bursts = bursts
        self._end = end
        self._random = random.spawn(1)[0]  # its own, so that phases do not depend on how events are drawn in blocks
        self._is_on = True
        self._knot_seconds = [0.0]
        self._knot_events = [0.0]  # expected until then

    def invert(self, events: Floats) -> Floats:
        """Times of these ascending events."""
        while self._knot_events[-1] < events[-1] and self._knot_seconds[-1] <= self._end:
            self._add_phase()
        knot_seconds, knot_events = np.array(self._knot_seconds), np.array(self._knot_events)
        inside = events <= knot_events[-1]
        after = np.maximum(np.searchsorted(knot_events, events[inside], side="left"), 1)  # never ends a phase of rate 0
        seconds_per_event = np.diff(knot_seconds)[after - 1] / np.diff(knot_events)[after - 1]
        times = np.full(len(events), np.inf)
        times[inside] = knot_seconds[after - 1] + (events[inside] - knot_events[after - 1]) * seconds_per_event
        return times

    def _add_phase(self) -> None:
        bursts = self._bursts
        seconds = bursts.on_seconds if self._is_on else bursts.off_seconds
        if bursts.random_phases:
            seconds = self._random.exponential(seconds)
        rate = bursts.rate_on if self._is_on else bursts.rate_off
        self._knot_seconds.append(self._knot_seconds[-1] + seconds)
        self._knot_events.append(self._knot_events[-1] + rate * seconds)
        self._is_on = not self._is_on
