"""The self-check: it passes, and it fails for each way in which client and server can disagree."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from heddle_loadtest.client.result import RequestResult
from heddle_loadtest.commands import selfcheck as command
from heddle_loadtest.mock import many_streams
from heddle_loadtest.mock import selfcheck as checking
from heddle_loadtest.mock.core_wait import CoreWait
from heddle_loadtest.mock.many_streams import StreamsReport, find_limit, max_in_flight, run_streams
from heddle_loadtest.mock.phases import Phase, closed_loop, cold_adapters, errors, open_loop, poisson_times
from heddle_loadtest.mock.selfcheck import Check, PhaseReport, percentile_99, run_phase, run_selfcheck
from heddle_loadtest.mock.settings import MockSettings

SHORT: dict[str, Callable[[], Phase]] = {
    "closed": lambda: closed_loop(num_streams=4, num_rounds=4),
    "open": lambda: open_loop(rate=25, num_requests=25),
    "cold": lambda: cold_adapters(num_adapters=6),
    "errors": lambda: errors(rate=60, num_requests=40),
}
NUM_TRIES = 4  # another process that takes both cores for a moment may spoil some of them


def run_until_ok(phase: Phase) -> PhaseReport:
    """The first report that is all right, or the last one."""
    for _ in range(NUM_TRIES):
        report = run_phase(phase, phase.settings)
        if not report.is_merely_slow:
            break
    return report


def names_of_failed(report: PhaseReport) -> set[str]:
    return {check.quantity for check in report.checks if not check.is_ok}


@pytest.mark.parametrize("name", SHORT)
def test_each_phase_passes_when_the_mock_does_what_it_is_told(name: str) -> None:
    report = run_until_ok(SHORT[name]())
    assert names_of_failed(report) == set()
    assert report.checks


@pytest.mark.parametrize(
    ("name", "really", "failing"),
    [
        ("closed", {"ttft_seconds": 0.070}, {"TTFT p50", "TTFT mean"}),
        ("closed", {"itl_seconds": 0.009}, {"TPOT p50", "TPOT mean"}),
        ("cold", {"load_seconds": 0.230}, {"cold TTFT p50", "cold TTFT mean", "cold TTFT - warm TTFT"}),
        ("cold", {"num_slots": 2}, {"cold by the replies", "TTFT p50"}),
        ("errors", {"error_rate": 0.0}, {"refused"}),
        ("errors", {"break_rate": 0.5}, {"broken off"}),
    ],
)
def test_it_fails_when_the_mock_does_something_else(name: str, really: dict[str, Any], failing: set[str]) -> None:
    phase = SHORT[name]()
    report = run_phase(phase, replace(phase.settings, **really))
    assert not report.is_ok
    assert failing <= names_of_failed(report)


def test_one_slow_phase_is_repeated_and_no_wrong_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules of repeating, over reports made up here: what they are of does not matter to them."""
    slow = Check(phase="p", quantity="TTFT", wanted=0.05, measured=0.06, allowed=0.005)
    wrong = Check(phase="p", quantity="refused", wanted=3, measured=4)
    right = Check(phase="p", quantity="TTFT", wanted=0.05, measured=0.051, allowed=0.005)
    coming: list[Check] = []

    def run(phase: Phase, settings: MockSettings) -> PhaseReport:
        return PhaseReport(checks=(coming.pop(0),), mock_late_p99_seconds=0.0)

    monkeypatch.setattr(checking, "run_phase", run)
    phases = (closed_loop(), open_loop())
    for checks, passed in (
        ([right, right], [True, True]),
        ([slow, right, right], [True, True]),
        ([slow, slow, right], [False, True]),
        ([slow, right, slow], [True, False]),
        ([wrong, right], [False, True]),
    ):
        coming[:] = checks
        assert [report.is_ok for report in run_selfcheck(phases)] == passed
        assert coming == []


def test_a_check_is_ok_up_to_what_it_allows() -> None:
    assert Check(phase="", quantity="", wanted=0.05, measured=0.0549, allowed=0.005).is_ok
    assert not Check(phase="", quantity="", wanted=0.05, measured=0.0551, allowed=0.005).is_ok
    assert not Check(phase="", quantity="", wanted=0.05, measured=0.0449, allowed=0.005).is_ok
    assert not Check(phase="", quantity="", wanted=0.0, measured=None).is_ok


def test_percentile() -> None:
    assert percentile_99([]) is None
    assert percentile_99([3.0]) == 3.0
    assert percentile_99(range(1, 101)) == 99
    assert percentile_99(range(1, 202)) == 199


def test_faults_are_counted_as_the_mock_draws_them() -> None:
    refused, broken = errors(num_requests=2000).count_faults()
    assert refused == pytest.approx(400, abs=80)
    assert broken == pytest.approx(320, abs=80)
    assert open_loop().count_faults() == (0, 0)


def test_poisson_times_have_their_rate() -> None:
    times = poisson_times(50.0, 5000, seed=1)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(100, rel=0.05)


def test_waiting_for_a_core_is_noticed() -> None:
    """Bound to one core that another process keeps busy, a busy thread waits about half of the time."""
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this system does not count it")
    cores = os.sched_getaffinity(0)
    core = {min(cores)}
    program = f"import os; os.sched_setaffinity(0, {core}); print('busy', flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as hog:
        assert hog.stdout is not None
        assert hog.stdout.readline()
        os.sched_setaffinity(0, core)
        try:
            with CoreWait() as core_wait:
                end = time.perf_counter() + 0.5
                while time.perf_counter() < end:
                    pass
        finally:
            os.sched_setaffinity(0, cores)
            hog.kill()
    assert core_wait.share is not None
    assert 0.2 < core_wait.share < 1.0
    with CoreWait() as idle:
        time.sleep(0.2)
    assert idle.share is not None
    assert idle.share < core_wait.share


def test_streams_in_flight() -> None:
    def result(started: float, finished: float) -> RequestResult:
        return RequestResult(
            adapter="base",
            scheduled_seconds=started,
            started_seconds=started,
            finished_seconds=finished,
            chunk_seconds=(),
            text="",
            num_prompt_tokens=None,
            num_output_tokens=0,
            finish_reason=None,
            http_status=200,
            error=None,
        )

    assert max_in_flight([result(0, 3), result(1, 2), result(2, 4), result(3, 5)]) == 2
    assert max_in_flight([result(0, 9), result(1, 8), result(2, 7)]) == 3
    assert max_in_flight([]) == 0


def test_many_streams_are_counted_and_timed() -> None:
    report = run_streams(30, seconds=1.9, num_tokens=10)
    assert (report.num_requests, report.num_failed) == (60, 0)  # 30 answers of 950 ms at any time, for two of them
    assert 20 <= report.max_in_flight <= 45
    assert report.tpot_p50_seconds == pytest.approx(0.1, rel=0.05)
    assert 0 < report.cpu_share < 1


def test_where_it_breaks_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(num_streams: int, seconds: float) -> StreamsReport:
        return made_up_report(num_streams, lag_p99_seconds=num_streams * 1e-5)

    monkeypatch.setattr(many_streams, "run_streams", run)
    assert [(report.num_streams, report.is_ok) for report in find_limit(400)] == [(400, True)]
    found = [(report.num_streams, report.is_ok) for report in find_limit(1000)]
    assert found == [(1000, False), (750, False), (500, False), (250, True)]
    assert [report.is_ok for report in find_limit(4000)] == [False] * 4


def test_fewer_streams_than_asked_for_prove_nothing() -> None:
    assert made_up_report(100).is_ok
    assert not msgspec.structs.replace(made_up_report(100), max_in_flight=80).is_ok


def made_up_report(num_streams: int, lag_p99_seconds: float = 0.0) -> StreamsReport:
    return StreamsReport(
        num_streams=num_streams,
        max_in_flight=num_streams,
        num_requests=num_streams,
        num_failed=0,
        lag_p99_seconds=lag_p99_seconds,
        loop_lag_p99_seconds=0.0,
        cpu_share=0.1,
        core_wait_share=None,
        mock_late_p99_seconds=0.0,
        ttft_p50_seconds=0.05,
        tpot_p50_seconds=None,
    )


def invoke(*options: str) -> tuple[int, list[str]]:
    application = typer.Typer()
    application.command()(command.selfcheck)
    result = CliRunner().invoke(application, list(options), env={"COLUMNS": "120"})
    return result.exit_code, result.stdout.splitlines()


@pytest.mark.parametrize("exit_code", [0, 1])
def test_the_command_says_so_in_its_exit_code_and_last_line(monkeypatch: pytest.MonkeyPatch, exit_code: int) -> None:
    measured = 0.07 if exit_code else 0.051
    time_check = Check(phase="open loop", quantity="TTFT p50", wanted=0.05, measured=measured, allowed=0.005)
    count_check = Check(phase="open loop", quantity="requests", wanted=25, measured=25)
    report = PhaseReport(checks=(time_check, count_check), mock_late_p99_seconds=0.001, was_repeated=True)
    monkeypatch.setattr(checking, "run_selfcheck", lambda on_phase: (report,))
    code, lines = invoke()
    assert code == exit_code
    summary = json.loads(lines[-1])
    assert summary["selfcheck"] == ("failed" if exit_code else "passed")
    assert [(check["measured"], check["is_ok"]) for check in summary["checks"]] == [
        (measured, not exit_code),
        (25, True),
    ]
    assert any("TTFT p50" in line and "50.00 ms" in line for line in lines)
    assert any("OFF" in line for line in lines) == bool(exit_code)
    assert any("repeated once" in line for line in lines)
    assert len(invoke("--json-only")[1]) == 1


def test_the_command_says_where_streams_break(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = made_up_report(750), made_up_report(1000, lag_p99_seconds=0.02)
    monkeypatch.setattr(many_streams, "find_limit", lambda number, seconds, on_load: (bad, good))
    code, lines = invoke("--streams", "1000")
    assert code == 1
    assert "It breaks between 750 and 1000 streams." in lines
    assert [load["is_ok"] for load in json.loads(lines[-1])["loads"]] == [False, True]
    monkeypatch.setattr(many_streams, "find_limit", lambda number, seconds, on_load: (good,))
    assert invoke("--streams", "750")[0] == 0
