"""Plots of how long users wait. Draws figures from outcomes; writes no file.

Every latency is shown as the share of requests that took at most so long: all percentiles at once, and a tail or a
second hump stays visible where bars would hide it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from heddle_loadtest.client.result import RequestResult
from heddle_loadtest.report import canvas
from heddle_loadtest.run.outcome import Outcome
from heddle_loadtest.workload.names import BASE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_POINTS = 1000  # of a line: more than a screen has pixels across
_LINEAR_RATIO = 8  # of the slowest to the fastest: up to here a logarithmic axis only distorts
_TIERS = ("device", "host", "disk", "base")
_TIER_NAMES = {"device": "on the device", "host": "in host memory", "disk": "on disk", "base": "base, no adapter"}
_LATENCIES: tuple[tuple[str, str, Callable[[RequestResult], float | None]], ...] = (
    ("time to first token", canvas.BLUE, lambda result: result.ttft_seconds),
    ("time per output token", canvas.ORANGE, lambda result: result.tpot_seconds),
    ("end to end", canvas.GREEN, lambda result: result.end_to_end_seconds),
)


def draw_latencies(outcomes: Sequence[Outcome]) -> Figure | None:
    """Three panels; every repeat a faint line, all repeats together a strong one."""
    if not any(result.is_ok for outcome in outcomes for result in outcome.results):
        return None
    figure, panels = canvas.new_figure(1, len(_LATENCIES))
    for panel, (name, colour, latency) in zip(panels, _LATENCIES, strict=True):
        repeats = [_milliseconds(outcome.results, latency) for outcome in outcomes]
        for values in repeats if len(repeats) > 1 else ():
            _plot_shares(panel, values, color=colour, linewidth=0.9, alpha=0.45)
        _plot_shares(panel, [value for values in repeats for value in values], color=colour, linewidth=2.0)
        _finish(panel, title=name)
    panels[0].set_ylabel("share of requests", fontsize=10, color=canvas.INK)
    return figure


def draw_temperatures(outcomes: Sequence[Outcome]) -> Figure | None:
    """TTFT by where the adapter was when its request came; None if the target says of no request where it was."""
    by_tier = {tier: _ttft_of(outcomes, tier) for tier in _TIERS}
    if not any(by_tier[tier] for tier in _TIERS[:-1]):
        return None
    figure, panel = canvas.new_figure()
    for tier, dashes in zip(_TIERS, ("-", (0, (6, 2)), (0, (2, 1)), (0, (1, 2))), strict=True):
        name = f"{_TIER_NAMES[tier]} ({len(by_tier[tier]):,})"
        _plot_shares(panel, by_tier[tier], color=canvas.TIER_COLOURS[tier], linewidth=2.0, linestyle=dashes, label=name)
    _finish(panel, title="time to first token, by where the adapter was")
    canvas.label(panel, x="milliseconds", y="share of requests", title=panel.get_title(loc="left"))
    canvas.legend_beside(panel)
    return figure


def tier_of(result: RequestResult) -> str:
    """Where the request found its adapter: device, host, disk; base; unknown where the target does not say."""
    if result.adapter == BASE:
        return "base"
    tier = result.server.cache if result.server else None
    return tier if tier in _TIERS else "unknown"


def _ttft_of(outcomes: Iterable[Outcome], tier: str) -> list[float]:
    results = (result for outcome in outcomes for result in outcome.results if tier_of(result) == tier)
    return _milliseconds(results, lambda result: result.ttft_seconds)


def _milliseconds(results: Iterable[RequestResult], latency: Callable[[RequestResult], float | None]) -> list[float]:
    values = (latency(result) for result in results if result.is_ok)
    return [seconds * 1000 for seconds in values if seconds is not None]


def _plot_shares(panel: Axes, values: Sequence[float], **style: object) -> None:
    """The empirical distribution of `values`; of more than a thousand, so many evenly spaced quantiles."""
    if not values:
        return
    import numpy

    ordered = numpy.sort(numpy.asarray(values))
    shares = numpy.arange(1, len(ordered) + 1) / len(ordered)
    if len(ordered) > _MAX_POINTS:
        kept = numpy.linspace(0, len(ordered) - 1, _MAX_POINTS).astype(int)
        ordered, shares = ordered[kept], shares[kept]
    ordered, shares = numpy.append(ordered[0], ordered), numpy.append(0.0, shares)
    panel.step(ordered, shares, where="post", **style)  # type: ignore[arg-type]


def _finish(panel: Axes, *, title: str) -> None:
    low, high = panel.dataLim.intervalx
    if high > _LINEAR_RATIO * low > 0:
        canvas.log_scale(panel, "x")
    elif low <= high < 1.01 * low:  # all the same: rounding errors are nothing to look at
        panel.set_xlim(0.9 * low, 1.1 * high)
    panel.set_ylim(0, 1.02)
    panel.grid(visible=True, axis="x", color=canvas.RULE, linewidth=0.6)
    canvas.label(panel, x="milliseconds", title=title)
