"""One result folder's numbers, as a table's cell shows them. Knows the summary's keys and no layout of a page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heddle_loadtest.workload.spec import Workload
from heddle_loadtest.workload.spec_file import load_workload

KEPT_FILES = ("workload.yaml", "environment.json", "summary.json")  # all that a page needs of a result folder


@dataclass(frozen=True)
class CellNumbers:
    """What lies in one result folder, without the single requests."""

    workload: Workload
    environment: dict[str, Any]
    summary: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> CellNumbers:
        """Of the folder at `path`."""
        return cls(
            load_workload(str(path / "workload.yaml")),
            json.loads((path / "environment.json").read_text()),
            json.loads((path / "summary.json").read_text()),
        )

    @property
    def total(self) -> dict[str, Any]:
        return dict(self.summary["total"])

    @property
    def num_requests(self) -> int:
        """Of one repeat, whatever became of them."""
        numbers: int = self.total["num_ok"] + self.total["num_failed"] + self.total["num_abandoned"]
        return round(numbers / len(self.summary["repeats"]))

    def rates(self, name: str) -> list[float]:
        """A rate of every repeat, in the order of the rounds."""
        return [repeat[name] for repeat in self.summary["repeats"]]

    def latency_ms(self, name: str, percentile: str) -> float | None:
        """For example `ttft`, `p50`."""
        values = self.total[f"{name}_seconds"]
        return None if values is None else values[percentile] * 1000

    def hit_share(self, tier: str) -> float | None:
        """Of the requests for an adapter."""
        temperature = self.summary["temperature"]
        return None if temperature is None else temperature["hit_rates"].get(tier)

    def with_interval(self, metric: str, digits: int = 1, scale: float = 1.0) -> str:
        """The figure over all repeats with its 95 % interval; `metric` as the intervals are called."""
        interval = self.summary["intervals"].get(metric)
        value = self._value(metric)
        if value is None:
            return "-"
        shown = f"{value * scale:,.{digits}f}"
        return shown if interval is None else f"{shown} [{', '.join(f'{end * scale:,.{digits}f}' for end in interval)}]"

    def _value(self, metric: str) -> float | None:
        if metric in self.total:
            return float(self.total[metric])
        name, percentile = metric.rsplit("_", 1)
        full = {"e2e": "end_to_end"}.get(name, name)
        values = self.total[f"{full}_seconds"]
        return None if values is None else float(values[percentile])
