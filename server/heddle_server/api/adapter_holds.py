"""Which adapter content requests are using: bound at admission, let go at the end, collected after the last."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, suppress

from heddle_adapters.store import AdapterStore
from heddle_adapters.store_index import AdapterVersion
from heddle_server.api.adapter_choice import AdapterChoice, ChosenAdapter
from heddle_server.api.wire_fields import ScaledAdapter
from heddle_server.request import LOCAL_TENANT

log = logging.getLogger(__name__)


class AdapterHolds:
    """Between the store, which keeps content while it is named or held, and the engine, which may drop it then."""

    def __init__(self, store: AdapterStore, worker: Executor, forget: Callable[[str], None]) -> None:
        self._store = store
        self._worker = worker  # where the disk is waited for
        self._forget = forget  # called with each digest whose content is gone
        self._requests: Counter[tuple[str, str]] = Counter()  # that hold an owner's content, by owner and digest

    def bind(self, asked: Sequence[ScaledAdapter], tenant: str = LOCAL_TENANT) -> AdapterChoice:
        """The versions that these references mean to a tenant now, all of them held until `release`, or none.

        Raises `AdapterNotFound`, `AdapterDamaged` and what `AdapterChoice.check` raises.
        """
        with ExitStack() as undo:
            chosen: list[ChosenAdapter] = []
            for each in asked:
                version = self._store.acquire(each.name, tenant)
                self._requests[version.owner, version.digest] += 1
                undo.callback(self._release, version)
                chosen.append(ChosenAdapter(each.name, each.scale, version, tenant, each.rank))
            choice = AdapterChoice(tuple(chosen))
            choice.check()
            undo.pop_all()
        return choice

    def release(self, choice: AdapterChoice) -> None:
        """One request is through with its adapters."""
        for each in choice:
            self._release(each.version)

    def num_requests(self, version: AdapterVersion) -> int:
        """How many requests use an owner's content: not those that have the same from another owner."""
        return self._requests[version.owner, version.digest]

    def collect_soon(self) -> None:
        """Removes, when the disk has time, what no name means and no request holds."""
        # While the server closes the worker is gone; the next start collects.
        with suppress(RuntimeError):
            collecting = asyncio.get_running_loop().run_in_executor(self._worker, self._store.collect)
            collecting.add_done_callback(self._forget_collected)

    def _release(self, version: AdapterVersion) -> None:
        key = (version.owner, version.digest)
        self._requests[key] -= 1
        if not self._requests[key]:
            del self._requests[key]
        if self._store.release(version.digest):
            self.collect_soon()

    def _forget_collected(self, collecting: asyncio.Future[tuple[str, ...]]) -> None:
        if collecting.cancelled():
            return
        if error := collecting.exception():
            log.error("Removing adapter content failed: %s", error)
            return
        for digest in collecting.result():
            self._forget(digest)
