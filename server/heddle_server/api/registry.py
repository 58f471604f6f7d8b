"""The adapters of a running server: every change to them, made durable in the store and then told to the engine.

    upload, update, delete, set_alias, ...    awaited by routes; the work is done by the thread that waits for the disk
    engine_is_ready, quarantine               called when the engine says so, on the event loop
    start, close                              from when to when adapters whose time is up are deleted

Nothing here knows HTTP. What the store refuses to write for want of a working disk is `StoreUnusable`.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from heddle_adapters.checkpoint import Checkpoint, read_checkpoint
from heddle_adapters.errors import AdapterError, InvalidAdapterName, StoreUnusable
from heddle_adapters.names import check_name
from heddle_adapters.store import AdapterStore
from heddle_adapters.store_index import AdapterDetails, AdapterRecord, AdapterVersion
from heddle_server.api.adapter_folders import AdapterFolder, adapter_folders
from heddle_server.api.adapter_holds import AdapterHolds
from heddle_server.api.engine_client import EngineClient
from heddle_server.api.errors import EngineUnavailable, InvalidRequest
from heddle_server.api.pool_room import Packable, PoolRoom
from heddle_server.api.upload import NAME_PART, Upload

log = logging.getLogger(__name__)

SWEEP_SECONDS = 1.0  # how late an adapter may go whose time is up

Result = TypeVar("Result")


@dataclass(frozen=True)
class Validation:
    """What an upload would have come to."""

    name: str | None
    checkpoint: Checkpoint
    details: AdapterDetails
    record: AdapterRecord | None  # what the name means now
    references: tuple[str, ...]  # under which this very content is stored already

    @property
    def is_new_version(self) -> bool:
        return self.record is None or self.record.latest.digest != self.checkpoint.digest


@dataclass(frozen=True)
class Deletion:
    """What is gone, and how many running requests finish on it."""

    versions: tuple[AdapterVersion, ...]
    num_draining: int


@dataclass(frozen=True)
class ImportReport:
    """What became of a folder of adapters."""

    path: Path
    registered: tuple[AdapterVersion, ...]  # new ones, and those that were there already
    refused: tuple[tuple[str, str], ...]  # name and reason


class AdapterRegistry:
    """Between the routes, the store and the engine. Lives on the event loop."""

    def __init__(
        self, store: AdapterStore, engine: EngineClient, holds: AdapterHolds, worker: Executor, model_name: str
    ) -> None:
        """`worker` is one thread, so that what is checked there still holds when it is written."""
        self._store = store
        self._engine = engine
        self._holds = holds
        self._worker = worker
        self._model_name = model_name
        self._told_pins: tuple[str, ...] | None = None  # to the engine that runs now
        self._quarantining: set[str] = set()  # digests on their way into the store's list
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def room(self) -> PoolRoom:
        """Of the loaded base's pool; raises `EngineUnavailable` before one is loaded."""
        if self._engine.model is None:
            raise EngineUnavailable("The model is not loaded yet, so no adapter can be checked against it.")
        return PoolRoom(self._engine.model)

    def start(self) -> None:
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._sweeper

    # What a user wants.

    async def upload(self, upload: Upload) -> tuple[AdapterVersion, bool]:
        """Stores a new adapter or a new version of one; what the name means then, durably, and whether that is new.

        Raises what is wrong with the files, the name or the details, `AdapterExceedsPool` and `PinCapacity`.
        """
        version, is_new = await self._change(self._put, upload, self.room)
        self._engine.prepare_adapter(version.digest)
        return version, is_new

    async def validate(self, upload: Upload) -> Validation:
        """`upload` without storing anything; the name may be missing."""
        return await self._on_disk(self._validate, upload, self.room)

    async def update(self, name: str, details: AdapterDetails) -> AdapterRecord:
        """Changes what is said about a name; raises `AdapterNotFound` and `PinCapacity`."""
        return await self._change(self._update, name, details)

    async def set_alias(self, name: str, alias: str, target: str) -> tuple[AdapterVersion, AdapterVersion | None]:
        """Makes `name@alias` mean the version that `name@target` means; what it means now, and what it meant."""
        return await self._change(self._store.set_alias, name, alias, target)

    async def remove_alias(self, name: str, alias: str) -> AdapterVersion:
        """Makes an alias mean nothing; what it meant."""
        return await self._change(self._store.remove_alias, name, alias)

    async def delete(self, reference: str) -> Deletion:
        """No new request gets it; running ones finish on it."""
        versions = await self._change(self._store.delete, reference)
        digests = {version.digest for version in versions}
        return Deletion(versions, sum(self._store.num_holds(digest) for digest in digests))

    async def import_folder(self, path: Path) -> ImportReport:
        """Registers every adapter in a folder of PEFT folders; one that is refused stops no other."""
        room = self.room
        registered: list[AdapterVersion] = []
        refused: list[tuple[str, str]] = []
        try:
            folders = await asyncio.to_thread(lambda: list(adapter_folders(path)))
        except OSError as error:
            return ImportReport(path, (), ((str(path), error.strerror or "unreadable"),))
        for folder in folders:
            try:
                version, is_new = await self._on_disk(self._import, folder, room)
            except AdapterError as error:
                refused.append((folder.name, error.message))
                continue
            registered.append(version)
            if is_new:
                self._engine.prepare_adapter(version.digest)
        self._settle()
        return ImportReport(path, tuple(registered), tuple(refused))

    # What the engine says.

    def engine_is_ready(self) -> None:
        """A new engine has pinned nothing."""
        self._told_pins = None
        self._tell_pins()

    def quarantine(self, digest: str, reason: str) -> bool:
        """The stored content is not what it should be: no new request gets it until it is uploaded again.

        Every request that waited for the content says so; False where that was known already.
        """
        if digest in self._quarantining or self._store.quarantine_reason(digest) is not None:
            return False
        self._quarantining.add(digest)
        log.error("The adapter content %s is quarantined: %s", digest, reason)
        quarantining = asyncio.get_running_loop().create_task(self._change(self._store.quarantine, digest, reason))
        quarantining.add_done_callback(_log_failure)
        quarantining.add_done_callback(lambda _: self._quarantining.discard(digest))
        return True

    # In the worker thread.

    def _put(self, upload: Upload, room: PoolRoom) -> tuple[AdapterVersion, bool]:
        name = self._checked_name(upload.name)
        checkpoint = self._checked(upload, room)
        before = self._store.record(name).latest if name in self._store else None
        version = self._store.put(name, checkpoint, upload.config, upload.weights_path, upload.details)
        return version, version != before

    def _validate(self, upload: Upload, room: PoolRoom) -> Validation:
        record = None
        if upload.name is not None and self._checked_name(upload.name) in self._store:
            record = self._store.record(upload.name)
        checkpoint = self._checked(upload, room)
        references = self._store.names_of(checkpoint.digest)
        return Validation(upload.name, checkpoint, upload.details, record, references)

    def _checked(self, upload: Upload, room: PoolRoom) -> Checkpoint:
        """The adapter in an upload, if it fits the base, its pool and the pins."""
        assert self._engine.model is not None
        checkpoint = read_checkpoint(upload.config, upload.weights_path, self._engine.model.layout)
        room.check_fits(checkpoint)
        if self._will_be_pinned(upload.name, upload.details):
            self._check_pins(upload.name, checkpoint.digest, checkpoint, room)
        return checkpoint

    def _checked_name(self, name: str | None) -> str:
        if name is None:
            raise InvalidRequest(f"The upload has no part named {NAME_PART!r}.", param=NAME_PART)
        check_name(name)
        if name == self._model_name:
            raise InvalidAdapterName(f"{name!r} is the name of the base model; choose another.", param=NAME_PART)
        return name

    def _will_be_pinned(self, name: str | None, details: AdapterDetails) -> bool:
        if details.is_pinned is not None or name is None or name not in self._store:
            return bool(details.is_pinned)
        return self._store.record(name).is_pinned

    def _check_pins(self, name: str | None, digest: str, adapter: Packable, room: PoolRoom) -> None:
        others = {version.digest: version for version in self._store.pinned() if version.name != name}
        room.check_pins({**others, digest: adapter})

    def _update(self, name: str, details: AdapterDetails) -> AdapterRecord:
        record = self._store.record(name)
        if details.is_pinned and not record.is_pinned:
            self._check_pins(name, record.latest.digest, record.latest, self.room)
        return self._store.update(name, details)

    def _import(self, folder: AdapterFolder, room: PoolRoom) -> tuple[AdapterVersion, bool]:
        """What the folder's name means now, and whether that is new."""
        folder.check()
        upload = Upload(folder.name, folder.config.read_bytes(), folder.weights, AdapterDetails())
        found = self._validate(upload, room)
        is_sound = self._store.quarantine_reason(found.checkpoint.digest) is None
        if found.record is not None and not found.is_new_version and is_sound and room.bytes_of(found.record.latest):
            return found.record.latest, False
        return self._store.put(folder.name, found.checkpoint, upload.config, upload.weights_path), True

    # Between the two.

    async def _change(self, change: Callable[..., Result], *arguments: object) -> Result:
        """Finished even when the client leaves: half a change is worth nothing to anybody."""
        return await asyncio.shield(asyncio.get_running_loop().create_task(self._changed(change, *arguments)))

    async def _changed(self, change: Callable[..., Result], *arguments: object) -> Result:
        result = await self._on_disk(change, *arguments)
        self._settle()
        return result

    async def _on_disk(self, work: Callable[..., Result], *arguments: object) -> Result:
        with disk_errors():
            return await asyncio.get_running_loop().run_in_executor(self._worker, work, *arguments)

    def _settle(self) -> None:
        """Content that nothing names any more goes, and the engine pins what is pinned now."""
        self._holds.collect_soon()
        self._tell_pins()

    def _tell_pins(self) -> None:
        if not self._engine.is_ready:
            return
        pinned = [each for each in self._store.pinned() if self._store.quarantine_reason(each.digest) is None]
        digests = self.room.pins_that_fit((version.digest, version) for version in pinned)
        if digests == self._told_pins:
            return
        if left_out := [version.name for version in pinned if version.digest not in digests]:
            log.warning("The page pool is too small to keep these pinned adapters on the device: %s", left_out)
        self._engine.pin_adapters(digests)
        self._told_pins = digests

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                if names := await self._on_disk(self._store.expire, int(time.time())):
                    log.info("Adapters whose time was up are deleted: %s", ", ".join(names))
                    self._settle()
            except StoreUnusable as error:
                log.error("Adapters whose time is up stay for now: %s", error.message)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Tells what the disk refuses as `StoreUnusable`."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StoreUnusable(f"The adapter store cannot be read or written: {reason}.") from error


def _log_failure(task: asyncio.Task[tuple[str, ...]]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("Quarantining failed: %s", error)
