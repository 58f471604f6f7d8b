"""`heddle doctor`"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from heddle_server.commands.failure import as_one_line
from heddle_server.commands.server_flags import DEFAULT_SERVER, ApiKey, ServerUrl
from heddle_server.options import ServeOptions
from heddle_server.serve_flags import with_serve_options
from heddle_server.server_address import ServerError

if TYPE_CHECKING:
    from heddle_server.doctor.check import Check

app = typer.Typer()


@app.command("doctor")
@with_serve_options("device", "dtype", "kernels", "store", "host", "port")
def doctor_command(
    options: ServeOptions,
    isolation: Annotated[
        bool, typer.Option("--isolation", help="Ask a running server's adapters alone and all at once, and compare.")
    ] = False,
    server: ServerUrl = DEFAULT_SERVER,
    api_key: ApiKey = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME", help="With --isolation: this one (default: all on the device)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every finding, as JSON.")] = False,
) -> None:
    """Check this machine, or that a running server keeps adapters apart.

    Status 1 when something failed, so that scripts can ask too.
    """
    if adapter and not isolation:
        raise typer.BadParameter("--adapter belongs to --isolation.")
    with as_one_line(ServerError, status=1):
        checks = _isolation(server, api_key, adapter or []) if isolation else _machine(options)
        done = list(checks) if as_json else _print(checks)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(check) for check in done], indent=2))
    if any(check.status == "FAIL" for check in done):
        raise typer.Exit(1)


def _machine(options: ServeOptions) -> Iterator[Check]:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it regrets the absence of a hub client
    import torch

    from heddle_server.config import ConfigError
    from heddle_server.doctor import machine
    from heddle_server.doctor.check import Check
    from heddle_server.doctor.numerics import check_operations
    from heddle_server.engine.model_loader import DTYPES, choose_device

    try:
        device = choose_device(options.device)
    except ConfigError as error:
        yield Check("device", "FAIL", str(error), "Leave --device out, or install torch's CUDA build.")
        device = torch.device("cpu")
    else:
        yield machine.check_device(device)
    yield from machine.check_packages(device)
    dtype = DTYPES.get(options.dtype, torch.bfloat16)  # auto is the checkpoint's own, and most are bfloat16
    kernels, finding = machine.choose_kernels(device, dtype, options.kernels)
    yield finding
    if kernels is not None:
        yield from check_operations(kernels.ops, device, dtype)
    yield from machine.check_memory(device)
    yield machine.check_store(options.store)
    yield machine.check_port(options)
    yield machine.check_model_cache()


def _isolation(server: str, api_key: str | None, adapters: list[str]) -> list[Check]:
    from heddle_server.doctor.isolation import check_isolation
    from heddle_server.server_client import ServerClient

    return check_isolation(ServerClient(server, api_key), adapters).checks()


def _print(checks: Iterator[Check] | list[Check]) -> list[Check]:
    from rich.console import Console

    from heddle_server.doctor.report import print_checks

    return print_checks(checks, Console(markup=False, highlight=False))
