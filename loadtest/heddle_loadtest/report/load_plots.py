"""Plots of what went through, second by second, and of whether the client kept up. Writes no file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from heddle_loadtest.client.result import RequestResult
from heddle_loadtest.report import canvas
from heddle_loadtest.run.outcome import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BIN_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
_MAX_BINS = 80


def draw_throughput(outcomes: Sequence[Outcome]) -> Figure | None:
    """Output tokens a second, requests a second, requests in flight; every repeat a line, the first one strong."""
    measured = [outcome for outcome in outcomes if outcome.results and outcome.elapsed_seconds > 0]
    if not measured:
        return None
    figure, (tokens, requests, flight) = canvas.new_figure(3, row_inches=2.0)
    for index, outcome in reversed(list(enumerate(measured))):
        strength: dict[str, Any] = {"linewidth": 1.8} if index == 0 else {"linewidth": 0.8, "alpha": 0.4}
        edges = bin_edges(outcome.elapsed_seconds)
        names = {"done": "answered", "due": "due"} if index == 0 else {"done": None, "due": None}
        tokens.stairs(tokens_per_second(outcome, edges), edges, color=canvas.BLUE, **strength)
        requests.stairs(due_per_second(outcome, edges), edges, color=canvas.GREY, label=names["due"], **strength)
        done = {"color": canvas.GREEN, "label": names["done"], **strength}
        requests.stairs(done_per_second(outcome, edges), edges, linestyle=(0, (4, 1)), **done)
        flight.stairs(in_flight(outcome, edges), edges, color=canvas.VERMILION, **strength)
    canvas.label(tokens, y="tokens/s", title="output tokens")
    canvas.label(requests, y="requests/s", title="requests")
    canvas.label(flight, x="seconds since the start", y="requests", title="in flight")
    canvas.legend_above(requests)
    for panel in (tokens, requests, flight):
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
    return figure


def draw_lag(outcomes: Sequence[Outcome]) -> Figure | None:
    """How late each request was sent, over time, with the limit beyond which a run says nothing of its target."""
    from heddle_loadtest.measure.validity import MAX_LAG_P99_SECONDS

    limit_milliseconds = MAX_LAG_P99_SECONDS * 1000
    points = [
        (result.scheduled_seconds - outcome.started_seconds, result.lag_seconds * 1000)
        for outcome in outcomes
        for result in outcome.results
    ]
    if not points:
        return None
    figure, panel = canvas.new_figure(row_inches=2.6)
    panel.scatter(*zip(*points, strict=True), s=6, color=canvas.BLUE, linewidths=0, alpha=0.6, rasterized=True)
    limit = f"p99 above {limit_milliseconds:g} ms makes a run invalid"
    panel.axhline(limit_milliseconds, color=canvas.VERMILION, linewidth=1.2, linestyle=(0, (4, 2)), label=limit)
    panel.set_ylim(0, max(1.2 * limit_milliseconds, 1.05 * max(lag for _, lag in points)))
    panel.set_xlim(left=0)
    canvas.label(panel, x="seconds since the start", y="milliseconds", title="how late requests were sent")
    canvas.legend_above(panel)
    return figure


def bin_edges(elapsed_seconds: float) -> list[float]:
    """From 0 to the end in round steps, eighty at most.

    The last step is what remains, between a half and one and a half of the others: a single answer that falls into
    a last millisecond would be a thousand a second.
    """
    step = next((step for step in _BIN_SECONDS if elapsed_seconds / step <= _MAX_BINS), elapsed_seconds / _MAX_BINS)
    num_bins = max(1, round(elapsed_seconds / step))
    return [*(index * step for index in range(num_bins)), elapsed_seconds]


def tokens_per_second(outcome: Outcome, edges: Sequence[float]) -> Any:
    """By bin, of the answers that arrived whole; a chunk counts as its share of the answer's tokens."""
    good = [result for result in outcome.results if result.is_ok and result.chunk_seconds]
    times = [at - outcome.started_seconds for result in good for at in result.chunk_seconds]
    weights = [share for result in good for share in _token_shares(result)]
    return _rates(times, edges, weights)


def done_per_second(outcome: Outcome, edges: Sequence[float]) -> Any:
    """By bin, the answers that arrived whole."""
    done = [result.finished_seconds - outcome.started_seconds for result in outcome.results if result.is_ok]
    return _rates(done, edges)


def due_per_second(outcome: Outcome, edges: Sequence[float]) -> Any:
    """By bin, what the workload asked for."""
    return _rates([result.scheduled_seconds - outcome.started_seconds for result in outcome.results], edges)


def in_flight(outcome: Outcome, edges: Sequence[float]) -> Any:
    """By bin, how many requests were under way, on the average over its time."""
    import numpy

    passed = numpy.zeros(len(edges))  # request-seconds until each edge
    for sign, times in (
        (1, [result.started_seconds for result in outcome.results]),
        (-1, [result.finished_seconds for result in outcome.results]),
    ):
        since_start = numpy.asarray(times) - outcome.started_seconds
        passed += sign * numpy.array([numpy.clip(edge - since_start, 0, None).sum() for edge in edges])
    return numpy.diff(passed) / numpy.diff(edges)


def _token_shares(result: RequestResult) -> list[float]:
    num_chunks = len(result.chunk_seconds)
    return [result.num_output_tokens / num_chunks] * num_chunks


def _rates(times: Sequence[float], edges: Sequence[float], weights: Sequence[float] | None = None) -> Any:
    import numpy

    counts, _ = numpy.histogram(numpy.clip(times, edges[0], edges[-1]), bins=edges, weights=weights)
    return counts / numpy.diff(edges)
