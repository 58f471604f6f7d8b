"""The adapters of a running server: every change to them, made durable in the store and then told to the engine.

    upload, update, delete, set_alias, ...    awaited by routes; the work is done by the thread that waits for the disk
    engine_is_ready, quarantine               called when the engine says so, on the event loop
    start, close                              from when to when adapters whose time is up are deleted

Every change has an `Actor`, is bounded by its owner's limits and stands in the audit log before it counts. Nothing here
knows HTTP. What the store refuses to write for want of a working disk is `StoreUnusable`.
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
from heddle_server.api.actor import LOCAL_ACTOR, SERVER, Actor
from heddle_server.api.adapter_folders import AdapterFolder, adapter_folders
from heddle_server.api.adapter_holds import AdapterHolds
from heddle_server.api.author import AuditedAuthor
from heddle_server.api.engine_client import EngineClient
from heddle_server.api.errors import ApiError, EngineUnavailable, InvalidRequest
from heddle_server.api.pool_room import Packable, PoolRoom
from heddle_server.api.quota import Quota
from heddle_server.api.upload import NAME_PART, Upload
from heddle_server.audit_log import AuditEntry, AuditLog
from heddle_server.key_store import KeyStore

log = logging.getLogger(__name__)

IMPORTED = AdapterDetails(visibility="public")  # what an operator registers is for everybody
UNPUBLISHED = AdapterDetails(visibility="private")

SWEEP_SECONDS = 1.0  # how late an adapter may go whose time is up

Result = TypeVar("Result")


@dataclass(frozen=True)
class Validation:
    """What an upload would have come to."""

    owner: str
    name: str | None
    checkpoint: Checkpoint
    details: AdapterDetails
    record: AdapterRecord | None  # what the owner's name means now
    references: tuple[str, ...]  # under which the owner has stored this very content already

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
        self,
        store: AdapterStore,
        keys: KeyStore,
        audit: AuditLog,
        engine: EngineClient,
        holds: AdapterHolds,
        worker: Executor,
        model_name: str,
        tenant_pool_share: float = 1.0,
    ) -> None:
        """`worker` is one thread, so that what is checked there still holds when it is written."""
        self._store = store
        self._keys = keys
        self._audit = audit
        self._engine = engine
        self._holds = holds
        self._worker = worker
        self._model_name = model_name
        self._tenant_pool_share = tenant_pool_share
        self._told_pins: dict[str, str] | None = None  # to the engine that runs now
        self._quarantining: set[str] = set()  # digests on their way into the store's list
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def room(self) -> PoolRoom:
        """Of the loaded base's pool; raises `EngineUnavailable` before one is loaded."""
        if self._engine.model is None:
            raise EngineUnavailable("The model is not loaded yet, so no adapter can be checked against it.")
        return PoolRoom(self._engine.model, self._tenant_pool_share)

    def start(self) -> None:
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._sweeper

    # What a user wants.

    async def upload(self, upload: Upload, actor: Actor = LOCAL_ACTOR) -> tuple[AdapterVersion, bool]:
        """Stores a new adapter or a new version of one; what the name means then, durably, and whether that is new.

        Raises what is wrong with the files, the name or the details, `AdapterExceedsPool`, `PinCapacity`, `NameTaken`
        and `QuotaExceeded`.
        """
        version, is_new = await self._change(self._put, upload, self.room, actor)
        self._engine.prepare_adapter(version.digest)
        return version, is_new

    async def validate(self, upload: Upload, actor: Actor = LOCAL_ACTOR) -> Validation:
        """`upload` without storing anything; the name may be missing."""
        return await self._on_disk(self._validate, upload, self.room, actor)

    async def update(self, name: str, details: AdapterDetails, actor: Actor = LOCAL_ACTOR) -> AdapterRecord:
        """Changes what is said about a name; raises `AdapterNotFound`, `NotTheOwner` and what `upload` does."""
        return await self._change(self._update, name, details, actor)

    async def set_alias(
        self, name: str, alias: str, target: str, actor: Actor = LOCAL_ACTOR
    ) -> tuple[AdapterVersion, AdapterVersion | None]:
        """Makes `name@alias` mean the version that `name@target` means; what it means now, and what it meant."""

        def change(author: AuditedAuthor) -> tuple[AdapterVersion, AdapterVersion | None]:
            return self._store.set_alias(name, alias, target, author)

        return await self._change(self._audited, "alias.set", name, actor, change)

    async def remove_alias(self, name: str, alias: str, actor: Actor = LOCAL_ACTOR) -> AdapterVersion:
        """Makes an alias mean nothing; what it meant."""

        def change(author: AuditedAuthor) -> AdapterVersion:
            return self._store.remove_alias(name, alias, author)

        return await self._change(self._audited, "alias.remove", name, actor, change)

    async def delete(self, reference: str, actor: Actor = LOCAL_ACTOR) -> Deletion:
        """No new request gets it; running ones finish on it."""

        def change(author: AuditedAuthor) -> tuple[AdapterVersion, ...]:
            return self._store.delete(reference, author)

        versions = await self._change(self._audited, "adapter.delete", reference, actor, change)
        by_digest = {version.digest: version for version in versions}
        return Deletion(versions, sum(map(self._holds.num_requests, by_digest.values())))

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
        quarantining = asyncio.get_running_loop().create_task(self._change(self._quarantine, digest, reason))
        quarantining.add_done_callback(_log_failure)
        quarantining.add_done_callback(lambda _: self._quarantining.discard(digest))
        return True

    # In the worker thread.

    def _audited(
        self, action: str, name: str | None, actor: Actor, change: Callable[[AuditedAuthor], Result]
    ) -> Result:
        """A change, with a line in the audit log also where it is refused."""
        author = self._author(action, actor)
        try:
            return change(author)
        except (AdapterError, ApiError) as error:
            author.record_refusal(name, error)
            raise

    def _author(self, action: str, actor: Actor) -> AuditedAuthor:
        quota = None
        if actor.principal is not None:
            quota = Quota(self._keys.limits_of(actor.owner), lambda version: self.room.bytes_of(version))

        def check_pin(version: AdapterVersion) -> None:
            self._check_pin(version.name, version.digest, version, actor)

        return AuditedAuthor(action, actor, self._audit, quota, check_pin)

    def _put(self, upload: Upload, room: PoolRoom, actor: Actor) -> tuple[AdapterVersion, bool]:
        def change(author: AuditedAuthor) -> tuple[AdapterVersion, bool]:
            name = self._checked_name(upload.name)
            checkpoint = self._checked(upload, room)
            before = self._store.own(name, author.owner)
            version = self._store.put(name, checkpoint, upload.config, upload.weights_path, upload.details, author)
            return version, before is None or version != before.latest

        return self._audited("adapter.upload", upload.name, actor, change)

    def _validate(self, upload: Upload, room: PoolRoom, actor: Actor) -> Validation:
        record = None
        if upload.name is not None:
            record = self._store.own(self._checked_name(upload.name), actor.owner)
        checkpoint = self._checked(upload, room)
        if upload.name is not None:
            self._store.check_put(upload.name, checkpoint, upload.details, self._author("adapter.upload", actor))
        elif upload.details.is_pinned:
            self._check_pin(None, checkpoint.digest, checkpoint, actor)
        references = self._store.own_names_of(checkpoint.digest, actor.owner)
        return Validation(actor.owner, upload.name, checkpoint, upload.details, record, references)

    def _checked(self, upload: Upload, room: PoolRoom) -> Checkpoint:
        """The adapter in an upload, if it fits the base and its pool."""
        assert self._engine.model is not None
        layout = self._engine.model.layout
        weights = self._store.base_weights(layout.fingerprint, self._engine.model.dtype)
        checkpoint = read_checkpoint(upload.config, upload.weights_path, layout, weights)
        room.check_fits(checkpoint)
        room.check_context(checkpoint.num_virtual_tokens)
        return checkpoint

    def _checked_name(self, name: str | None) -> str:
        if name is None:
            raise InvalidRequest(f"The upload has no part named {NAME_PART!r}.", param=NAME_PART)
        check_name(name)
        if name == self._model_name:
            raise InvalidAdapterName(f"{name!r} is the name of the base model; choose another.", param=NAME_PART)
        return name

    def _check_pin(self, name: str | None, digest: str, adapter: Packable, actor: Actor) -> None:
        """Raises `PinCapacity` unless the owner may pin this in place of what the name means now.

        An owner's content counts once; several owners' counts for each: else it would show what others have.
        """
        pinned = self._store.pinned()
        own = {each.digest: each for each in pinned if each.owner == actor.owner and each.name != name}
        others = {(each.owner, each.digest): each for each in pinned if each.owner != actor.owner}
        self.room.check_pins({**own, digest: adapter}.values(), others.values(), tells_totals=actor.is_operator)

    def _update(self, name: str, details: AdapterDetails, actor: Actor) -> AdapterRecord:
        def change(author: AuditedAuthor) -> AdapterRecord:
            return self._store.update(name, details, author)

        return self._audited("adapter.update", name, actor, change)

    def _import(self, folder: AdapterFolder, room: PoolRoom) -> tuple[AdapterVersion, bool]:
        """What the folder's name means now, and whether that is new."""
        folder.check()
        upload = Upload(folder.name, folder.config.read_bytes(), folder.weights, IMPORTED)

        def change(author: AuditedAuthor) -> tuple[AdapterVersion, bool]:
            name = self._checked_name(upload.name)
            checkpoint = self._checked(upload, room)
            self._unpublish(name, but=author.owner)
            record = self._store.own(name, author.owner)
            if record is not None and self._is_stored(checkpoint, record):
                if not record.is_public:
                    self._store.update(name, IMPORTED, author)
                return record.latest, False
            return self._store.put(name, checkpoint, upload.config, upload.weights_path, IMPORTED, author), True

        return self._audited("adapter.import", folder.name, SERVER, change)

    def _unpublish(self, name: str, but: str) -> None:
        """A public name is free for one owner: another's adapter of it becomes private."""
        published = self._store.published(name)
        if published is not None and published.owner != but:
            log.warning("%s is private from now on: the operator's folder has that name", published.latest.full_name)
            author = self._author("adapter.update", Actor(None, published.owner))
            self._store.update(name, UNPUBLISHED, author)

    def _is_stored(self, checkpoint: Checkpoint, record: AdapterRecord) -> bool:
        """Whether storing it again would change nothing: not repair it, and not note what an older heddle did not."""
        is_sound = self._store.quarantine_reason(checkpoint.digest) is None
        return record.latest.digest == checkpoint.digest and is_sound and bool(record.latest.sites_by_pattern)

    def _quarantine(self, digest: str, reason: str) -> None:
        """Refuses content first: that nobody may get it matters more than that the log has it."""
        names = self._store.quarantine(digest, reason)
        entry = AuditEntry("adapter.quarantine", digest=digest, detail=f"{', '.join(names)}: {reason}")
        try:
            self._audit.append([entry])
        except OSError as error:
            log.error("The audit log lacks the quarantine of %s: %s", digest, error)

    def _expire(self, now_unix_seconds: int) -> tuple[str, ...]:
        return self._store.expire(now_unix_seconds, AuditedAuthor("adapter.expire", SERVER, self._audit))

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
        tenants = self.room.pins_that_fit((version.digest, version.owner, version) for version in pinned)
        if tenants == self._told_pins:
            return
        if left_out := [version.full_name for version in pinned if version.digest not in tenants]:
            log.warning("The page pool is too small to keep these pinned adapters on the device: %s", left_out)
        self._engine.pin_adapters(tenants)
        self._told_pins = tenants

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                if names := await self._on_disk(self._expire, int(time.time())):
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


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("Quarantining failed: %s", error)
