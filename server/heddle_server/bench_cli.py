"""`heddle bench`: measurements that anyone can repeat. What measures is imported when a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="bench", help="Measure, on this machine and the embedded base.", no_args_is_help=True)

Json = Annotated[Path, typer.Option("--json", help="File for everything that was measured.")]


@app.command("adapters")
def adapters_command(
    json: Json = Path("results/bench_adapters.json"),
    quick: Annotated[bool, typer.Option("--quick", help="A small form of a minute: does it work at all?")] = False,
) -> None:
    """What the number of registered adapters costs.

    Throughput, first tokens, hits and loads, up to 2,000 adapters.

    Takes about a quarter of an hour, 10 GiB of disk for temporary files (TMPDIR says where) and 8 GiB of memory.
    """
    from heddle_demo.bench.adapters_bench import run_adapters_bench
    from heddle_demo.bench.machine import TooLittleRoom
    from heddle_demo.bench.server import BenchFailed

    try:
        run_adapters_bench(json, quick=quick)
    except (BenchFailed, TooLittleRoom) as error:
        typer.secho(f"heddle: {error}", fg="red", err=True)
        raise typer.Exit(1) from None


@app.command("eviction")
def eviction_command(
    json: Json = Path("results/bench_eviction.json"),
    served: Annotated[
        bool, typer.Option("--served", help="Confirm it on servers over the embedded base: 4 minutes, 1 GiB of disk.")
    ] = False,
) -> None:
    """Compare the eviction policies by simulation: bytes loaded again per request."""
    from heddle_demo.bench.eviction_bench import run_eviction_bench
    from heddle_demo.bench.machine import TooLittleRoom
    from heddle_demo.bench.served_eviction import confirm_on_servers
    from heddle_demo.bench.server import BenchFailed, end_in_order

    end_in_order()
    try:
        run_eviction_bench(json, confirm=confirm_on_servers if served else None)
    except (BenchFailed, TooLittleRoom) as error:
        typer.secho(f"heddle: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
