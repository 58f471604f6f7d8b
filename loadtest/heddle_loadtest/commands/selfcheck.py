"""`heddle-loadtest selfcheck`: runs the check, prints its tables and its JSON line. Holds no logic of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from heddle_loadtest.mock.many_streams import StreamsReport
    from heddle_loadtest.mock.selfcheck import Check, PhaseReport


def selfcheck(
    streams: Annotated[
        int | None, typer.Option(help="Check instead that one process keeps up with so many streams at once.", min=1)
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="With --streams: for how long requests arrive; 10 until all streams run.", min=1)
    ] = 30.0,
    json_only: Annotated[bool, typer.Option("--json-only", help="Print the JSON line alone.")] = False,
) -> None:
    """Measures a fake server whose times are known, and fails if what it measures is off.

    TTFT may be off by 5 ms, TPOT by 5 %, requests may be sent 5 ms late; counts must be right. Takes 20 seconds.
    Exit codes: 0 all holds, 1 something is off.
    """
    from rich.console import Console

    console = Console(quiet=json_only, highlight=False)
    is_ok, content = _check_streams(console, streams, seconds) if streams else _check_figures(console)
    typer.echo(json.dumps({"selfcheck": "passed" if is_ok else "failed", **content}))
    raise typer.Exit(0 if is_ok else 1)


def _check_figures(console: Console) -> tuple[bool, dict[str, Any]]:
    import msgspec

    from heddle_loadtest.mock.selfcheck import run_selfcheck

    reports = run_selfcheck(on_phase=lambda name: console.print(f"{name} …"))
    _print_checks(console, reports)
    checks = [{**msgspec.to_builtins(check), "is_ok": check.is_ok} for report in reports for check in report.checks]
    repeated = [report.checks[0].phase for report in reports if report.was_repeated]
    return all(report.is_ok for report in reports), {"repeated": repeated, "checks": checks}


def _check_streams(console: Console, num_streams: int, seconds: float) -> tuple[bool, dict[str, Any]]:
    import msgspec

    from heddle_loadtest.mock.many_streams import find_limit

    reports = find_limit(num_streams, seconds, on_load=lambda number: console.print(f"{number} streams …"))
    _print_streams(console, reports)
    loads = [{**msgspec.to_builtins(report), "is_ok": report.is_ok} for report in reports]
    return reports[0].is_ok, {"streams": num_streams, "loads": loads}


def _print_checks(console: Console, reports: Sequence[PhaseReport]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("phase", "figure", *_right("wanted", "measured", "may differ by"), "", box=SIMPLE_HEAD)
    for report in reports:
        for check in report.checks:
            verdict = "ok" if check.is_ok else "OFF"
            wanted, measured, allowed = (_show(value, check) for value in (check.wanted, check.measured, check.allowed))
            table.add_row(check.phase, check.quantity, wanted, measured, allowed, verdict)
        table.add_section()
    console.print(table)
    for report in reports:
        name = report.checks[0].phase
        if report.was_repeated:
            console.print(f"{name}: times were off, and it was repeated once; the table shows the second pass")
        if not report.is_ok:
            late = f"{report.mock_late_p99_seconds * 1000:.1f} ms"
            waited = _percent(report.core_wait_share)
            console.print(f"{name}: the server's own tokens left {late} late (p99); no core for the client: {waited}")


def _print_streams(console: Console, reports: Sequence[StreamsReport]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("streams at once", *_right(*(str(report.num_streams) for report in reports)), box=SIMPLE_HEAD)
    rows: dict[str, list[str]] = {
        "most of them at once": [str(report.max_in_flight) for report in reports],
        "requests failed": [str(report.num_failed) for report in reports],
        "sent late, p99": [_milliseconds(report.lag_p99_seconds) for report in reports],
        "event loop late, p99": [_milliseconds(report.loop_lag_p99_seconds) for report in reports],
        "server late, p99": [_milliseconds(report.mock_late_p99_seconds) for report in reports],
        "TTFT p50 (set to 50 ms)": [_milliseconds(report.ttft_p50_seconds) for report in reports],
        "TPOT p50 (set to 100 ms)": [_milliseconds(report.tpot_p50_seconds) for report in reports],
        "CPU of the client": [_percent(report.cpu_share) for report in reports],
        "other work had its core": [_percent(report.core_wait_share) for report in reports],
        "sent less than 5 ms late": ["yes" if report.is_ok else "NO" for report in reports],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)
    if not reports[0].is_ok:
        console.print(_where_it_breaks(reports))


def _where_it_breaks(reports: Sequence[StreamsReport]) -> str:
    last = reports[-1]
    if not last.is_ok:
        return f"It breaks at {last.num_streams} streams or before: the client does not keep up."
    return f"It breaks between {last.num_streams} and {reports[-2].num_streams} streams."


def _right(*names: str) -> list[Any]:
    from rich.table import Column

    return [Column(name, justify="right") for name in names]


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.0%}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def _show(value: float | None, check: Check) -> str:
    """Counts as they are, times in milliseconds."""
    if value is None:
        return "nothing"
    return f"{value * 1000:.2f} ms" if check.allowed > 0 else f"{value:.0f}"
