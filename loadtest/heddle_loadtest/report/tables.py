"""A summary on standard output: tables for people, then one JSON line for scripts. Computes nothing."""

import json

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from heddle_loadtest.measure.summary import Summary
from heddle_loadtest.report.sheets import Sheet, headline, sentences_of, sheets_of

_MAX_ROWS = 12  # of adapters; the page and the JSON line have more
_MAX_CHARACTERS = 400  # of a cell or sentence


def print_summary(summary: Summary, *, json_only: bool = False) -> None:
    """Prints the tables, unless `json_only`, and the JSON line, which is always the last line."""
    if not json_only:
        print_tables(summary, Console())
    print(json.dumps(summary.to_json()), flush=True)


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
    """Names and messages come from the target: none may steer the terminal, nor fill it with a whole error page."""
    if len(text) > _MAX_CHARACTERS:
        text = text[: _MAX_CHARACTERS - 1] + "…"
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
