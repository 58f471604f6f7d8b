"""Options that several commands have, and what they are called where an error means them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from heddle_loadtest.client.style import Style
from heddle_loadtest.errors import LoadTestError

TargetUrl = Annotated[
    str, typer.Option("--target", help="Base URL of the server, for example http://127.0.0.1:8000.", show_default=False)
]
StyleName = Annotated[Style, typer.Option("--style", help="How the server wants its adapters named.")]
Model = Annotated[str | None, typer.Option("--model", help="The base model; the first the target lists if not given.")]
ApiKey = Annotated[str | None, typer.Option("--api-key", help="Sent as a bearer token.", envvar="HEDDLE_API_KEY")]
Timeout = Annotated[str, typer.Option("--timeout", help="Time for one request, from start to end.")]
Variant = Annotated[str | None, typer.Option("--variant", help="A variant that the workload names.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="A key of the workload, as arrivals.rate=20; may be repeated.")
]
AdapterFiles = Annotated[
    Path | None,
    typer.Option("--adapter-files", help="A folder in PEFT's form for each adapter that the target may lack."),
]
JsonOnly = Annotated[bool, typer.Option("--json-only", help="Print the JSON line alone.")]

OPTION_NAMES = {  # field of a LoadTestError -> option; other fields are keys of the workload
    "target": "--target",
    "style": "--style",
    "model": "--model",
    "api_key": "--api-key",
    "timeout_seconds": "--timeout",
    "seed": "--seed",
    "variant": "--variant",
    "set": "--set",
    "adapter_files": "--adapter-files",
}


def say(error: LoadTestError, names: dict[str, str]) -> None:
    """What is wrong, on standard error, by the option's name."""
    typer.echo(f"error: {error.describe(names.get(error.field, error.field))}", err=True)
