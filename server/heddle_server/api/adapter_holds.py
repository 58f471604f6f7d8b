"""Which adapter content requests are using: bound at admission, let go at the end, collected after the last."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress

from heddle_adapters.store import AdapterStore
from heddle_adapters.store_index import AdapterVersion

log = logging.getLogger(__name__)


class AdapterHolds:
    """Between the store, which keeps content while it is named or held, and the engine, which may drop it then."""

    def __init__(self, store: AdapterStore, worker: Executor, forget: Callable[[str], None]) -> None:
        self._store = store
        self._worker = worker  # where the disk is waited for
        self._forget = forget  # called with each digest whose content is gone

    def bind(self, name: str) -> AdapterVersion:
        """The version `name` means now, held until `release`."""
        return self._store.acquire(name)

    def release(self, adapter: AdapterVersion | None) -> None:
        """One request is through with `adapter`; None, the base, is never held."""
        if adapter is not None and self._store.release(adapter.digest):
            self.collect_soon()

    def collect_soon(self) -> None:
        """Removes, when the disk has time, what no name means and no request holds."""
        # While the server closes the worker is gone; the next start collects.
        with suppress(RuntimeError):
            collecting = asyncio.get_running_loop().run_in_executor(self._worker, self._store.collect)
            collecting.add_done_callback(self._forget_collected)

    def _forget_collected(self, collecting: asyncio.Future[tuple[str, ...]]) -> None:
        if collecting.cancelled():
            return
        if error := collecting.exception():
            log.error("Removing adapter content failed: %s", error)
            return
        for digest in collecting.result():
            self._forget(digest)
