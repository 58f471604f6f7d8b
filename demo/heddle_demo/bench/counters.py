"""What a server has counted, read from its Prometheus text. Knows no HTTP."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

_SAMPLE = re.compile(r"(?P<name>\w+)(\{(?P<labels>.*)\})? (?P<value>\S+)")
_LABEL = re.compile(r'(?P<name>\w+)="(?P<value>[^"]*)"')

Series = tuple[str, tuple[tuple[str, str], ...]]  # a metric's name, and its labels by name


@dataclass(frozen=True)
class Counters:
    """The values of all series at one moment, or what was added between two."""

    values: dict[Series, float]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads the Prometheus text format; labels whose value holds a quotation mark are of no use here."""
        samples = [match for line in text.splitlines() if (match := _SAMPLE.fullmatch(line)) is not None]
        return cls({_series(match): float(match["value"]) for match in samples})

    def since(self, before: Counters) -> Counters:
        """What was added after `before`; a series that was not there then began at 0."""
        return Counters({series: value - before.values.get(series, 0.0) for series, value in self.values.items()})

    def total(self, name: str) -> float:
        """One metric over all its labels; 0 if the server has no such metric."""
        return sum(value for (metric, _), value in self.values.items() if metric == name)

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """One metric by the value of one of its labels."""
        found: dict[str, float] = {}
        for (metric, labels), value in self.values.items():
            if metric == name and (key := dict(labels).get(label)) is not None:
                found[key] = found.get(key, 0.0) + value
        return found


def _series(match: re.Match[str]) -> Series:
    labels = _LABEL.findall(match["labels"] or "")
    return match["name"], tuple(sorted(labels))
