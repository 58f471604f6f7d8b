"""A summary on standard output: tables for people, then one JSON line for scripts. Computes nothing."""

import json

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from heddle_loadtest.errors import printable
from heddle_loadtest.measure.summary import Summary
from heddle_loadtest.report.sheets import Sheet, headline, sentences_of, sheets_of

_LONG_PARTS = ("adapters", "other_adapters", "tenants", "temperature")  # in summary.json, and with --json-only
_MAX_ROWS = 12  # of adapters; the page and the JSON line have more
_MAX_CHARACTERS = 400  # of a cell or sentence


def print_summary(summary: Summary, *, json_only: bool = False) -> None:
    """Prints the tables, unless `json_only`, and the JSON line, which is always the last line.

    Below tables the line has no single adapters: rows of fifty would push the tables off the screen.
    """
    document = summary.to_json()
    if not json_only:
        print_tables(summary, Console())
        document = {name: value for name, value in document.items() if name not in _LONG_PARTS}
    print(json.dumps(document), flush=True)


def print_tables(summary: Summary, console: Console) -> None:
    """Prints what people read of a run."""
    document = summary.to_json()
    console.print(Text(headline(document), style="bold"))
    for reason in summary.invalid_reasons:
        console.print(Text(f"INVALID: {reason}", style="bold red"))
    for sheet in sheets_of(document, max_rows=_MAX_ROWS):
        console.print(_table(sheet))
        if sheet.note:
            console.print(Text(f"  {sheet.note}\n", style="dim"))
    for sentence in sentences_of(document):
        console.print(Text(_printable(sentence)))
    for warning in summary.warnings:
        console.print(Text(f"Note: {_printable(warning)}", style="yellow"))
    for reason in summary.unpublishable_reasons:
        if reason not in summary.invalid_reasons:
            console.print(Text(f"Not for publication: {reason}", style="yellow"))


def _table(sheet: Sheet) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for index, head in enumerate(sheet.heads):
        if index < sheet.num_text_columns:
            table.add_column(head, overflow="fold", min_width=8)  # a name cut short would be a name unknown
        else:
            table.add_column(head, overflow="fold", justify="right")  # and half a number is another number
    style = "red" if sheet.name == "errors" else ""
    for name, *cells in sheet.rows:
        table.add_row(Text(_printable(name), style=style), *(Text(_printable(cell)) for cell in cells))
    return table


def _printable(text: str) -> str:
    """Not a whole error page either."""
    return printable(text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…")
