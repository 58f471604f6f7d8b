"""`heddle-loadtest report`: the summary, the page and the plots of a folder, again from its raw files."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="A result folder of `heddle-loadtest run`.")],
    json_only: Annotated[bool, typer.Option("--json-only", help="Print the JSON line alone.")] = False,
) -> None:
    """Make summary, page and plots of a result folder again from its raw files, and print the tables.

    Of a run that was killed, this saves the repeats that were whole.
    """
    from heddle_loadtest.errors import LoadTestError

    try:
        _report(folder, json_only=json_only)
    except LoadTestError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _report(path: Path, *, json_only: bool) -> None:
    from heddle_loadtest.measure.summary import summarize
    from heddle_loadtest.report.folder import ResultFolder, read_outcomes, read_workload
    from heddle_loadtest.report.tables import print_summary
    from heddle_loadtest.report.write import write_report

    summary = summarize(read_workload(path), read_outcomes(path))
    ResultFolder(path).write_summary(summary)
    write_report(path)
    print_summary(summary, json_only=json_only)
