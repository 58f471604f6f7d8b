"""The headline figures of a run, and how far each could be off: values and bootstrap replicates. Compares nothing.

Repeats differ by more than chance within one explains (another process ran, the seed asked for harder prompts), so a
replicate resamples repeats first, then within each of them: requests for latencies and shares (A. C. Davison and
D. V. Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8), slices of time for rates, whose requests
are not independent of each other in a closed loop. What that misses with few repeats, stretch.py adds. The interval of
a single repeat says how sure that repeat is of itself, and knows nothing of how runs differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from heddle_loadtest.measure.sample import NUM_SLICES, PERCENTILES, RATES, SHARES, Floats, Integers, Sample, sample_of
from heddle_loadtest.measure.stretch import stretch_factor, stretched
from heddle_loadtest.run.outcome import Outcome
from heddle_loadtest.workload.spec import Workload

_MAX_DRAWS = 10_000_000  # requests drawn in all, so that a run of a million ends soon
_MAX_DRAWS_AT_ONCE = 1_000_000  # a few dozen megabytes
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


def values_of(sample: Sample) -> dict[str, float]:
    """Every metric that was measured."""
    if not sample.num_requests:
        return {}
    values = _measure(sample, np.ones((1, sample.num_requests)), np.ones((1, *sample.slices.shape[:2])))
    return {name: float(value[0]) for name, value in values.items() if np.isfinite(value[0])}


def replicates_of(sample: Sample, seed: int = _SEED) -> dict[str, Floats]:
    """Every metric for each of the replicates; NaN where one drew no request that has it."""
    if not sample.num_requests:
        return {}
    random = np.random.default_rng(seed)
    least, most = _NUM_REPLICATES
    num_replicates = max(least, min(most, _MAX_DRAWS // sample.num_requests))
    at_once = max(1, _MAX_DRAWS_AT_ONCE // sample.num_requests)
    blocks = [
        _measure(sample, *_draw(sample, random, min(at_once, num_replicates - done)))
        for done in range(0, num_replicates, at_once)
    ]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def stretched_replicates_of(sample: Sample, degrees_of_freedom: int, seed: int = _SEED) -> dict[str, Floats]:
    """The same as far apart as so few repeats demand, of the metrics that the sample reaches."""
    values = values_of(sample)
    factor = stretch_factor(sample.num_repeats, degrees_of_freedom)
    return {
        name: stretched(replicates, values[name], factor, is_share=name in SHARES)
        for name, replicates in replicates_of(sample, seed).items()
        if name in values and sample.reaches(name)
    }


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
    sample = sample_of(workload.slo, outcomes)
    replicates = stretched_replicates_of(sample, sample.num_repeats - 1)
    found = {name: interval_of(values) for name, values in replicates.items() if name not in SHARES}
    return {name: interval for name, interval in found.items() if interval is not None}


def weighted_percentile(values: Floats, cumulative: Floats, percent: float) -> Floats:
    """numpy's default percentile of ascending `values` [num_values], once for each row of `cumulative`.

    In row r the i-th value is there cumulative[r, i] - cumulative[r, i - 1] times; NaN for a row without any.
    """
    found = np.full(len(cumulative), np.nan)
    if not values.size:
        return found
    rows = np.flatnonzero(cumulative[:, -1])
    cumulative, count = cumulative[rows], cumulative[rows, -1]
    # All rows are searched as one: each row's counts lie above those of the row before.
    shift = np.arange(len(rows)) * (count.max(initial=0.0) + 1)
    ascending = (cumulative + shift[:, None]).ravel()
    position = (count - 1) * percent / 100
    below = np.floor(position)
    low, high = (
        values[np.searchsorted(ascending, place + shift, side="right") - np.arange(len(rows)) * values.size]
        for place in (below, np.minimum(below + 1, count - 1))
    )
    found[rows] = low + (high - low) * (position - below)
    return found


def _measure(sample: Sample, weights: Floats, slice_weights: Floats) -> dict[str, Floats]:
    """Each metric if every request and slice were there `weight` times, once for each row of weights.

    Weights are [num_rows, num_requests] and [num_rows, num_repeats, NUM_SLICES].
    """
    values = {}
    cumulative = {kind: np.cumsum(weights[:, ranked.indices], axis=1) for kind, ranked in sample.latencies.items()}
    for name, (kind, percent) in PERCENTILES.items():
        values[name] = weighted_percentile(sample.latencies[kind].values, cumulative[kind], percent)
    seconds = (slice_weights * sample.slice_seconds[:, None]).sum(axis=(1, 2))
    for index, name in enumerate(RATES):
        values[name] = _divided((slice_weights * sample.slices[:, :, index]).sum(axis=(1, 2)), seconds)
    num_drawn = weights.sum(axis=1)
    for name, holds in sample.shares.items():
        values[name] = _divided(weights[:, holds].sum(axis=1), num_drawn)  # no BLAS: its threads stall a busy machine
    return values


def _divided(numerators: Floats, denominators: Floats) -> Floats:
    found = np.full(len(numerators), np.nan)
    np.divide(numerators, denominators, out=found, where=denominators > 0)
    return found


def _draw(sample: Sample, random: np.random.Generator, num_replicates: int) -> tuple[Floats, Floats]:
    """How often each request and each slice is in each replicate, as `_measure` takes it."""
    num_repeats = sample.num_repeats
    chosen = random.integers(0, num_repeats, size=(num_replicates, num_repeats))
    weights = _resampled(random, chosen, sample.repeat_ends)
    slice_weights = _resampled(random, chosen, [NUM_SLICES * (repeat + 1) for repeat in range(num_repeats)])
    return weights, slice_weights.reshape(num_replicates, num_repeats, NUM_SLICES)


def _resampled(random: np.random.Generator, chosen: Integers, ends: Sequence[int]) -> Floats:
    """How often each thing is drawn, [num_replicates, num_things].

    Of each chosen repeat [num_replicates, num_repeats], as many as it has, which are those before its end.
    """
    weights = np.zeros((len(chosen), ends[-1]))
    for repeat, (start, end) in enumerate(pairwise((0, *ends))):
        if size := end - start:
            rows = np.nonzero(chosen == repeat)[0]
            drawn = random.integers(0, size, size=(rows.size, size)) + rows[:, None] * size
            counts = np.bincount(drawn.ravel(), minlength=len(chosen) * size)
            weights[:, start:end] = counts.reshape(len(chosen), size)
    return weights
