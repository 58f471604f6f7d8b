"""Several windows of one arm, boiled down: medians of what was timed, sums of what was counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Self

from heddle_demo.bench.window import Label, Window


@dataclass(frozen=True)
class Summary:
    """One arm's row in a table."""

    label: Label
    num_windows: int
    num_requests: int
    requests_per_second: float
    output_tokens_per_second: float
    ttft_p50_seconds: float
    ttft_p99_seconds: float
    load_seconds_per_request: float
    share_by_tier: dict[str, float]  # of the requests for an adapter, by where it was when they arrived
    num_loads: int
    read_bytes_per_request: float  # from disk to host memory
    loaded_bytes_per_request: float  # from host memory to the device
    segments_per_step: float
    step_seconds: float  # mean over all steps

    @classmethod
    def of(cls, windows: Sequence[Window]) -> Self:
        """Boils down windows of one label."""
        tiers = Counter[str]()
        for window in windows:
            tiers.update(window.requests_by_tier)
        num_requests = sum(window.num_requests for window in windows)
        num_steps = sum(window.num_steps for window in windows)
        return cls(
            label=windows[0].label,
            num_windows=len(windows),
            num_requests=num_requests,
            requests_per_second=median(window.requests_per_second for window in windows),
            output_tokens_per_second=median(window.output_tokens_per_second for window in windows),
            ttft_p50_seconds=median(window.ttft_p50_seconds for window in windows),
            ttft_p99_seconds=median(window.ttft_p99_seconds for window in windows),
            load_seconds_per_request=median(window.load_seconds_per_request for window in windows),
            share_by_tier={tier: count / tiers.total() for tier, count in tiers.items()},
            num_loads=sum(window.num_loads for window in windows),
            read_bytes_per_request=sum(window.read_bytes for window in windows) / num_requests,
            loaded_bytes_per_request=sum(window.loaded_bytes for window in windows) / num_requests,
            segments_per_step=sum(window.num_segments for window in windows) / num_steps,
            step_seconds=sum(window.step_seconds for window in windows) / num_steps,
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "label": self.label._asdict()}
