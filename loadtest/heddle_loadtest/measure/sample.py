"""What the headline figures need of a run, in arrays, and which figures those are. Resamples nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from heddle_loadtest.measure.ending import Ending, ending_of
from heddle_loadtest.measure.goodput import keeps
from heddle_loadtest.run.outcome import Outcome
from heddle_loadtest.workload.spec import Slo

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

NUM_SLICES = 20  # of a repeat's time: long beside a step of the target, short beside its warm-up and its tail
_SHORTEST_SECONDS = 1e-6  # that a request is taken to be under way
_MIN_VALUES = 2  # that an interval can be made of


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
    slices: Floats  # [num_repeats, NUM_SLICES, 2], output tokens and requests done in each slice of time
    slice_seconds: Floats  # [num_repeats], how long a slice is

    @property
    def num_requests(self) -> int:
        """Of all repeats, without those abandoned."""
        return self.repeat_ends[-1] if self.repeat_ends else 0

    @property
    def num_repeats(self) -> int:
        """Those whose time passed without one request's end included."""
        return len(self.repeat_ends)

    def reaches(self, metric: str) -> bool:
        """Whether there are enough values to say how sure the metric is: a p99 of 20 is but their largest."""
        if metric not in PERCENTILES:
            return self.num_requests >= _MIN_VALUES
        kind, percent = PERCENTILES[metric]
        return self.latencies[kind].values.size >= max(_MIN_VALUES, round(100 / (100 - percent)))


def sample_of(slo: Slo | None, outcomes: Sequence[Outcome]) -> Sample:
    """The arrays of a run's repeats; one that ended no request and took no time is none."""
    ended = [
        (outcome, [result for result in outcome.results if ending_of(result) is not Ending.ABANDONED])
        for outcome in outcomes
    ]
    repeats = [(outcome, results) for outcome, results in ended if results or outcome.elapsed_seconds > 0]
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
        slices=np.array([_slices(outcome) for outcome, _ in repeats]).reshape(len(repeats), NUM_SLICES, 2),
        slice_seconds=np.array([outcome.elapsed_seconds / NUM_SLICES for outcome, _ in repeats]),
    )


def _ranked(values: Sequence[float | None]) -> Ranked:
    indices = np.array([index for index, value in enumerate(values) if value is not None], dtype=np.int64)
    present = np.array([value for value in values if value is not None], dtype=np.float64)
    order = np.argsort(present, kind="stable")
    return Ranked(indices[order], present[order])


def _slices(outcome: Outcome) -> Floats:
    """Output tokens and requests by slice of time, [NUM_SLICES, 2].

    Each request counts evenly over the time it was under way: streams in lockstep end in waves, and whether a wave
    falls into a slice says nothing of the rate.
    """
    good = [result for result in outcome.results if result.is_ok]
    ended = np.array([result.finished_seconds for result in good], dtype=np.float64)[:, None]
    began = np.array([result.started_seconds for result in good], dtype=np.float64)[:, None]
    began = np.minimum(began, ended - _SHORTEST_SECONDS)
    bounds = np.linspace(outcome.started_seconds, outcome.ended_seconds, NUM_SLICES + 1)
    bounds[0], bounds[-1] = -np.inf, np.inf  # so that nothing is lost to rounding at the ends
    within = np.minimum(ended, bounds[1:]) - np.maximum(began, bounds[:-1])
    shares = np.maximum(within, 0.0) / (ended - began)  # [num_requests, NUM_SLICES]
    num_tokens = np.array([result.num_output_tokens for result in good], dtype=np.float64)
    return np.stack([(num_tokens[:, None] * shares).sum(axis=0), shares.sum(axis=0)], axis=1)
