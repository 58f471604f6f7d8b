"""`heddle demo`: the server over the embedded base, a tour of it, and then whatever the user likes."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import webbrowser
from pathlib import Path

from rich.console import Console

from heddle_demo.data import BASE_DIR, BASE_NAME
from heddle_demo.tour import say_where_to_look, take_tour
from heddle_server.api.serving import serve
from heddle_server.options import ServeOptions

POOL_BYTES = 64 << 20  # plenty for the embedded base: thousands of tokens and all adapters


def run_demo(options: ServeOptions, *, tour_only: bool, open_browser: bool) -> None:
    """Serve and show. With `tour_only` the process ends after the tour, with status 1 if an answer was wrong.

    Unless a store is named, adapters go to a temporary folder that disappears with the demo. The page opens in a
    browser only where somebody sits at a terminal.
    """
    with tempfile.TemporaryDirectory(prefix="heddle-demo-") as folder:
        chosen = dataclasses.replace(
            options,
            served_name=options.served_name or BASE_NAME,
            pool_bytes=options.pool_bytes or (None if options.memory_fraction else POOL_BYTES),
            store=Path(folder) if options.store == ServeOptions.store else options.store,
        )
        console = Console()

        async def companion(address: str) -> int | None:
            is_right = await take_tour(address, console)
            if tour_only:
                return 0 if is_right else 1
            say_where_to_look(address, console)
            console.print("\nStill serving; Ctrl-C ends it.")
            if open_browser and sys.stdout.isatty():
                webbrowser.open(address)
            return None

        serve(chosen.config(str(BASE_DIR)), companion=companion)
