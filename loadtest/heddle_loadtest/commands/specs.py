"""`heddle-loadtest specs`: the ready-made workloads. Holds no logic."""

from __future__ import annotations

from typing import Annotated

import typer

from heddle_loadtest.errors import LoadTestError


def specs(
    name: Annotated[str | None, typer.Argument(help="Print this one's YAML, to change and run as your own.")] = None,
) -> None:
    """List the workloads that come with heddle-loadtest, each with its variants."""
    from heddle_loadtest.workload.spec_file import read_ready_made

    if name is None:
        _list()
        return
    try:
        typer.echo(read_ready_made(name), nl=False)
    except LoadTestError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _list() -> None:
    from heddle_loadtest.workload.spec_file import list_ready_made, load_workload

    for name in list_ready_made():
        workload = load_workload(name)
        typer.echo(f"{name}\n    {workload.about.partition('. ')[0].rstrip('.')}.")
        if workload.variants:
            typer.echo(f"    --variant {' | '.join(workload.variants)}")
