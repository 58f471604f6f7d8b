"""What a target counted during a repeat, read from its scrapes. Knows no metric's meaning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from heddle_loadtest.run.outcome import Outcome, Scrape

Labels = tuple[tuple[str, str], ...]
_SERIES = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)(\{(?P<labels>.*)\})?")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Increases:
    """By how much each series grew from a repeat's first scrape to its last.

    A series that the first scrape lacks began at 0, as labelled counters do; one that falls began at 0 again, as
    Prometheus takes it, because the target was restarted.
    """

    def __init__(self, outcome: Outcome) -> None:
        self._by_name: dict[str, dict[Labels, float]] = {}
        last: dict[str, float] = {}
        for number, scrape in enumerate(outcome.scrapes):
            for key, value in scrape.samples.items():
                before = last.get(key, value if number == 0 else 0.0)
                last[key] = value
                if value != before:
                    self._add(key, value - before if value > before else value)
        for key in last:
            self._add(key, 0.0)  # so that a counter that stood still is known to exist

    def _add(self, key: str, amount: float) -> None:
        name, labels = parse_series(key)
        series = self._by_name.setdefault(name, {})
        series[labels] = series.get(labels, 0.0) + amount

    def total(self, name: str, leave_out: tuple[str, ...] = ()) -> float | None:
        """Over all labels but series with a label value in `leave_out`; None if the target has no such metric."""
        series = self._by_name.get(name)
        if series is None:
            return None
        return sum(amount for labels, amount in series.items() if not any(value in leave_out for _, value in labels))

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """By the value of one label; empty if the target has no such metric."""
        found: dict[str, float] = {}
        for labels, amount in self._by_name.get(name, {}).items():
            if (key := dict(labels).get(label)) is not None:
                found[key] = found.get(key, 0.0) + amount
        return found


def series(scrapes: Sequence[Scrape], name: str) -> dict[str, list[float]]:
    """A metric over a repeat: label values -> a number for each scrape, the one before where a scrape lacks it.

    The key is the series' label values with ", " between them, so `free` for heddle_pool_pages{kind="free"}, and ""
    for a metric without labels. Before its first sample a series is 0.
    """
    found: dict[str, list[float]] = {}
    last: dict[str, float] = {}
    for number, scrape in enumerate(scrapes):
        for key, value in scrape.samples.items():
            series_name, labels = parse_series(key)
            if series_name == name:
                last[", ".join(label_value for _, label_value in labels)] = value
        for label, value in last.items():
            found.setdefault(label, [0.0] * number).append(value)
    return found


@lru_cache(maxsize=100_000)
def parse_series(key: str) -> tuple[str, Labels]:
    """The name and labels of 'name{label="value",…}', escapes left as they are; a key of another form is a name."""
    match = _SERIES.fullmatch(key)
    if match is None:
        return key, ()
    return match["name"], tuple(_LABEL.findall(match["labels"] or ""))
