"""`heddle estimate`"""

from __future__ import annotations

import json
import logging
from typing import Annotated, Literal

import typer

from heddle_server.commands.failure import as_one_line
from heddle_server.config import ConfigError
from heddle_server.options import ServeOptions
from heddle_server.serve_flags import with_serve_options
from heddle_server.sizes import parse_size

app = typer.Typer()

Targets = Literal["all", "attention"]
SETTINGS = ("quantization", "double_quantization", "base_cache", "kernels", "dtype", "device")
POOL = ("pool_bytes", "memory_fraction")


def as_size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command("estimate")
@with_serve_options(*SETTINGS, *POOL)
def estimate_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory with a config.json, or hub id.")],
    options: ServeOptions,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Of every adapter.")] = 16,
    adapters: Annotated[int, typer.Option("--adapters", min=0, help="How many.")] = 100,
    context: Annotated[
        int | None, typer.Option("--context", min=2, help="Tokens of one request (default: the model's, 8192 at most).")
    ] = None,
    targets: Annotated[Targets, typer.Option("--targets", help="All linears, or those of attention.")] = "all",
    memory: Annotated[
        int | None,
        typer.Option("--memory", parser=as_size, metavar="SIZE", help="Of the device (default: what is free here)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All numbers, as JSON.")] = False,
) -> None:
    """Say what of MODEL, adapters and contexts fits into memory.

    From its config.json alone: no weights are needed, and nothing is computed.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it regrets the absence of a hub client
    from heddle_server.estimate.capacity import Wanted, estimate
    from heddle_server.estimate.table import as_table

    # Of a hub id only the description is fetched, and no adapter is registered.
    options = options.model_copy(update={"load_format": "dummy", "adapters": None})
    with as_one_line(ConfigError, status=2):
        config = options.config(model).engine
        result = estimate(config, Wanted(rank, adapters, context, targets), memory)
    if as_json:
        typer.echo(json.dumps(result.as_json(), indent=2))
    else:
        from rich.console import Console

        Console(markup=False, highlight=False).print(as_table(model, result))
