"""`heddle`: the command line. A command's module is imported when it is used, so that --help is quick."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

# In the order of --help. A module's `app` has the command, whose help begins with these words.
COMMANDS = {
    "serve": ("heddle_server.commands.serve", "Serve MODEL and its adapters over an OpenAI-compatible API."),
    "demo": ("heddle_demo.command", "Serve the embedded base, with a tour of its adapters."),
    "chat": ("heddle_server.commands.chat", "Talk with a running server in the terminal."),
    "adapters": ("heddle_server.adapters_cli", "Push, list, show, alias, pin and remove a server's adapters."),
    "keys": ("heddle_server.keys_cli", "Create, list and revoke API keys, and limit tenants."),
    "top": ("heddle_server.commands.top", "Watch what a running server holds in memory and does."),
    "doctor": ("heddle_server.commands.doctor", "Check this machine, or that a running server keeps adapters apart."),
    "estimate": ("heddle_server.commands.estimate", "Say what of MODEL, adapters and contexts fits into memory."),
    "bench": ("heddle_server.bench_cli", "Measure, on this machine."),
}


class CommandsByName(Mapping[str, Any]):
    """Each command, imported when it is asked for."""

    def __getitem__(self, name: str) -> Any:
        module, _ = COMMANDS[name]
        holder = typer.Typer(rich_markup_mode=None)
        holder.add_typer(import_module(module).app)
        return typer.main.get_group(holder).commands[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class LazyGroup(TyperGroup):
    """Lists its commands from the table, without importing one."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = CommandsByName()  # type: ignore[assignment]  # nothing is ever added

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, words) for name, (_, words) in COMMANDS.items()])


app = typer.Typer(
    name="heddle",
    cls=LazyGroup,
    help="One 4-bit base model, a different adapter for every request of a batch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # its tables cut long options off on a terminal of 80 columns
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from heddle_server.version import heddle_version

        typer.echo(f"heddle {heddle_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""


def main() -> None:
    """The entry point of the `heddle` command."""
    app()
