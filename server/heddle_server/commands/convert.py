"""`heddle adapters convert`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert_command(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", exists=True, file_okay=False, help="Folder that another library saved.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the two files of an upload.")],
    first: Annotated[int | None, typer.Option(min=0, help="ReFT: how many of a prompt's first tokens change.")] = None,
    last: Annotated[int | None, typer.Option(min=0, help="ReFT: how many of a prompt's last tokens change.")] = None,
    activation: Annotated[str | None, typer.Option(help="ReFT: its act_fn, if it had one.")] = None,
    intervention: Annotated[
        str | None, typer.Option(metavar="noreft|direft", help="ReFT of the adapters library: which one it is.")
    ] = None,
) -> None:
    """Make an adapter of pyreft, of the adapters library or in a PEFT pickle ready for upload.

    Everything happens on this machine; SRC stays as it is, and OUT must not exist yet.
    """
    from heddle_server.commands.failure import as_one_line
    from heddle_server.convert.choices import Choices
    from heddle_server.convert.conversion import convert_folder
    from heddle_server.convert.source_folder import CannotConvert

    choices = Choices(first=first, last=last, activation=activation, intervention=intervention)
    with as_one_line(CannotConvert, status=1):
        outcome = convert_folder(source, target, choices)
    typer.echo(f"converted to {outcome.method}: {target}")
    for remark in outcome.remarks:
        typer.echo(f"  {remark}")
    typer.echo(f"upload it: heddle adapters push {target}")
