"""`heddle adapters combine`: several adapters in one upload, which act together."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated

import typer

from heddle_server.commands.adapter_folder import check_folder
from heddle_server.commands.failure import as_one_line

_NAMED = re.compile(r"(?P<name>[^=/]+)=(?P<folder>.+)", re.DOTALL)


def parse_part(text: str) -> tuple[str, Path]:
    """Name and folder of "NAME=DIR"; of "DIR" the name is the folder's, made fit to be one."""
    folder = Path(text)
    named = _NAMED.fullmatch(text)
    if named is not None and not folder.is_dir():
        return named["name"], Path(named["folder"])
    return re.sub(r"[^a-z0-9_-]+", "-", folder.resolve().name.lower()).lstrip("-_")[:32], folder


def parse_gate(text: str) -> tuple[str, float]:
    """Name and factor of "NAME=0.5"."""
    name, _, number = text.partition("=")
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor):
        raise typer.BadParameter(f"--gate is {text!r}; write a part's name and a number, for example sql=0.5.")
    return name, factor


def combine_command(
    parts: Annotated[
        list[str],
        typer.Argument(metavar="DIR", help="Folders that save_pretrained wrote; NAME=DIR names a part itself."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the new adapter.")],
    gate: Annotated[
        list[str] | None,
        typer.Option("--gate", metavar="NAME=NUMBER", help="Multiplies what that part adds. May be given more often."),
    ] = None,
) -> None:
    """Put several adapters, of any methods, into one that a server takes in one upload.

    They act together in every request that names it. No tensor is changed, and no server is asked; whether they fit a
    base and may act together there shows when the new adapter is pushed.
    """
    from heddle_adapters.combine import combine
    from heddle_adapters.errors import AdapterError

    named = [parse_part(part) for part in parts]
    for _, folder in named:
        check_folder(folder)
    if out.exists():
        raise typer.BadParameter(f"--out: {out} exists already; give a new folder.")
    gates = dict(map(parse_gate, gate or []))
    if unknown := gates.keys() - {name for name, _ in named}:
        names = ", ".join(name for name, _ in named)
        raise typer.BadParameter(f"--gate names {', '.join(sorted(unknown))}, and the parts are {names}.")
    with as_one_line(AdapterError, OSError, status=2):
        content = combine([(name, gates.get(name, 1.0), folder) for name, folder in named], out)
    typer.echo(f"{out} has {content.method.label}, {len(content.file.tensors)} tensors")
    typer.echo(f"upload it: heddle adapters push {out}")
