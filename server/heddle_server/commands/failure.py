"""How a command ends when it cannot do what was asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def as_one_line(*errors: type[Exception], status: int) -> Iterator[None]:
    """These errors end the command with this status and their message, not with a traceback."""
    try:
        yield
    except errors as error:
        typer.secho(f"heddle: {error}", fg="red", err=True)
        raise typer.Exit(status) from None
