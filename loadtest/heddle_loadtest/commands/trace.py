"""`heddle-loadtest trace make` and `trace show`: options to calls. Holds no logic of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heddle_loadtest.errors import LoadTestError, SpecError

if TYPE_CHECKING:
    from heddle_loadtest.workload.trace import TraceEntry

trace = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Traces of real services: make one that looks like a published one, or see what is in one.",
)


@trace.command()
def make(
    kind: Annotated[str, typer.Argument(help="burstgpt, azure-code, azure-conv or mooncake.")],
    out: Annotated[Path, typer.Option(help="File to write, in the format of the real one.")],
    requests: Annotated[int, typer.Option(help="How many requests.")] = 1000,
    seed: Annotated[int, typer.Option(help="The same seed makes the same trace.")] = 0,
) -> None:
    """Make a trace with the lengths, bursts and shared prompts of a published one, and none of its data.

    Its figures are the last line on standard output, as JSON.
    """
    try:
        _make(kind, out, requests, seed)
    except LoadTestError as error:
        raise _refused(error) from None


@trace.command()
def show(
    file: Annotated[Path, typer.Argument(help="A trace.")],
    format: Annotated[str, typer.Option(help="burstgpt, azure, mooncake, or auto: as its first line looks.")] = "auto",
    requests: Annotated[int | None, typer.Option(help="Read so many requests at most.")] = None,
) -> None:
    """Check a trace and print how many requests it has, how fast they come and how long they are; last as JSON."""
    from heddle_loadtest.workload.trace import read_trace

    try:
        _check_requests(requests)
        _print_figures(file, read_trace(file, format, num_requests=requests))
    except LoadTestError as error:
        raise _refused(error) from None


def _make(kind: str, out: Path, requests: int, seed: int) -> None:
    from heddle_loadtest.workload.look_alike import make_look_alike, write_trace

    _check_requests(requests)
    if seed < 0:
        raise SpecError("seed", seed, "is below 0", "Give 0 or more")
    entries = make_look_alike(kind, requests, seed)
    write_trace(entries, kind.partition("-")[0], out)
    _print_figures(out, entries)


def _check_requests(requests: int | None) -> None:
    if requests is not None and not 1 <= requests <= 10_000_000:
        raise SpecError("requests", requests, "is not from 1 to 10,000,000", "Give a number of requests in between")


def _print_figures(path: Path, entries: Sequence[TraceEntry]) -> None:
    import msgspec

    from heddle_loadtest.workload.trace_figures import trace_figures

    figures = trace_figures(entries)
    typer.echo(f"{path}: {figures.requests:,} requests in {figures.seconds:,.1f} s", nl=False)
    typer.echo("" if figures.rate is None else f", {figures.rate:.3g} a second, cv of the gaps {figures.gap_cv:.2f}")
    for name, lengths in (("prompt", figures.prompt_tokens), ("answer", figures.output_tokens)):
        tail = f"p50 {lengths.p50:,.0f}, p90 {lengths.p90:,.0f}, p99 {lengths.p99:,.0f}, max {lengths.max:,}"
        typer.echo(f"tokens of a {name:6}: mean {lengths.mean:,.0f}, {tail}")
    typer.echo(msgspec.json.encode(figures))


def _refused(error: LoadTestError) -> typer.Exit:
    name = f"--{error.field}" if error.field in ("format", "out", "requests", "seed") else error.field
    typer.echo(f"error: {error.describe(name)}", err=True)
    return typer.Exit(2)
