"""The target's /metrics through a run: texts while it goes on, samples afterwards. Knows no metric's meaning."""

from __future__ import annotations

import asyncio
import time

from prometheus_client.parser import text_string_to_metric_families

from heddle_loadtest.client.server_pages import ServerPages
from heddle_loadtest.run.outcome import Scrape

_INTERVAL_SECONDS = 1.0
_SETTLE_SECONDS = 0.5


class Scraper:
    """Asks once a second between `take` before the first request and `take_last` after the last one.

    Only the texts are kept while requests are under way: parsing one can take longer than the client may stall.
    """

    def __init__(self, pages: ServerPages) -> None:
        self._pages = pages
        self._texts: list[tuple[float, str]] = []

    async def take(self) -> bool:
        """One scrape now; whether there was one."""
        text = await self._pages.metrics()
        if text is not None:
            self._texts.append((time.perf_counter(), text))
        return text is not None

    async def take_last(self) -> None:
        """After the last answer. A target counts a request when it has tidied up, a moment after the answer's end."""
        if self._texts:
            await asyncio.sleep(_SETTLE_SECONDS)
            await self.take()

    async def keep_taking(self) -> None:
        """Until it is cancelled; at once over if the target had none before."""
        while self._texts:
            await asyncio.sleep(_INTERVAL_SECONDS)
            await self.take()

    def scrapes(self) -> tuple[Scrape, ...]:
        """All of them, parsed; those that are no Prometheus text are left out."""
        reader = _SampleReader()
        return tuple(
            Scrape(at_seconds=at_seconds, samples=samples)
            for at_seconds, text in self._texts
            if (samples := reader.read(text)) is not None
        )


class _SampleReader:
    """Reads Prometheus's text format. The series hardly change from scrape to scrape, so each is parsed only once."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}  # as the target writes it -> as a Scrape does

    def read(self, text: str) -> dict[str, float] | None:
        samples: dict[str, float] = {}
        try:
            for line in text.splitlines():
                if line and not line.startswith("#"):
                    series, value = _split(line)
                    samples[self._name(series)] = value
        except (ValueError, IndexError, KeyError):
            return None
        return samples

    def _name(self, series: str) -> str:
        name = self._names.get(series)
        if name is None:
            name = self._names[series] = _spell(series)
        return name


def _split(line: str) -> tuple[str, float]:
    """The series and the value of `name{labels} value [timestamp]`; a label's value may hold blanks and braces."""
    head, brace, tail = line.rpartition("}")
    if not brace:
        head, _, tail = line.partition(" ")
    return head + brace, float(tail.split()[0])


def _spell(series: str) -> str:
    """`name{label="value",…}`, whatever blanks the target puts between. Raises ValueError if it is no series."""
    for family in text_string_to_metric_families(f"{series} 0\n"):
        for sample in family.samples:
            labels = ",".join(f'{name}="{_escape(value)}"' for name, value in sample.labels.items())
            return sample.name + (f"{{{labels}}}" if labels else "")
    raise ValueError("no series")


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
