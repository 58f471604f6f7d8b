"""Brings adapters nearer to the device, beside the engine's own thread.

From disk to host memory in reader threads, which let the compile worker make the rows first if there are none; from
host memory to the device in a copier thread. So a slow disk holds up neither a copy nor a step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from heddle_adapters.errors import StoreUnusable
from heddle_adapters.packed_adapter import PackedAdapter
from heddle_adapters.row_compiler import RowCompiler
from heddle_adapters.rows_file import RowsDamaged, read_rows

if TYPE_CHECKING:  # device_rows needs torch; this file does not
    from heddle_adapters.device_rows import DeviceRows, PageMap

log = logging.getLogger(__name__)

NUM_READERS = 2  # one may wait for a slow file while the other goes on


class AdapterLoader:
    """Its methods return at once and may be called from any thread; `on_done` is called when something has ended."""

    def __init__(self, compiler: RowCompiler, rows: DeviceRows, on_done: Callable[[], None]) -> None:
        self._compiler = compiler
        self._rows = rows
        self._on_done = on_done
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="adapter-reader")
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="adapter-copier")

    def prepare(self, digest: str) -> None:
        """Compile an adapter's rows when there is time; a failure shows when it is read."""
        self._readers.submit(self._compiler.compile, digest, urgent=False)  # it looks at the disk

    def read(self, digest: str) -> Future[PackedAdapter]:
        """The adapter in host memory, proven to be what was stored; fails with an `AdapterError`."""
        read: Future[PackedAdapter] = Future()
        read.add_done_callback(lambda _: self._on_done())
        self._readers.submit(self._read, digest, read)
        return read

    def copy(self, packed: PackedAdapter, page_map: PageMap) -> Future[None]:
        """Done when every byte is on the device."""
        copied = self._copier.submit(self._rows.copy, packed, page_map)
        copied.add_done_callback(lambda _: self._on_done())
        return copied

    def forget(self, digest: str) -> None:
        """Remove the compiled rows of content that is gone."""
        self._readers.submit(self._compiler.forget, digest)

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._copier.shutdown(wait=True, cancel_futures=True)  # a copy under way writes to the pool
        self._compiler.close()

    def _read(self, digest: str, read: Future[PackedAdapter]) -> None:
        """A reader's first attempt: what is not compiled, or damaged, is compiled and read again."""
        if not read.set_running_or_notify_cancel():
            return
        try:
            if (packed := self._read_cached(digest)) is not None:
                read.set_result(packed)
                return
            compiled = self._compiler.compile(digest, urgent=True)
        except Exception as error:  # whoever waits must hear of it, whatever it is
            read.set_exception(error)
            return
        compiled.add_done_callback(lambda done: self._read_compiled(digest, read, done))

    def _read_cached(self, digest: str) -> PackedAdapter | None:
        """From the rows file; None without one, and where it is damaged, having removed it."""
        if not self._compiler.is_compiled(digest):
            return None
        try:
            return self._open(digest)
        except RowsDamaged as error:
            log.warning("compiled rows are made again: %s", error)
            self._compiler.forget(digest)
            return None

    def _read_compiled(self, digest: str, read: Future[PackedAdapter], compiled: Future[None]) -> None:
        try:
            compiled.result()
            self._readers.submit(self._read_again, digest, read)
        except Exception as error:
            read.set_exception(error)

    def _read_again(self, digest: str, read: Future[PackedAdapter]) -> None:
        try:
            read.set_result(self._open(digest))
        except RowsDamaged as error:
            read.set_exception(StoreUnusable(f"The adapter's rows cannot be read: {error}.", param="adapter"))
        except Exception as error:
            read.set_exception(error)

    def _open(self, digest: str) -> PackedAdapter:
        return read_rows(self._compiler.rows_path(digest), digest, self._rows.allocate_host)
