"""Plots show the outcomes: the data in the figures against the same numbers counted by other means."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from heddle_loadtest.client.result import RequestError
from heddle_loadtest.report import canvas
from heddle_loadtest.report.adapter_plots import draw_residency, draw_timeline, popularity_ranks
from heddle_loadtest.report.latency_plots import draw_latencies, draw_temperatures
from heddle_loadtest.report.load_plots import bin_edges, draw_lag, draw_throughput
from heddle_loadtest.report.plots import PLOTS, write_plots
from heddle_loadtest.run.outcome import Outcome
from loadtest_runs import IN_HOST, ON_DEVICE, POOL_PAGES, make_repeat, make_run, stored
from loadtest_samples import make_cached_result, make_outcome, make_result

OUTCOMES = tuple(make_repeat(seed, 150) for seed in range(3))
GOOD = [result for outcome in OUTCOMES for result in outcome.results if result.is_ok]


def dots(panel: Axes) -> dict[str, np.ndarray]:
    """Label -> offsets of each scatter."""
    return {str(found.get_label()): np.asarray(found.get_offsets()) for found in panel.collections}


def test_latency_lines_are_the_distributions() -> None:
    figure = draw_latencies(OUTCOMES)
    assert figure is not None
    expected = (
        [result.ttft_seconds for result in GOOD],
        [result.tpot_seconds for result in GOOD],
        [result.end_to_end_seconds for result in GOOD],
    )
    for panel, seconds in zip(figure.axes, expected, strict=True):
        *repeats, pooled = panel.lines
        assert [len(np.asarray(line.get_xdata())) - 1 for line in repeats] == [
            sum(result.is_ok for result in outcome.results) for outcome in OUTCOMES
        ]
        assert all(line.get_linewidth() < pooled.get_linewidth() for line in repeats)
        milliseconds = np.sort(np.array(seconds, dtype=float)) * 1000
        assert np.asarray(pooled.get_xdata())[1:] == pytest.approx(milliseconds)
        floor, *shares = np.asarray(pooled.get_ydata())
        assert floor == 0
        at_median = milliseconds[np.searchsorted(shares, 0.5)]
        assert at_median == pytest.approx(np.median(milliseconds), rel=0.05)
        assert shares[-1] == 1
        assert panel.get_xlabel() == "milliseconds"


def test_one_repeat_is_one_line() -> None:
    figure = draw_latencies(OUTCOMES[:1])
    assert figure is not None
    assert [len(panel.lines) for panel in figure.axes] == [1, 1, 1]


def test_lines_of_many_requests_are_thinned_but_keep_their_ends() -> None:
    results = [make_result(0.0, 0.001 * index, 0.002 * index) for index in range(1, 5001)]
    figure = draw_latencies([make_outcome(results)])
    assert figure is not None
    (line,) = figure.axes[0].lines
    milliseconds, shares = np.asarray(line.get_xdata())[1:], np.asarray(line.get_ydata())[1:]
    assert len(milliseconds) == 1000
    assert (milliseconds[0], milliseconds[-1], shares[-1]) == pytest.approx((1, 5000, 1))
    assert shares == pytest.approx(milliseconds / 5000)


@pytest.mark.parametrize(("fastest", "scale"), [(0.100, "linear"), (0.010, "log")])
def test_a_narrow_range_is_not_stretched_by_a_logarithm(fastest: float, scale: str) -> None:
    figure = draw_latencies([make_outcome([make_result(0.0, at, at + 1.0) for at in (fastest, 0.2, 0.3)])])
    assert figure is not None
    assert figure.axes[0].get_xscale() == scale


def test_throughput_adds_up_to_what_was_answered() -> None:
    figure = draw_throughput(OUTCOMES)
    assert figure is not None
    tokens, requests, flight = figure.axes
    values, edges, _ = tokens.patches[-1].get_data()  # type: ignore[attr-defined]
    first = OUTCOMES[0]
    answered = [result for result in first.results if result.is_ok]
    assert (values * np.diff(edges)).sum() == pytest.approx(sum(result.num_output_tokens for result in answered))
    assert (edges[0], edges[-1]) == (0, pytest.approx(first.ended_seconds - first.started_seconds))
    due, done = requests.patches[-2:]
    for patch, number in ((due, len(first.results)), (done, len(answered))):
        values, edges, _ = patch.get_data()  # type: ignore[attr-defined]
        assert (values * np.diff(edges)).sum() == pytest.approx(number)
    assert (due.get_label(), done.get_label()) == ("due", "answered")
    values, edges, _ = flight.patches[-1].get_data()  # type: ignore[attr-defined]
    for value, begin, end in zip(values, edges, edges[1:], strict=False):
        overlaps = (
            min(end, result.finished_seconds - first.started_seconds)
            - max(begin, result.started_seconds - first.started_seconds)
            for result in first.results
        )
        assert value * (end - begin) == pytest.approx(sum(max(0.0, overlap) for overlap in overlaps), abs=1e-6)


def test_tokens_stand_where_they_arrived_and_count_whole_answers_only() -> None:
    lost = make_result(0.0, 0.5, 2.5, error=RequestError("connection_lost", "reset"))
    results = [make_result(0.0, 0.5, 1.5, 2.5, num_output_tokens=6), lost]
    figure = draw_throughput([make_outcome(results, ended=2.5)])
    assert figure is not None
    values, edges, _ = figure.axes[0].patches[-1].get_data()  # type: ignore[attr-defined]
    arrivals = {round(float(edge), 9) for edge, value in zip(edges, values, strict=False) if value}
    assert arrivals == {0.5, 1.5, 2.4}  # the end itself belongs to the last bin
    assert (values * np.diff(edges)).sum() == pytest.approx(6)


@pytest.mark.parametrize(
    ("seconds", "step"), [(5.0, 0.1), (8.01, 0.25), (60.0, 1.0), (75.3, 1.0), (3600.0, 60.0), (12.2508, 0.25)]
)
def test_bins_are_round_steps(seconds: float, step: float) -> None:
    edges = np.array(bin_edges(seconds))
    assert np.diff(edges)[:-1] == pytest.approx(step)
    assert 0.5 * step <= np.diff(edges)[-1] <= 1.5 * step
    assert (edges[0], edges[-1]) == (0, seconds)
    assert len(edges) <= 82


def test_temperatures_are_apart() -> None:
    results = [
        *(make_cached_result(at, at + 0.1, cache="device") for at in range(3)),
        *(make_cached_result(at, at + 0.5, cache="disk") for at in range(2)),
        *(make_cached_result(at, at + 0.2, cache=None) for at in range(4)),
    ]
    figure = draw_temperatures([make_outcome(results)])
    assert figure is not None
    lines = {str(line.get_label()): line for line in figure.axes[0].lines}
    assert set(lines) == {"on the device (3)", "on disk (2)", "base, no adapter (4)"}
    assert lines["on disk (2)"].get_xdata() == pytest.approx([500, 500, 500])
    assert to_hex(lines["on disk (2)"].get_color()).upper() == canvas.TIER_COLOURS["disk"]


def test_no_temperatures_where_the_target_does_not_say() -> None:
    unknown = make_result(0.0, 1.0, adapter="poet")
    assert draw_temperatures([make_outcome([unknown, make_cached_result(0.0, 1.0, cache=None)])]) is None


def test_every_request_of_the_first_repeat_is_a_dot_at_its_time_and_rank() -> None:
    figure = draw_timeline(OUTCOMES)
    assert figure is not None
    (panel,) = figure.axes
    first = OUTCOMES[0]
    found = dots(panel)
    assert sum(map(len, found.values())) == len(first.results)
    assert len(found["not answered"]) == sum(not result.is_ok for result in first.results)
    on_disk = [result for result in first.results if result.is_ok and result.server and result.server.cache == "disk"]
    times = [result.scheduled_seconds - first.started_seconds for result in on_disk]
    assert found["was on disk"][:, 0] == pytest.approx(times)
    requests = Counter(result.adapter for result in first.results)
    sizes = sorted(requests.values(), reverse=True)
    ranks = found["was on disk"][:, 1].astype(int)
    assert [sizes[rank - 1] for rank in ranks] == [requests[result.adapter] for result in on_disk]
    assert panel.yaxis_inverted()


def test_a_tier_that_nobody_knows_is_a_dot_too() -> None:
    results = [make_cached_result(0.0, 0.1, cache="elsewhere"), make_result(0.0, 0.1)]
    figure = draw_timeline([make_outcome(results)])
    assert figure is not None
    assert {label: len(found) for label, found in dots(figure.axes[0]).items()} == {"not said where": 1, "base": 1}


def test_ranks_are_one_to_one() -> None:
    ranks = popularity_ranks(OUTCOMES[0].results)
    assert sorted(ranks.values()) == list(range(1, len(ranks) + 1))


def test_residency_is_what_the_metrics_say() -> None:
    figure = draw_residency(OUTCOMES)
    assert figure is not None
    pool, resident = figure.axes
    tops = [np.asarray(path.vertices)[:, 1].max() for stack in pool.collections for path in stack.get_paths()]
    assert max(tops) == POOL_PAGES
    lines = {str(line.get_label()): np.asarray(line.get_ydata()) for line in resident.lines}
    assert (lines["device"].max(), lines["host"].max()) == (ON_DEVICE, IN_HOST)
    assert lines["device"] == pytest.approx(
        [scrape.samples['heddle_adapters_resident{tier="device"}'] for scrape in OUTCOMES[0].scrapes]
    )


def test_kinds_of_pages_that_nobody_knows_are_there_too() -> None:
    scrapes = [{'heddle_pool_pages{kind="kv"}': 5.0, 'heddle_pool_pages{kind="$x^{"}': 2.0, "x": 1.0}] * 3
    figure = draw_residency([make_outcome([make_result(0.0, 1.0)], scrapes=scrapes)])
    assert figure is not None
    assert [stack.get_label() for stack in figure.axes[0].collections] == ["kv", "other"]


def test_lag_of_every_request() -> None:
    figure = draw_lag(OUTCOMES)
    assert figure is not None
    (panel,) = figure.axes
    lags = [result.lag_seconds * 1000 for outcome in OUTCOMES for result in outcome.results]
    (points,) = (np.asarray(found.get_offsets()) for found in panel.collections)
    assert points[:, 1] == pytest.approx(lags)
    assert panel.get_ylim()[1] > 5


FAILED = make_result(0.0, error=RequestError("connection_failed", "refused"))


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.name)
@pytest.mark.parametrize(
    "outcomes",
    [
        (),
        (make_outcome([]),),
        (make_outcome([FAILED]),),
        (make_outcome([make_result(0.0, 0.1)]),),
        (make_outcome([make_result(0.0, 0.0, 0.0)], ended=0.0),),
        (make_outcome([]), make_outcome([make_cached_result(0.0, 0.1, cache="elsewhere")])),
    ],
)
def test_little_to_draw_is_no_reason_to_fail(plot: object, outcomes: tuple[Outcome, ...]) -> None:
    figure = next(known for known in PLOTS if known is plot).draw(outcomes)
    if figure is not None:
        ElementTree.fromstring(canvas.to_svg(figure))


def test_colours_are_apart_for_everyone_and_in_grey() -> None:
    """Tiers differ in lightness or hue also in the two common forms of colour blindness (Viénot et al. 1999)."""
    tiers = [canvas.TIER_COLOURS[tier] for tier in ("device", "host", "disk")]
    rgb = np.array([[int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)] for colour in tiers]) ** 2.2
    no_red = np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]])
    no_green = np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]])
    for sight in (np.eye(3), no_red, no_green):
        seen = rgb @ sight.T
        gaps = [np.abs(seen[one] - seen[other]).max() for one in range(3) for other in range(one)]
        assert min(gaps) > 0.1


def test_pngs_lie_beside(tmp_path: Path) -> None:
    write_plots(make_run(num_repeats=1, num_requests=60), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {f"{plot.name}.png" for plot in PLOTS}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.iterdir())


def test_no_plots_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_plots(stored(OUTCOMES[:1]), tmp_path)
    assert not list(tmp_path.iterdir())


def test_importing_draws_nothing_and_drawing_leaves_pyplot_alone() -> None:
    code = (
        "import sys; import heddle_loadtest.report.page; assert 'matplotlib' not in sys.modules; "
        "from loadtest_runs import make_repeat; from heddle_loadtest.report import canvas, plots; "
        "canvas.to_png(plots.PLOTS[0].draw([make_repeat(0, 20)])); assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": _path()})
    assert done.returncode == 0, done.stderr


def _path() -> str:
    tests = Path(__file__).parent
    return f"{tests}:{tests.parent / 'loadtest'}"
