"""Which adapters are on the device: asked for, loading, resident, idle. Policy only, without torch.

A loader thread reads and packs; the engine's thread places what has been packed between two steps. Two requests for
one adapter are one load. An adapter in use is never taken away; an idle one gives way when the pool is short.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from heddle_adapters.errors import AdapterError
from heddle_adapters.page_pool import PagePool
from heddle_adapters.run_allocator import OutOfSpace

if TYPE_CHECKING:  # device_rows needs torch; this file does not
    from heddle_adapters.device_rows import DeviceRows, PackedAdapter, PlacedAdapter


class AdapterTooLarge(AdapterError):
    """The adapter needs more pages than the whole pool has."""


@dataclass
class Resident:
    """An adapter on the device."""

    placed: PlacedAdapter
    references: int = 0  # running requests that use it
    last_used: float = 0.0


class Residency:
    """Adapters by content digest. Called from the engine's thread only."""

    def __init__(
        self,
        load: Callable[[str], PackedAdapter],
        rows: DeviceRows,
        pool: PagePool,
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        """`load` runs in the loader thread; `on_loaded` is called there when a load has ended, to wake the engine."""
        self._load = load
        self._rows = rows
        self._pool = pool
        self._on_loaded = on_loaded
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-loader")
        self._loading: dict[str, Future[PackedAdapter]] = {}
        self._resident: dict[str, Resident] = {}
        self._forgotten: set[str] = set()  # to be removed as soon as nobody uses it
        self.num_loads = 0
        self.num_evictions = 0
        pool.add_reclaimer(self)

    @property
    def num_resident(self) -> int:
        return len(self._resident)

    @property
    def num_pages(self) -> int:
        return sum(resident.placed.num_pages for resident in self._resident.values())

    @property
    def num_idle_pages(self) -> int:
        return sum(r.placed.num_pages for r in self._resident.values() if r.references == 0)

    def acquire(self, digest: str) -> int | None:
        """The adapter's slot, with one reference taken; None while it is being loaded.

        Raises OutOfSpace while it is loaded but the pool is full of things in use, and what the load raised, once: the
        next request tries again.
        """
        if (resident := self._resident.get(digest)) is not None:
            resident.references += 1
            return resident.placed.slot
        future = self._loading.get(digest)
        if future is None:
            self.prefetch(digest)
        elif future.done():
            return self._place(digest, future)
        return None

    def prefetch(self, digest: str) -> None:
        """Start loading, unless it is resident or on its way."""
        if digest in self._resident or digest in self._loading:
            return
        future = self._loader.submit(self._load, digest)
        self._loading[digest] = future
        future.add_done_callback(lambda _: self._on_loaded())

    def abandon(self, digest: str) -> None:
        """Nobody waits for it any more: let go of what has been or would be loaded."""
        if (future := self._loading.pop(digest, None)) is not None:
            future.cancel()

    def release(self, digest: str) -> None:
        """One running request less uses it."""
        resident = self._resident[digest]
        assert resident.references > 0, f"{digest} released more often than acquired"
        resident.references -= 1
        resident.last_used = time.monotonic()
        if resident.references == 0 and digest in self._forgotten:
            self._remove(digest)

    def forget(self, digest: str) -> None:
        """Remove it now if nobody uses it, else when the last request lets go."""
        self.abandon(digest)
        if (resident := self._resident.get(digest)) is None:
            return
        if resident.references == 0:
            self._remove(digest)
        else:
            self._forgotten.add(digest)

    def oldest_idle(self) -> float | None:
        return min((r.last_used for r in self._resident.values() if r.references == 0), default=None)

    def reclaim_oldest(self) -> None:
        idle = [(resident.last_used, digest) for digest, resident in self._resident.items() if not resident.references]
        self._remove(min(idle)[1])
        self.num_evictions += 1

    def check_integrity(self) -> None:
        """Every resident adapter's pages are held exactly once, by it."""
        for digest, resident in self._resident.items():
            for first, length in resident.placed.run_pages:
                for page in range(first, first + length):
                    assert self._pool.references(page) == 1, f"page {page} of {digest} is shared or free"

    def close(self) -> None:
        self._loader.shutdown(wait=False, cancel_futures=True)

    def _place(self, digest: str, future: Future[PackedAdapter]) -> int:
        """Bring a finished load into the pool."""
        try:
            packed = future.result()
            if packed.num_pages > self._pool.num_pages:
                raise AdapterTooLarge(
                    f"The adapter needs {packed.num_pages} pages; the whole pool has {self._pool.num_pages}. "
                    "Start the server with a larger --pool-bytes."
                )
            placed = self._rows.place(packed)
        except OutOfSpace:
            raise  # it stays loaded, for when there is room
        except Exception:
            del self._loading[digest]
            raise
        del self._loading[digest]
        self._forgotten.discard(digest)
        self._resident[digest] = Resident(placed, references=1)
        self.num_loads += 1
        return placed.slot

    def _remove(self, digest: str) -> None:
        self._rows.remove(self._resident.pop(digest).placed)
        self._forgotten.discard(digest)
