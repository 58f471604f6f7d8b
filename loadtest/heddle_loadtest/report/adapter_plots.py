"""Plots of which adapters were asked for and where they lay meanwhile. Writes no file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from heddle_loadtest.client.result import RequestResult
from heddle_loadtest.measure.scraped import series
from heddle_loadtest.report import canvas
from heddle_loadtest.report.latency_plots import tier_of
from heddle_loadtest.run.outcome import Outcome, Scrape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MANY_DOTS = 1500  # of a colour: from here on they are small
_TIERS = ("device", "host", "disk", "base", "unknown")
_TIER_NAMES = {
    "device": "was on the device",
    "host": "was in host memory",
    "disk": "was on disk",
    "base": "base",
    "unknown": "not said where",
}


def draw_timeline(outcomes: Sequence[Outcome]) -> Figure | None:
    """Of the first repeat: a dot a request, its adapter by popularity upwards, its colour where the adapter was."""
    results = outcomes[0].results if outcomes else ()
    if len({result.adapter for result in results}) < 2:
        return None
    start, ranks = outcomes[0].started_seconds, popularity_ranks(results)
    figure, panel = canvas.new_figure()
    for tier in _TIERS:
        dots = [
            (result.scheduled_seconds - start, ranks[result.adapter])
            for result in results
            if result.is_ok and tier_of(result) == tier
        ]
        _scatter(panel, dots, color=canvas.TIER_COLOURS[tier], marker="o", label=_TIER_NAMES[tier])
    failed = [(result.scheduled_seconds - start, ranks[result.adapter]) for result in results if not result.is_ok]
    _scatter(panel, failed, color=canvas.INK, marker="x", label="not answered")
    if max(ranks.values()) > 30:
        canvas.log_scale(panel, "y")
    panel.set_xlim(left=0)
    panel.invert_yaxis()
    canvas.label(panel, x="seconds since the start", y="adapter, 1 the most asked for", title="who was asked for when")
    canvas.legend_beside(panel)
    return figure


def draw_residency(outcomes: Sequence[Outcome]) -> Figure | None:
    """Of the first repeat: what the pool's pages held, and how many adapters each tier held; heddle alone tells."""
    scrapes = outcomes[0].scrapes if outcomes else ()
    times = [scrape.at_seconds - outcomes[0].started_seconds for scrape in scrapes]
    pages, adapters = pages_by_kind(scrapes), series(scrapes, "heddle_adapters_resident")
    if len(times) < 2 or not pages:
        return None
    figure, (pool, resident) = canvas.new_figure(2, row_inches=2.6)
    kinds = [kind for kind in canvas.PAGE_COLOURS if kind in pages]
    stack = [pages[kind] for kind in kinds]
    pool.stackplot(times, stack, labels=kinds, colors=[canvas.PAGE_COLOURS[kind] for kind in kinds], step="post")
    for tier in (tier for tier in _TIERS if tier in adapters):
        resident.step(times, adapters[tier], where="post", color=canvas.TIER_COLOURS[tier], label=tier)
    for panel in (pool, resident):
        panel.set_ylim(bottom=0)
        panel.set_xlim(min(times[0], 0), times[-1])
        canvas.legend_beside(panel)
    canvas.label(pool, y="pages", title="the pool, by what its pages hold")
    canvas.label(resident, x="seconds since the start", y="adapters", title="adapters held, by tier")
    return figure


def pages_by_kind(scrapes: Sequence[Scrape]) -> dict[str, list[float]]:
    """What the pool's pages held at each scrape; kinds that have no colour here are added up as "other"."""
    found = series(scrapes, "heddle_pool_pages")
    known = {kind: values for kind, values in found.items() if kind in canvas.PAGE_COLOURS}
    others = [values for kind, values in found.items() if kind not in known]
    return known | ({"other": [sum(column) for column in zip(*others, strict=True)]} if others else {})


def popularity_ranks(results: Sequence[RequestResult]) -> dict[str, int]:
    """Adapter -> 1 for the one asked for most, and so on; of equals the earlier first."""
    counts = Counter(result.adapter for result in results)
    return {name: rank for rank, (name, _) in enumerate(counts.most_common(), start=1)}


def _scatter(panel: Axes, dots: Sequence[tuple[float, int]], *, color: str, marker: str, label: str) -> None:
    if dots:
        width = 0.0 if marker == "o" else 1.2
        x, y = zip(*dots, strict=True)
        panel.scatter(
            x,
            y,
            s=14 if len(dots) < _MANY_DOTS else 4,
            color=color,
            marker=marker,
            linewidths=width,
            label=label,
            rasterized=True,
        )
