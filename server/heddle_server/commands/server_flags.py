"""The options of commands that ask a running server."""

from __future__ import annotations

from typing import Annotated

import typer

DEFAULT_SERVER = "http://127.0.0.1:8000"

ServerUrl = Annotated[
    str, typer.Option("--server", metavar="URL", envvar="HEDDLE_SERVER", help="Address of the running server.")
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar="HEDDLE_API_KEY",
        help="Sent as a bearer token; better in HEDDLE_API_KEY, where no process list shows it.",
    ),
]
