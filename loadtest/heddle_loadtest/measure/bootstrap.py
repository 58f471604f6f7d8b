"""The headline figures of a run, and how far each could be off: values and bootstrap replicates. Compares nothing.

Repeats differ by more than chance within one explains (another process ran, the seed asked for harder prompts), so a
replicate resamples repeats first, then within each of them: requests for latencies and shares (A. C. Davison and
D. V. Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8), slices of time for rates, whose requests
are not independent of each other in a closed loop. With few repeats such intervals are somewhat too narrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from heddle_loadtest.measure.ending import Ending, ending_of
from heddle_loadtest.measure.goodput import keeps
from heddle_loadtest.run.outcome import Outcome
from heddle_loadtest.workload.spec import Slo, Workload

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

PERCENTILES = {  # metric -> what it is a percentile of, and which
    "ttft_p50": ("ttft", 50.0),
    "ttft_p90": ("ttft", 90.0),
    "ttft_p99": ("ttft", 99.0),
    "tpot_p50": ("tpot", 50.0),
    "tpot_p99": ("tpot", 99.0),
    "e2e_p50": ("e2e", 50.0),
    "e2e_p90": ("e2e", 90.0),
    "e2e_p99": ("e2e", 99.0),
}
RATES = ("output_tokens_per_second", "requests_per_second")
SHARES = ("goodput", "error_rate")
METRICS = (*PERCENTILES, *RATES, *SHARES)  # latencies in seconds

_NUM_SLICES = 20  # of a repeat's time: long beside a step of the target, short beside its warm-up and its tail
_SHORTEST_SECONDS = 1e-6  # that a request is taken to be under way
_MAX_DRAWS = 10_000_000  # requests drawn in all, so that a run of a million ends soon
_NUM_REPLICATES = (200, 1000)  # at least, at most
_MIN_FINITE_SHARE = 0.9
_SEED = 20261121  # any; fixed, so that the same results give the same interval


@dataclass(frozen=True, slots=True)
class Interval:
    """Where the figure lies with 95 % confidence."""

    low: float
    high: float

    def to_json(self) -> list[float]:
        """Low and high."""
        return [round(self.low, 6), round(self.high, 6)]


@dataclass(frozen=True, slots=True)
class Ranked:
    """Those of the requests that have a value, by it."""

    indices: Integers  # [num_values], into the requests
    values: Floats  # [num_values], ascending, in seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What the metrics need of a run, in arrays."""

    latencies: Mapping[str, Ranked]  # ttft, tpot, e2e of the requests that succeeded
    shares: Mapping[str, Booleans]  # goodput, error_rate: for each request whether it counts, [num_requests]
    repeat_ends: tuple[int, ...]  # where among the requests each repeat ends
    slices: Floats  # [num_repeats, _NUM_SLICES, 2], output tokens and requests done in each slice of time
    slice_seconds: Floats  # [num_repeats], how long a slice is

    @property
    def num_requests(self) -> int:
        """Of all repeats, without those abandoned."""
        return self.repeat_ends[-1] if self.repeat_ends else 0


def sample_of(slo: Slo | None, outcomes: Sequence[Outcome]) -> Sample:
    """The arrays of a run's repeats; those without one ended request are left out."""
    ended = [
        (outcome, [result for result in outcome.results if ending_of(result) is not Ending.ABANDONED])
        for outcome in outcomes
    ]
    repeats = [(outcome, results) for outcome, results in ended if results]
    results = [result for _, repeat in repeats for result in repeat]
    shares = {"error_rate": np.array([not result.is_ok for result in results], dtype=np.bool_)}
    if slo is not None:
        shares["goodput"] = np.array([keeps(result, slo) for result in results], dtype=np.bool_)
    return Sample(
        latencies={
            "ttft": _ranked([result.ttft_seconds if result.is_ok else None for result in results]),
            "tpot": _ranked([result.tpot_seconds if result.is_ok else None for result in results]),
            "e2e": _ranked([result.end_to_end_seconds if result.is_ok else None for result in results]),
        },
        shares=shares,
        repeat_ends=tuple(accumulate(len(repeat) for _, repeat in repeats)),
        slices=np.array([_slices(outcome) for outcome, _ in repeats]).reshape(len(repeats), _NUM_SLICES, 2),
        slice_seconds=np.array([_elapsed_seconds(outcome) / _NUM_SLICES for outcome, _ in repeats]),
    )


def values_of(sample: Sample) -> dict[str, float]:
    """Every metric that was measured."""
    if not sample.num_requests:
        return {}
    values = _measure(sample, np.ones(sample.num_requests), np.ones(sample.slices.shape[:2]))
    return {name: value for name, value in values.items() if np.isfinite(value)}


def replicates_of(sample: Sample, seed: int = _SEED) -> dict[str, Floats]:
    """Every metric for each of the replicates; NaN where one drew no request that has it."""
    if not sample.num_requests:
        return {}
    random = np.random.default_rng(seed)
    least, most = _NUM_REPLICATES
    num_replicates = max(least, min(most, _MAX_DRAWS // sample.num_requests))
    rows = [_measure(sample, *_draw(sample, random)) for _ in range(num_replicates)]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def interval_of(replicates: Floats) -> Interval | None:
    """The 95 % percentile interval; None if more than one replicate in ten has no value.

    A few have none when a repeat failed altogether and a replicate drew that repeat alone.
    """
    finite = replicates[np.isfinite(replicates)]
    if not finite.size or finite.size < _MIN_FINITE_SHARE * replicates.size:
        return None
    low, high = np.percentile(finite, (2.5, 97.5))
    return Interval(float(low), float(high))


def intervals_of(workload: Workload, outcomes: Sequence[Outcome]) -> dict[str, Interval]:
    """The intervals of the latencies and rates that were measured; a share has Wilson's, see goodput.py."""
    replicates = replicates_of(sample_of(workload.slo, outcomes))
    found = {name: interval_of(values) for name, values in replicates.items() if name not in SHARES}
    return {name: interval for name, interval in found.items() if interval is not None}


def weighted_percentile(values: Floats, cumulative: Floats, percent: float) -> float:
    """numpy's default percentile of ascending `values`, the i-th there cumulative[i] - cumulative[i - 1] times."""
    num_values = cumulative[-1] if cumulative.size else 0
    if num_values == 0:
        return np.nan
    position = (num_values - 1) * percent / 100
    below = np.floor(position)
    low, high = values[np.searchsorted(cumulative, (below, min(below + 1, num_values - 1)), side="right")]
    return float(low + (high - low) * (position - below))


def _measure(sample: Sample, weights: Floats, slice_weights: Floats) -> dict[str, float]:
    """The metrics if every request [num_requests] and slice [num_repeats, _NUM_SLICES] were there `weight` times."""
    values = {}
    cumulative = {kind: np.cumsum(weights[ranked.indices]) for kind, ranked in sample.latencies.items()}
    for name, (kind, percent) in PERCENTILES.items():
        values[name] = weighted_percentile(sample.latencies[kind].values, cumulative[kind], percent)
    seconds = float((slice_weights * sample.slice_seconds[:, None]).sum())
    totals = (slice_weights[:, :, None] * sample.slices).sum(axis=(0, 1))
    for name, total in zip(RATES, totals, strict=True):
        values[name] = float(total) / seconds if seconds > 0 else np.nan
    for name, holds in sample.shares.items():
        values[name] = float(weights[holds].sum() / weights.sum())  # no BLAS: its threads stall on a busy machine
    return values


def _draw(sample: Sample, random: np.random.Generator) -> tuple[Floats, Floats]:
    """How often each request and each slice is in one replicate."""
    starts = (0, *sample.repeat_ends)
    num_repeats = len(sample.repeat_ends)
    chosen = random.integers(0, num_repeats, size=num_repeats)
    drawn = [
        random.integers(starts[repeat], starts[repeat + 1], starts[repeat + 1] - starts[repeat]) for repeat in chosen
    ]
    weights = np.bincount(np.concatenate(drawn), minlength=sample.num_requests).astype(np.float64)
    slice_weights = np.zeros((num_repeats, _NUM_SLICES))
    for repeat in chosen:
        slice_weights[repeat] += np.bincount(random.integers(0, _NUM_SLICES, _NUM_SLICES), minlength=_NUM_SLICES)
    return weights, slice_weights


def _ranked(values: Sequence[float | None]) -> Ranked:
    indices = np.array([index for index, value in enumerate(values) if value is not None], dtype=np.int64)
    present = np.array([value for value in values if value is not None], dtype=np.float64)
    order = np.argsort(present, kind="stable")
    return Ranked(indices[order], present[order])


def _slices(outcome: Outcome) -> Floats:
    """Output tokens and requests by slice of time, [_NUM_SLICES, 2].

    Each request counts evenly over the time it was under way: streams in lockstep end in waves, and whether a wave
    falls into a slice says nothing of the rate.
    """
    good = [result for result in outcome.results if result.is_ok]
    ended = np.array([result.finished_seconds for result in good], dtype=np.float64)[:, None]
    began = np.array([result.started_seconds for result in good], dtype=np.float64)[:, None]
    began = np.minimum(began, ended - _SHORTEST_SECONDS)
    bounds = np.linspace(outcome.started_seconds, outcome.ended_seconds, _NUM_SLICES + 1)
    bounds[0], bounds[-1] = -np.inf, np.inf  # so that nothing is lost to rounding at the ends
    within = np.minimum(ended, bounds[1:]) - np.maximum(began, bounds[:-1])
    shares = np.maximum(within, 0.0) / (ended - began)  # [num_requests, _NUM_SLICES]
    num_tokens = np.array([result.num_output_tokens for result in good], dtype=np.float64)
    return np.stack([(num_tokens[:, None] * shares).sum(axis=0), shares.sum(axis=0)], axis=1)


def _elapsed_seconds(outcome: Outcome) -> float:
    return outcome.ended_seconds - outcome.started_seconds
