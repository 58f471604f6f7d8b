"""`heddle demo`: the server over the embedded base, a tour of it, and then whatever the user likes."""

from __future__ import annotations

import sys
import tempfile
import webbrowser
from pathlib import Path

from rich.console import Console

from heddle_demo.data import BASE_DIR, BASE_NAME
from heddle_demo.tour import say_where_to_look, take_tour
from heddle_server.api.serving import serve
from heddle_server.audit_log import AuditLog
from heddle_server.config import ConfigError
from heddle_server.key_store import KeyStore
from heddle_server.options import ServeOptions

POOL_BYTES = 64 << 20  # plenty for the embedded base: thousands of tokens and all adapters


def run_demo(options: ServeOptions, *, tour_only: bool, open_browser: bool) -> None:
    """Serve and show. With `tour_only` the process ends after the tour, with status 1 if an answer was wrong.

    Unless a store is named, adapters go to a temporary folder that disappears with the demo. The page opens in a
    browser only where somebody sits at a terminal.
    """
    with tempfile.TemporaryDirectory(prefix="heddle-demo-") as folder:
        chosen = options.model_copy(
            update={
                "model_name": options.model_name or BASE_NAME,
                "pool_bytes": options.pool_bytes or (None if options.memory_fraction else POOL_BYTES),
                "store": options.store if "store" in options.model_fields_set else Path(folder),
            }
        )
        if "store" in options.model_fields_set:
            _check_open(chosen.store.expanduser().resolve())
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


def _check_open(store_path: Path) -> None:
    """Raises `ConfigError` for a store with keys, and `StoreUnusable`."""
    with KeyStore(store_path, AuditLog(store_path)) as keys:
        if keys.has_keys:
            raise ConfigError(
                f"--store is {store_path}, whose server answers nobody without an API key, and the tour has none. Name "
                "another store, or leave it out."
            )
