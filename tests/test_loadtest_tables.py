"""What the terminal shows: the summary's numbers, whole names, eighty columns, the JSON line last."""

from __future__ import annotations

import json
import re
from io import StringIO

import pytest
from rich.console import Console

from heddle_loadtest.client.result import RequestError
from heddle_loadtest.measure.summary import Summary, summarize
from heddle_loadtest.report.numbers import amount, amount_between, milliseconds, percent, percent_between
from heddle_loadtest.report.sheets import sheets_of
from heddle_loadtest.report.tables import print_summary, print_tables
from loadtest_runs import WORKLOAD, make_repeat
from loadtest_samples import CLOSED_LOOP, OPEN_LOOP, make_cached_result, make_outcome, make_result

WHOLE = summarize(WORKLOAD, [make_repeat(seed, 150) for seed in range(3)])


def printed(summary: Summary, *, width: int = 80, with_colour: bool = False) -> str:
    output = StringIO()
    console = Console(
        file=output, width=width, force_terminal=with_colour, color_system="standard" if with_colour else None
    )
    print_tables(summary, console)
    return output.getvalue()


def line_of(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.strip().startswith(f"{name} "))
    return line.strip().removeprefix(name).split()


def test_the_latency_table_is_the_summary_in_milliseconds() -> None:
    text = printed(WHOLE)
    for name, values in (
        ("time to first token", WHOLE.total.ttft_seconds),
        ("time per output token", WHOLE.total.tpot_seconds),
        ("between tokens", WHOLE.total.inter_token_seconds),
        ("end to end", WHOLE.total.end_to_end_seconds),
    ):
        assert values is not None
        expected = (values.mean, values.p50, values.p90, values.p99, values.p99_9, values.max)
        cells = [float(cell.replace(",", "")) / 1000 for cell in line_of(text, name)]
        assert cells == pytest.approx(expected, rel=0.02)


def test_the_headline_counts_and_has_intervals() -> None:
    first = " ".join(printed(WHOLE, width=200).splitlines()[:1])
    interval = WHOLE.intervals["output_tokens_per_second"]
    assert first.startswith(f"{WHOLE.total.num_ok} ok, {WHOLE.total.num_failed} failed in ")
    assert f"{WHOLE.total.output_tokens_per_second:.1f} tokens/s ({interval.low:.1f} to {interval.high:.1f})" in first


def test_twelve_adapters_are_shown_and_the_rest_counted() -> None:
    results = [make_result(0.0, 0.1, adapter=f"adapter-{index % 2000:05d}") for index in range(2100)]
    text = printed(summarize(OPEN_LOOP, [make_outcome(results)]))
    assert len(re.findall(r"^ +adapter-\d{5} ", text, flags=re.MULTILINE)) == 12
    assert "and 1,988 more" in text
    assert "more." not in printed(summarize(OPEN_LOOP, [make_outcome(results[:12])]))


def test_goodput_fairness_tiers_tenants_uploads_and_errors_are_there() -> None:
    text = " ".join(printed(WHOLE).split())
    goodput = WHOLE.total.goodput
    assert goodput is not None
    assert goodput.share is not None
    assert f"Goodput (TTFT ≤ 500 ms, TPOT ≤ 50 ms): {goodput.share * 100:.1f} % of 450 requests" in text
    assert WHOLE.fairness_over_adapters is not None
    assert f"Fairness over {WHOLE.num_adapters} adapters" in text
    assert f"speed {WHOLE.fairness_over_adapters.speed:.3f}" in text
    assert "Fairness over 2 tenants" in text
    assert WHOLE.temperature is not None
    ok_on_disk, share, *_ = line_of(printed(WHOLE), "on disk")
    assert int(ok_on_disk) == WHOLE.temperature.tiers["disk"].num_ok
    assert float(share) == pytest.approx(WHOLE.temperature.hit_rates["disk"] * 100, abs=0.06)
    assert "Uploads during the run: 3 ok" in text
    assert line_of(printed(WHOLE), "queue_full")[-1] == str(WHOLE.errors["queue_full"])
    assert line_of(printed(WHOLE), "paying")[0] == str(WHOLE.tenants["paying"].num_ok)


def test_nothing_is_said_of_what_was_not_measured() -> None:
    text = printed(summarize(CLOSED_LOOP, [make_outcome([make_result(0.0, 0.1)])]))
    for word in ("tenant", "on disk", "Goodput", "Fairness", "Uploads", "The target says", "error"):
        assert word not in text


def test_the_targets_own_numbers_and_whether_they_agree() -> None:
    scrapes = [
        {"heddle_generated_tokens_total": 0.0, "heddle_engine_steps_total": 0.0, "heddle_segments_total": 0.0},
        {"heddle_generated_tokens_total": 9.0, "heddle_engine_steps_total": 4.0, "heddle_segments_total": 10.0},
    ]
    summary = summarize(OPEN_LOOP, [make_outcome([make_result(0.0, 0.1, 0.2, 0.3)], scrapes=scrapes)])
    text = printed(summary)
    assert line_of(text, "output tokens") == ["3", "9", "200.0", "%", "DIFFER"]
    assert "4 steps of 2.50 adapters" in " ".join(text.split())


def test_an_invalid_run_is_red_and_says_why() -> None:
    late = [make_result(0.0, 1.0, lag=0.5) for _ in range(20)]
    text = printed(summarize(OPEN_LOOP, [make_outcome(late)]), with_colour=True, width=200)
    (line,) = (line for line in text.splitlines() if "INVALID" in line)
    assert re.match(r"\x1b\[1;31mINVALID: .*dispatch lag p99 500\.0 ms", line)
    good = printed(summarize(OPEN_LOOP, [make_outcome([make_result(0.0, 1.0)])]))
    assert "INVALID" not in good
    assert "Not for publication: A published figure needs 3 repeats" in " ".join(good.split())


def test_warnings_are_yellow() -> None:
    without_usage = make_outcome([make_result(0.0, 1.0, num_prompt_tokens=None)])
    text = printed(summarize(OPEN_LOOP, [without_usage]), with_colour=True, width=200)
    (line,) = (line for line in text.splitlines() if "Note: " in line)
    assert re.match(r"\x1b\[33mNote: 1 of 1 answers came without usage", line)


def test_speed_is_said_beside_the_average() -> None:
    results = [make_result(0.0, 1.0, adapter="slow"), make_result(0.0, 0.5, adapter="fast")]
    text = " ".join(printed(summarize(CLOSED_LOOP, [make_outcome(results)])).split())
    assert "slowest slow (0.75 of the run's average speed), fastest fast (1.50)." in text
    failed = [make_result(0.0, adapter=name, error=RequestError("queue_full", "later")) for name in "ab"]
    assert "answered -, speed -." in printed(summarize(CLOSED_LOOP, [make_outcome(failed)]), width=200)


def test_no_requests_at_all() -> None:
    assert "0 ok, 0 failed" in printed(summarize(OPEN_LOOP, []))
    assert "0 ok, 0 failed" in printed(summarize(OPEN_LOOP, [make_outcome([])]))


def hostile() -> Summary:
    """Long names, markup, huge numbers."""
    name = "[bold red]" + "a-very-long-name" * 8 + "[/nothing]"
    results = [
        make_result(0.0, 123_456.789, 987_654.321, adapter=name, tenant=name, num_output_tokens=9_999_999_999),
        make_cached_result(0.0, 99_999.0, 199_999.0, cache="disk", num_output_tokens=1_000_000_000, tenant="b"),
        make_result(0.0, adapter=name, tenant=name, error=RequestError("[/]" * 30, "[link=x]" * 40)),
    ]
    outcomes = [make_outcome(results, seed=seed, ended=1.0) for seed in (123_456_789, 2, 3)]
    return summarize(WORKLOAD, outcomes)


@pytest.mark.parametrize("summary", [WHOLE, hostile()], ids=["whole", "hostile"])
def test_fits_eighty_columns_and_loses_nothing(summary: Summary) -> None:
    text = printed(summary)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    joined = re.sub(r"\s", "", text)
    for sheet in sheets_of(summary.to_json(), max_rows=12):
        for row in sheet.rows:
            assert all(
                re.sub(r"\s", "", cell) in joined or len(cell) > 8  # a folded cell has its neighbours between
                for cell in row
            )


def test_a_folded_name_is_whole() -> None:
    name = "[red]" + "".join(chr(ord("a") + index % 26) for index in range(60))
    results = [make_result(0.0, 0.1, adapter=name), make_result(0.0, 0.1)]
    text = printed(summarize(OPEN_LOOP, [make_outcome(results)]))
    lines = text.split("adapter  ")[1].splitlines()
    start = next(index for index, line in enumerate(lines) if line.strip().startswith("[red]"))
    column = "".join(line[2:].split("  ")[0].strip() for line in lines[start : start + 8])
    assert name in column


def test_no_name_steers_the_terminal() -> None:
    results = [
        make_result(0.0, 0.1, adapter="red\x1b[31m\u202e\x07"),
        make_result(0.0, adapter="b", error=RequestError("a\rb", "\x1b[2J")),
    ]
    text = printed(summarize(OPEN_LOOP, [make_outcome(results)]))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)
    assert "red\ufffd[31m" in text


def test_a_page_of_an_error_is_not_printed_whole() -> None:
    failed = make_result(0.0, error=RequestError("http_502", "<html>" * 10_000))
    assert len(printed(summarize(OPEN_LOOP, [make_outcome([failed])]))) < 5000


def test_the_json_line_is_last_and_alone_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(WHOLE)
    whole = json.loads(json.dumps(WHOLE.to_json()))
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(whole) - set(line) == {"adapters", "other_adapters", "tenants", "temperature"}
    assert all(whole[name] == value for name, value in line.items())
    print_summary(WHOLE, json_only=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["total"]["num_ok"] == WHOLE.total.num_ok


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0.00"),
        (0.5234, "0.52"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (999.94, "999.9"),
        (1e6, "1,000,000"),
    ],
)
def test_amounts(value: float | None, text: str) -> None:
    assert amount(value) == text
    assert milliseconds(None if value is None else value / 1000) == text


def test_shares_and_intervals() -> None:
    assert (percent(0.1234), percent(None)) == ("12.3 %", "-")
    assert (percent_between((0.967, 0.984)), percent_between(None)) == ("96.7 to 98.4 %", "")
    assert amount_between((1.0, 20.0)) == "1.00 to 20.0"
