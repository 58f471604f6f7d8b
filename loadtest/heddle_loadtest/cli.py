"""`heddle-loadtest`: the names of its commands. Each is a file of `commands`, which imports what it needs when run."""

from __future__ import annotations

import typer

from heddle_loadtest.commands.adapters import adapters
from heddle_loadtest.commands.baseline import baseline
from heddle_loadtest.commands.compare import compare
from heddle_loadtest.commands.mock import mock
from heddle_loadtest.commands.plan import plan
from heddle_loadtest.commands.report import report
from heddle_loadtest.commands.run import run
from heddle_loadtest.commands.selfcheck import selfcheck
from heddle_loadtest.commands.specs import specs
from heddle_loadtest.commands.sustain import sustain
from heddle_loadtest.commands.trace import trace

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """Put load on any OpenAI-compatible server and see what its users would feel."""


for command in (run, compare, report, sustain, plan, specs, adapters, mock, selfcheck, baseline):
    app.command()(command)
app.add_typer(trace, name="trace")


def main() -> None:
    """The `heddle-loadtest` command."""
    app()
