"""`heddle`: the command line. Imports the server only when a command needs it, so that --help is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from heddle_server import adapters_cli, bench_cli
from heddle_server.options import ServeOptions, with_serve_options
from heddle_server.version import heddle_version

app = typer.Typer(
    name="heddle",
    help="One 4-bit base model, a different adapter for every request of a batch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # its tables cut long options off on a terminal of 80 columns
)

app.add_typer(adapters_cli.app)
app.add_typer(bench_cli.app)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"heddle {heddle_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""


@app.command("serve")
@with_serve_options
def serve_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or hub id of a transformers causal LM.")],
    options: ServeOptions,
) -> None:
    """Serve MODEL and its adapters over an OpenAI-compatible API.

    Every option is also an environment variable: --pool-bytes is HEDDLE_POOL_BYTES.
    """
    from heddle_server.api.serving import serve

    serve(options.config(model))


@app.command("demo")
@with_serve_options
def demo_command(
    options: ServeOptions,
    tour: Annotated[bool, typer.Option("--tour", help="End after the tour; status 1 if an answer was wrong.")] = False,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the server's page.")] = True,
) -> None:
    """Serve the embedded base, with a tour of its adapters."""
    from heddle_demo.demo import run_demo

    run_demo(options, tour_only=tour, open_browser=browser)


@app.command("top")
def top_command(
    server: adapters_cli.Server = adapters_cli.DEFAULT_SERVER,
    interval: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
) -> None:
    """Watch what a running server holds in memory and does."""
    from heddle_server.adapters_client import ServerError
    from heddle_server.top import run_top

    try:
        run_top(server, interval, once)
    except ServerError as error:
        typer.secho(f"heddle: {error}", fg="red", err=True)
        raise typer.Exit(1) from None


def main() -> None:
    """The entry point of the `heddle` command."""
    app()
