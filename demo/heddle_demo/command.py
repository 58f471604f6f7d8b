"""The command `heddle demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from heddle_server.options import ServeOptions
from heddle_server.serve_flags import with_serve_options

app = typer.Typer()


@app.command("demo")
@with_serve_options()
def demo_command(
    options: ServeOptions,
    tour: Annotated[bool, typer.Option("--tour", help="End after the tour; status 1 if an answer was wrong.")] = False,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the server's page.")] = True,
) -> None:
    """Serve the embedded base, with a tour of its adapters."""
    from heddle_demo.demo import run_demo

    run_demo(options, tour_only=tour, open_browser=browser)
