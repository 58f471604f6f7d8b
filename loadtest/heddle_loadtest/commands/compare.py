"""`heddle-loadtest compare`: two result folders to a table, a verdict and a JSON line. Computes nothing.

Exit codes: 0 no condition failed, 1 one did, 2 a folder or a condition cannot be read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from heddle_loadtest.measure.compare import Comparison, MetricChange
    from heddle_loadtest.measure.conditions import ConditionResult


def compare(
    a: Annotated[Path, typer.Argument(help="Result folder of the run to measure against.")],
    b: Annotated[Path, typer.Argument(help="Result folder of the run in question.")],
    fail_if: Annotated[
        list[str] | None,
        typer.Option(help="Exit with 1 if so, as ttft_p99>+10% or error_rate>+1%; may be repeated, or have commas."),
    ] = None,
    json_only: Annotated[bool, typer.Option("--json-only", help="Print the JSON line alone.")] = False,
) -> None:
    """Say how run B differs from run A, and whether chance could explain it.

    A condition fails only if the change is beyond its limit and significant, so give both runs three repeats or more.
    Latencies and rates change in percent, goodput and error_rate in points of a hundred.
    """
    from heddle_loadtest.errors import LoadTestError
    from heddle_loadtest.measure.compare import compare as compare_runs
    from heddle_loadtest.measure.conditions import judge, parse_conditions
    from heddle_loadtest.report.folder import read_run

    try:
        conditions = parse_conditions(fail_if or ())
        comparison = compare_runs(read_run(a), read_run(b))
        results = [judge(comparison, condition) for condition in conditions]
    except LoadTestError as error:
        typer.echo(f"error: {error.describe('--fail-if' if error.field == 'fail_if' else error.field)}", err=True)
        raise typer.Exit(2) from None
    has_failed = any(result.answer == "fails" for result in results)
    if not json_only:
        _print(comparison, results)
    document = {
        **comparison.to_json(),
        "conditions": [result.to_json() for result in results],
        "has_failed": has_failed,
    }
    print(json.dumps(document), flush=True)
    raise typer.Exit(1 if has_failed else 0)


def _print(comparison: Comparison, results: Sequence[ConditionResult]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(Text(f"A is {comparison.name_a}, B is {comparison.name_b}", style="bold"))
    console.print(_table(comparison))
    for warning in comparison.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))
    for result in results:
        console.print(Text(f"{result.condition.text} {result.answer}: {result.sentence}"))
    console.print(Text(verdict_line(comparison), style="bold"))


def verdict_line(comparison: Comparison) -> str:
    """The comparison in one sentence."""
    named = {
        verdict: [name for name, change in comparison.metrics.items() if change.verdict == verdict]
        for verdict in ("worse", "better")
    }
    parts = [f"{verdict} in {', '.join(names)}" for verdict, names in named.items() if names]
    return f"B is {' and '.join(parts)}." if parts else "No difference between A and B is shown."


def _table(comparison: Comparison) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("metric", no_wrap=True)  # as --fail-if takes it
    for heading in ("A", "B", "change", "95 %\ninterval"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", min_width=10)
    for change in comparison.metrics.values():
        if change.a is not None or change.b is not None:
            table.add_row(
                _title(change), _value(change, change.a), _value(change, change.b), *_change(change), change.verdict
            )
    return table


def _title(change: MetricChange) -> str:
    if change.is_share:
        return f"{change.metric}, %"
    return change.metric if change.metric.endswith("_per_second") else f"{change.metric}, ms"


def _value(change: MetricChange, value: float | None) -> str:
    if value is None:
        return "-"
    if change.is_share:
        return f"{value * 100:.2f}"
    return f"{value:.2f}" if change.metric.endswith("_per_second") else f"{value * 1000:.1f}"


def _change(change: MetricChange) -> tuple[str, str]:
    """The change and its interval, in percent or points."""
    if change.change is None:
        return "-", "-"
    unit = "pt" if change.is_share else "%"
    if change.interval is None:
        return f"{change.change * 100:+.1f} {unit}", "-"
    low, high = change.interval.low * 100, change.interval.high * 100
    return f"{change.change * 100:+.1f} {unit}", f"{low:+.1f} to {high:+.1f}"
