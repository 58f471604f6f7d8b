"""All plots of a report: their names, captions, and what to say where there is nothing to draw.

matplotlib is an extra: without it there are no plots, and everything else goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from heddle_loadtest.report import adapter_plots, canvas, latency_plots, load_plots
from heddle_loadtest.report.stored_run import StoredRun
from heddle_loadtest.run.outcome import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_MATPLOTLIB = "Plots need matplotlib: pip install 'heddle[loadtest]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One kind of plot."""

    name: str  # of its file, without .png
    title: str
    caption: str  # how to read it
    missing: str  # why it may not be there
    draw: Callable[[Sequence[Outcome]], Figure | None]


PLOTS = (
    Plot(
        name="latency",
        title="Latency",
        caption=(
            "The share of answered requests that took at most so long, counted from the time each was due. "
            "Read the median at 0.5 and p99 just under 1; a line that leans far to the right at the top has a long "
            "tail. Thin lines are single repeats: where they lie apart, the run is too short to be sure."
        ),
        missing="not one request was answered.",
        draw=latency_plots.draw_latencies,
    ),
    Plot(
        name="throughput",
        title="Load over time",
        caption=(
            "Tokens of answers that arrived whole, by when they arrived; requests due and answered; requests under "
            "way. Where the answered stay below the due and those in flight climb, the target is beyond its capacity. "
            "The strong line is the first repeat."
        ),
        missing="not one request was sent.",
        draw=load_plots.draw_throughput,
    ),
    Plot(
        name="temperature",
        title="Warm and cold adapters",
        caption=(
            "Time to first token by where the request's adapter was when the request came. The way from one line to "
            "the next is what loading costs; behind the names stands how many requests a line is made of."
        ),
        missing="the target does not say where a request's adapter was, or no request named an adapter.",
        draw=latency_plots.draw_temperatures,
    ),
    Plot(
        name="adapters",
        title="Adapters over time",
        caption=(
            "Each dot is a request of the first repeat, at the time it was due; the most popular adapter is on top. "
            "A row that stays in one colour is an adapter that stays in one place."
        ),
        missing="the run asks for one adapter only.",
        draw=adapter_plots.draw_timeline,
    ),
    Plot(
        name="residency",
        title="Cache over time",
        caption=(
            "What the target's own metrics say of the first repeat: which share of its page pool adapters and "
            "requests hold, and how many adapters are on the device and in host memory."
        ),
        missing="the target's metrics do not tell what its cache holds, or were not read.",
        draw=adapter_plots.draw_residency,
    ),
    Plot(
        name="lag",
        title="The client itself",
        caption=(
            "How late the client sent each request. Latencies count from the time a request was due, so that a slow "
            "client looks like a slow server: many dots above the dashed line put all other numbers in doubt."
        ),
        missing="not one request was sent.",
        draw=load_plots.draw_lag,
    ),
)


def has_matplotlib() -> bool:
    """Whether plots can be drawn."""
    return find_spec("matplotlib") is not None


def draw_plots(run: StoredRun) -> Iterator[tuple[Plot, Figure | None]]:
    """Every plot in the order of the page; None where there is nothing to draw."""
    for plot in PLOTS:
        yield plot, plot.draw(run.outcomes)


def write_plots(run: StoredRun, folder: Path) -> None:
    """One PNG a plot into `folder`; none without matplotlib."""
    if not has_matplotlib():
        return
    for plot, figure in draw_plots(run):
        if figure is not None:
            (folder / f"{plot.name}.png").write_bytes(canvas.to_png(figure))
