"""`heddle-loadtest mock`: options to settings, a server until Ctrl-C. Holds no logic of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from heddle_loadtest.duration import read_duration_seconds
from heddle_loadtest.errors import LoadTestError

_OPTION_NAMES = {  # field of a LoadTestError -> option, where it is not simply --field
    "ttft_seconds": "--ttft",
    "itl_seconds": "--itl",
    "load_seconds": "--load-time",
    "jitter_seconds": "--jitter",
    "error_rate": "--error-rate",
    "break_rate": "--break-rate",
    "num_adapters": "--adapters",
    "adapter_name": "--adapter-name",
    "num_slots": "--slots",
}


def mock(
    port: Annotated[int, typer.Option(help="Where to listen on 127.0.0.1; 0 for any free port.")] = 0,
    ttft: Annotated[str, typer.Option(help="Time to the first token, as 50ms or 1s.")] = "50ms",
    itl: Annotated[str, typer.Option(help="Time between tokens.")] = "10ms",
    load_time: Annotated[str, typer.Option(help="Added where an adapter is not on the device.")] = "200ms",
    jitter: Annotated[str, typer.Option(help="Each token up to so much late, at random.")] = "0ms",
    error_rate: Annotated[float, typer.Option(help="Share of requests answered with 503.")] = 0.0,
    break_rate: Annotated[float, typer.Option(help="Share of the others that break off half way.")] = 0.0,
    adapters: Annotated[int, typer.Option(help="How many adapters there are.")] = 100,
    adapter_name: Annotated[
        str, typer.Option(help="What they are called, with the index from 0.")
    ] = "adapter-{index:05d}",
    slots: Annotated[int, typer.Option(help="How many of them the device holds; the least recently used leaves.")] = 8,
    capacity: Annotated[int | None, typer.Option(help="Requests computed at once; any number if not given.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed fails the same requests.")] = 0,
) -> None:
    """A fake server of known speed: to try a load test on, and to check the load generator with.

    Says where it listens in one line, then serves until Ctrl-C.
    """
    import asyncio

    from heddle_loadtest.mock.server import serve
    from heddle_loadtest.mock.settings import MockSettings

    try:
        settings = MockSettings(
            ttft_seconds=read_duration_seconds("ttft_seconds", ttft),
            itl_seconds=read_duration_seconds("itl_seconds", itl),
            load_seconds=read_duration_seconds("load_seconds", load_time),
            jitter_seconds=read_duration_seconds("jitter_seconds", jitter),
            error_rate=error_rate,
            break_rate=break_rate,
            num_adapters=adapters,
            adapter_name=adapter_name,
            num_slots=slots,
            capacity=capacity,
            seed=seed,
            port=port,
        )
        asyncio.run(serve(settings))
    except LoadTestError as error:
        typer.echo(f"error: {error.describe(_OPTION_NAMES.get(error.field, f'--{error.field}'))}", err=True)
        raise typer.Exit(2) from None
