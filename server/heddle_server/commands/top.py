"""`heddle top`"""

from __future__ import annotations

from typing import Annotated

import typer

from heddle_server.commands.failure import as_one_line
from heddle_server.commands.server_flags import DEFAULT_SERVER, ApiKey, ServerUrl
from heddle_server.server_address import ServerError
from heddle_server.top import run_top

app = typer.Typer()


@app.command("top")
def top_command(
    server: ServerUrl = DEFAULT_SERVER,
    api_key: ApiKey = None,
    interval: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
) -> None:
    """Watch what a running server holds in memory and does."""
    with as_one_line(ServerError, status=1):
        run_top(server, interval, once, api_key=api_key)
