"""Two runs side by side, with a verdict on each metric that says whether chance could explain the difference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from msgspec.structs import replace

from heddle_loadtest.measure.bootstrap import Interval, interval_of, stretched_replicates_of, values_of
from heddle_loadtest.measure.sample import METRICS, RATES, SHARES, Floats, sample_of
from heddle_loadtest.measure.validity import MIN_REPEATS, invalid_reasons
from heddle_loadtest.run.outcome import Outcome
from heddle_loadtest.workload.spec import Workload

SCHEMA_VERSION = 1  # of Comparison.to_json(), counted as the summary's
_MORE_IS_BETTER = (*RATES, "goodput")
_SEED_A, _SEED_B = 1, 2  # different, since the same draws in both would take two runs for one paired one


class Run(Protocol):
    """What a comparison needs of a run; `report.stored_run.StoredRun` is one."""

    @property
    def name(self) -> str: ...

    @property
    def workload(self) -> Workload: ...

    @property
    def outcomes(self) -> Sequence[Outcome]: ...


class Verdict(StrEnum):
    """Of B, beside A."""

    BETTER = "better"
    WORSE = "worse"
    NO_DIFFERENCE_SHOWN = "no difference shown"  # the interval holds "no change": not a proof that there is none
    NOT_MEASURED = "not measured"  # in one of the two


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricChange:
    """One metric. Latencies in seconds, rates per second, shares from 0 to 1."""

    metric: str
    a: float | None
    b: float | None
    change: float | None  # b / a - 1; for a share b - a
    interval: Interval | None  # of the change, 95 %
    verdict: Verdict

    @property
    def is_share(self) -> bool:
        """Whether the change is a difference, in points, and not relative."""
        return self.metric in SHARES

    @property
    def is_significant(self) -> bool:
        """Whether chance is no good explanation of the change."""
        return self.verdict in (Verdict.BETTER, Verdict.WORSE)

    def to_json(self) -> dict[str, object]:
        """The fields by name; a relative change as the ratio b / a."""
        key, one = ("difference", 0.0) if self.is_share else ("ratio", 1.0)
        interval = (
            None if self.interval is None else [round(self.interval.low + one, 6), round(self.interval.high + one, 6)]
        )
        return {
            "a": _rounded(self.a),
            "b": _rounded(self.b),
            key: None if self.change is None else round(self.change + one, 6),
            f"{key}_interval": interval,
            "verdict": self.verdict.value,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """B beside A."""

    name_a: str
    name_b: str
    metrics: dict[str, MetricChange]  # all of METRICS
    warnings: tuple[str, ...]  # sentences: why the two may not be comparable

    def to_json(self) -> dict[str, object]:
        """A dict of plain JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "a": self.name_a,
            "b": self.name_b,
            "metrics": {name: change.to_json() for name, change in self.metrics.items()},
            "warnings": list(self.warnings),
        }


def compare(a: Run, b: Run) -> Comparison:
    """B beside A, metric by metric. The two are taken as independent of each other.

    With a single repeat on either side no difference is shown, however large: nobody knows how runs differ.
    """
    sample_a, sample_b = sample_of(a.workload.slo, a.outcomes), sample_of(b.workload.slo, b.outcomes)
    values_a, values_b = values_of(sample_a), values_of(sample_b)
    degrees_of_freedom = sample_a.num_repeats + sample_b.num_repeats - 2
    draws_a = stretched_replicates_of(sample_a, degrees_of_freedom, _SEED_A)
    draws_b = stretched_replicates_of(sample_b, degrees_of_freedom, _SEED_B)
    changes = {
        name: _change(name, values_a.get(name), values_b.get(name), draws_a.get(name), draws_b.get(name))
        for name in METRICS
    }
    if min(sample_a.num_repeats, sample_b.num_repeats) < 2:
        changes = {name: _unproven(change) for name, change in changes.items()}
    return Comparison(
        name_a=a.name,
        name_b=b.name,
        metrics=changes,
        warnings=_warnings(a, b),
    )


def _change(
    metric: str, a: float | None, b: float | None, draws_a: Floats | None, draws_b: Floats | None
) -> MetricChange:
    if a is None or b is None or (a == 0 and metric not in SHARES):
        return MetricChange(metric=metric, a=a, b=b, change=None, interval=None, verdict=Verdict.NOT_MEASURED)
    interval = None
    if draws_a is not None and draws_b is not None:  # else there are too few values in one of the two
        num_draws = min(draws_a.size, draws_b.size)
        interval = interval_of(_differences(metric, draws_a[:num_draws], draws_b[:num_draws]))
    change = b - a if metric in SHARES else b / a - 1
    return MetricChange(metric=metric, a=a, b=b, change=change, interval=interval, verdict=_verdict(metric, interval))


def _unproven(change: MetricChange) -> MetricChange:
    return dataclasses.replace(change, verdict=Verdict.NO_DIFFERENCE_SHOWN) if change.is_significant else change


def _differences(metric: str, draws_a: Floats, draws_b: Floats) -> Floats:
    if metric in SHARES:
        return draws_b - draws_a
    # A rate whose resampled slices hold nothing is 0: the ratio to it is no number, and counts as none.
    return draws_b / np.where(draws_a > 0, draws_a, np.nan) - 1


def _verdict(metric: str, interval: Interval | None) -> Verdict:
    if interval is None or interval.low <= 0 <= interval.high:
        return Verdict.NO_DIFFERENCE_SHOWN
    return Verdict.BETTER if (interval.low > 0) == (metric in _MORE_IS_BETTER) else Verdict.WORSE


def _warnings(a: Run, b: Run) -> tuple[str, ...]:
    found: list[str] = []
    if _what_is_asked(a.workload) != _what_is_asked(b.workload):
        found.append("The two runs have different workloads: a difference may be the workload's.")
    if a.workload.slo != b.workload.slo:
        found.append("The two runs have different service levels: goodput cannot be compared.")
    seeds_a, seeds_b = ([outcome.seed for outcome in run.outcomes] for run in (a, b))
    if seeds_a != seeds_b:
        found.append(f"The two runs have different seeds, {seeds_a} and {seeds_b}: not the same schedules.")
    for letter, run in (("A", a), ("B", b)):
        found += [f"{letter} is invalid: {reason}" for reason in invalid_reasons(run.outcomes)]
        if (num_repeats := len(run.outcomes)) < MIN_REPEATS:
            found.append(f"{letter} has {num_repeats} of {MIN_REPEATS} repeats: {_what_so_few_show(num_repeats)}.")
        if any(outcome.was_interrupted for outcome in run.outcomes):
            found.append(f"{letter} was interrupted before its end.")
    return tuple(found)


def _what_so_few_show(num_repeats: int) -> str:
    if num_repeats < 2:
        return "nobody knows how its runs differ, so that no difference is shown, however large"
    return "only a large difference is shown"


def _what_is_asked(workload: Workload) -> Workload:
    return replace(workload, name="x", about="", slo=None, variants={})


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
