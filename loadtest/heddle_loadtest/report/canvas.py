"""How all plots look: sizes, colours, axes without ornament. Knows no run.

Figures are made without pyplot, whose state is global. Colours are those of Okabe and Ito (2008), which people with
any common form of colour blindness can tell apart; lines that matter differ in dash or width besides.
"""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, GREY, RULE = "#1f2328", "#8c959f", "#d8dee4"
TIER_COLOURS = {"device": BLUE, "host": ORANGE, "disk": VERMILION, "base": GREEN, "unknown": GREY}
PAGE_COLOURS = {"adapter": BLUE, "loading": VERMILION, "kv": ORANGE, "cached": SKY, "other": GREY, "free": "#eaeef2"}

_WIDTH_INCHES, _HEIGHT_INCHES = 9.0, 3.6
_PNG_DOTS_PER_INCH = 160


def new_figure(num_rows: int = 1, num_columns: int = 1, *, row_inches: float = _HEIGHT_INCHES) -> tuple[Figure, Any]:
    """A figure and its axes, one object or an array as `Figure.subplots` gives; rows share their time axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, row_inches * num_rows), layout="constrained", facecolor="white")
    axes = figure.subplots(num_rows, num_columns, sharex=num_rows > 1)
    for one in figure.axes:
        _strip(one)
    return figure, axes


def label(axes: Axes, *, x: str = "", y: str = "", title: str = "") -> None:
    """Names the axes, with units in them."""
    axes.set_xlabel(x, fontsize=10, color=INK)
    axes.set_ylabel(y, fontsize=10, color=INK)
    axes.set_title(title, fontsize=11, color=INK, loc="left", fontweight="bold")


def legend(axes: Axes, **options: Any) -> None:
    """A legend without a frame; none where nothing has a name."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, **options)


def legend_beside(axes: Axes) -> None:
    """A legend to the right, where it covers no data."""
    legend(axes, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def legend_above(axes: Axes) -> None:
    """A legend in the line of the title, at its other end."""
    legend(axes, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.1)


def log_scale(axes: Axes, name: Literal["x", "y"]) -> None:
    """A logarithmic axis with marks at 1, 2, 5, 10 and so on, written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = axes.xaxis if name == "x" else axes.yaxis
    axes.set(**{f"{name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))


def to_svg(figure: Figure) -> bytes:
    """The figure for a page, as sharp as the screen."""
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=_PNG_DOTS_PER_INCH)
    return buffer.getvalue()


def to_png(figure: Figure) -> bytes:
    """The figure for a slide."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=_PNG_DOTS_PER_INCH)
    return buffer.getvalue()


def _strip(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9, color=GREY)
    axes.grid(visible=True, axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
