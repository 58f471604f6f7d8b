"""A summary on standard output: tables for people, then one JSON line for scripts. Computes nothing."""

import json

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from heddle_loadtest.distribution import Distribution
from heddle_loadtest.summary import Row, Summary


def print_summary(summary: Summary, *, json_only: bool = False) -> None:
    """Prints the tables, unless `json_only`, and the JSON line, which is always the last line."""
    if not json_only:
        print_tables(summary, Console())
    print(json.dumps(summary.to_json()), flush=True)


def print_tables(summary: Summary, console: Console) -> None:
    """Prints what people read of a run."""
    console.print(Text(_headline(summary), style="bold"))
    console.print(_latency_table(summary.total))
    console.print(_adapter_table(summary))
    if summary.errors:
        console.print(_error_table(summary))


def _headline(summary: Summary) -> str:
    total = summary.total
    interrupted = " (interrupted)" if summary.was_interrupted else ""
    return (
        f"{total.num_ok} ok, {total.num_failed} failed in {summary.elapsed_seconds:.1f} s{interrupted}: "
        f"{total.output_tokens_per_second:.1f} tokens/s, {total.requests_per_second:.2f} requests/s"
    )


def _latency_table(total: Row) -> Table:
    table = Table("milliseconds", box=SIMPLE_HEAD)
    for heading in ("mean", "p50", "p90", "p99", "max"):
        table.add_column(heading, justify="right")
    distributions = {
        "time to first token": total.ttft_seconds,
        "time per output token": total.tpot_seconds,
        "between tokens": total.inter_token_seconds,
        "end to end": total.end_to_end_seconds,
    }
    for name, values in distributions.items():
        cells = (values.mean, values.p50, values.p90, values.p99, values.max) if values else (None,) * 5
        table.add_row(name, *(_milliseconds(seconds) for seconds in cells))
    return table


def _adapter_table(summary: Summary) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("adapter", overflow="fold")  # a name cut short would be a name unknown
    for heading in ("ok", "failed", "tokens/s", "TTFT\np50 ms", "TTFT\np99 ms", "TPOT\np50 ms", "TPOT\np99 ms"):
        table.add_column(heading, justify="right")
    for name, row in summary.adapters.items():
        table.add_row(
            Text(name),
            str(row.num_ok),
            str(row.num_failed),
            f"{row.output_tokens_per_second:.1f}",
            *_p50_and_p99(row.ttft_seconds),
            *_p50_and_p99(row.tpot_seconds),
        )
    return table


def _error_table(summary: Summary) -> Table:
    table = Table("error", "count", "first message", box=SIMPLE_HEAD)
    for code, count in summary.errors.items():
        table.add_row(Text(code, style="red"), str(count), Text(summary.error_examples[code]))
    return table


def _p50_and_p99(values: Distribution | None) -> tuple[str, str]:
    return (_milliseconds(values.p50), _milliseconds(values.p99)) if values else ("-", "-")


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"
