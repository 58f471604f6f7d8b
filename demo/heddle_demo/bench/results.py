"""What one run of `heddle bench adapters` came to: every window, and what follows from them. Prints nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from heddle_demo.bench.floor import BaseBytes, Floor
from heddle_demo.bench.plan import Plan
from heddle_demo.bench.ratio import Ratio
from heddle_demo.bench.summary import Summary
from heddle_demo.bench.window import Label, Window

SCHEMA_VERSION = 1  # of to_json(); counts up when a field changes its meaning or goes away, not when one is added

TABLE, FLATNESS, BASE_ONLY, SMALL_POOL = "table", "flatness", "base_only", "small_pool"
FLATNESS_TARGET = 0.97
BASE_ONLY_TARGET = 0.98


@dataclass(frozen=True)
class Comparison:
    """Two arms measured in turn."""

    baseline: Summary
    candidate: Summary
    ratio: Ratio  # of requests per second, the candidate's over the baseline's
    target: float  # the least that the ratio should be

    def to_json(self) -> dict[str, Any]:
        return {
            "baseline": self.baseline.to_json(),
            "candidate": self.candidate.to_json(),
            "ratio": self.ratio.to_json(),
            "target": self.target,
            "is_met": self.ratio.value >= self.target,
        }


@dataclass(frozen=True)
class SmallPoolRow:
    """An arm over the small pool, beside what loading should make of it.

    All times are one stream's seconds per request, so that waits of streams for adapters of their own, which pass at
    the same time, are not added up.
    """

    summary: Summary
    measured_seconds: float
    predicted_by_wait_seconds: float  # what it takes with all resident, plus the wait for its adapter
    predicted_by_bytes_seconds: float | None  # the same, plus its bytes at the price that the middle arm paid for one

    def to_json(self) -> dict[str, Any]:
        return {
            "summary": self.summary.to_json(),
            "measured_seconds": self.measured_seconds,
            "predicted_by_wait_seconds": self.predicted_by_wait_seconds,
            "predicted_by_bytes_seconds": self.predicted_by_bytes_seconds,
        }


@dataclass(frozen=True)
class Results:
    """One whole run."""

    plan: Plan
    machine: dict[str, Any]
    bandwidth_bytes_per_second: float
    base_bytes: BaseBytes
    smallest_mean_row_bytes: float  # of the adapters in the table's first row
    windows: tuple[Window, ...]  # in the order of measuring

    def table(self) -> list[Summary]:
        """The cells, by number of adapters and then by popularity."""
        labels = dict.fromkeys(window.label for window in self.windows if window.label.section == TABLE)
        return [self._summary(label) for label in sorted(labels, key=lambda label: label.num_registered)]

    def flatness(self) -> Comparison:
        few, many = self.plan.flat_sizes
        return self._compare(FLATNESS, (few, "all resident"), (many, "all resident"), FLATNESS_TARGET)

    def base_only(self) -> Comparison:
        return self._compare(BASE_ONLY, (0, "base"), (self.plan.flat_sizes[1], "base"), BASE_ONLY_TARGET)

    def small_pool(self) -> list[SmallPoolRow]:
        """All resident first, then the small pool with ever more adapters in use."""
        labels = dict.fromkeys(window.label for window in self.windows if window.label.section == SMALL_POOL)
        resident, fitting, middle, all_used = (self._summary(label) for label in labels)
        resident_seconds = self._stream_seconds(resident)
        seconds_per_byte = (
            (self._stream_seconds(middle) - resident_seconds) / middle.loaded_bytes_per_request
            if middle.loaded_bytes_per_request
            else None
        )
        return [
            SmallPoolRow(
                summary=summary,
                measured_seconds=self._stream_seconds(summary),
                predicted_by_wait_seconds=resident_seconds + summary.load_seconds_per_request,
                predicted_by_bytes_seconds=None
                if seconds_per_byte is None
                else resident_seconds + seconds_per_byte * summary.loaded_bytes_per_request,
            )
            for summary in (resident, fitting, middle, all_used)
        ]

    def floor(self) -> Floor:
        """Of the table's first row under its first popularity."""
        first = self.table()[0]
        num_tokens = self.plan.num_streams * (self.plan.num_prompt_tokens + self.plan.num_output_tokens / 2)
        return Floor(
            weight_bytes=self.base_bytes.weights,
            adapter_bytes=round(first.segments_per_step * self.smallest_mean_row_bytes),
            kv_bytes=round(num_tokens * self.base_bytes.kv_per_token),
            bandwidth_bytes_per_second=self.bandwidth_bytes_per_second,
            measured_step_seconds=first.step_seconds,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, all windows last."""
        return {
            "schema_version": SCHEMA_VERSION,
            "bench": "adapters",
            "machine": self.machine,
            "plan": self.plan.to_json(),
            "table": [summary.to_json() for summary in self.table()],
            "flatness": self.flatness().to_json(),
            "base_only": self.base_only().to_json(),
            "small_pool": [row.to_json() for row in self.small_pool()],
            "floor": self.floor().to_json(),
            "windows": [window.to_json() for window in self.windows],
        }

    def _compare(
        self, section: str, baseline: tuple[int, str], candidate: tuple[int, str], target: float
    ) -> Comparison:
        before, after = Label(section, *baseline), Label(section, *candidate)
        ratio = Ratio.of(self._throughputs(before), self._throughputs(after))
        return Comparison(self._summary(before), self._summary(after), ratio, target)

    def _summary(self, label: Label) -> Summary:
        return Summary.of(self._windows(label))

    def _windows(self, label: Label) -> list[Window]:
        return [window for window in self.windows if window.label == label]

    def _throughputs(self, label: Label) -> list[float]:
        return [window.requests_per_second for window in self._windows(label)]

    def _stream_seconds(self, summary: Summary) -> float:
        return self.plan.num_streams / summary.requests_per_second
