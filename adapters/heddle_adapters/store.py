"""The adapters this server knows: names, their versions, and the content behind them.

A name has versions, each of which is its content's digest; aliases point at versions. Versions stay until they are
deleted. Content is written and flushed before the index names it, and removed only when no version has it and no
request holds it:

    put, delete, expire   change what a name means; `release` says when the last request let go of deleted content
    collect               removes the content that nothing needs any more and returns its digests

What changes the store or cleans it up waits for the disk and belongs in a worker thread: `put`, `delete`, `expire`,
`collect`, `set_alias`, `remove_alias`, `update`, `quarantine`. Everything else never waits for it and belongs on the
event loop. Any thread may call any of them.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections import Counter
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Lock

from heddle_adapters.checkpoint import Checkpoint
from heddle_adapters.content_folder import ContentFolder, ContentPaths, content_paths
from heddle_adapters.errors import (
    AdapterDamaged,
    AdapterError,
    AdapterNotFound,
    InvalidAdapterName,
    StoreUnusable,
    quoted,
)
from heddle_adapters.names import AdapterReference, check_alias, check_name, nearest_names
from heddle_adapters.store_index import LOCAL_OWNER, AdapterDetails, AdapterRecord, AdapterVersion, StoreIndex

NO_DETAILS = AdapterDetails()


class AdapterStore:
    """A folder of adapters, owned by one process until `close`."""

    def __init__(self, path: Path, keep_versions: int | None = None) -> None:
        """Opens or creates the store and clears away what a crash left; raises `StoreUnusable`.

        With `keep_versions`, an upload drops all but that many newest versions of its name and the aliased ones.
        """
        self._path = path
        self._keep_versions = keep_versions
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnusable(f"The adapter store {path} cannot be made: {error.strerror}. See --store.") from error
        with ExitStack() as opened:
            _lock_folder(path, opened)
            self._content = ContentFolder(path)
            self._stored = self._content.digests()
            self._index = StoreIndex(path / "index.sqlite3", must_exist=bool(self._stored))
            opened.callback(self._index.close)
            self._write_lock = Lock()  # one writer of disk and index at a time
            self._state_lock = Lock()  # guards all fields below and `_stored`, never held while the disk works
            self._records = self._index.records()
            self._quarantined = self._index.quarantined()
            self._versions_of: dict[str, set[AdapterVersion]] = {}  # digest to the versions that are this content
            self._holds: Counter[str] = Counter()
            self._idle = set(self._stored)  # what `collect` looks at: everything that may be garbage
            for record in self._records.values():
                self._count_versions(None, record)
            self.collect()
            self._opened = opened.pop_all()

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> AdapterStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Changes: they wait for the disk

    def upload_folder(self) -> AbstractContextManager[Path]:
        """A fresh folder to stream an upload into, on the store's disk, so that `put` moves instead of copying."""
        return self._content.upload_folder()

    def put(
        self, name: str, checkpoint: Checkpoint, config: bytes, weights_path: Path, details: AdapterDetails = NO_DETAILS
    ) -> AdapterVersion:
        """Makes the checkpoint that was read from `config` and `weights_path` the latest version; durable on return.

        The latest version's content again is no new version, but repairs it and applies `details`. Raises
        `InvalidAdapterName`, and `OSError` or `sqlite3.Error` where the disk fails; then the name means what it meant.
        """
        check_name(name)
        now = int(time.time())
        digest = checkpoint.digest
        with self._write_lock:
            self._content.add(digest, config, weights_path)
            with self._state_lock:
                self._stored.add(digest)
                self._idle.add(digest)  # until a version has it
            before = self._records.get(name)
            living = before if before is not None and not before.is_expired(now) else None
            version = _new_version(name, self._index.next_version(name), checkpoint, now)
            if living is None:
                after = AdapterRecord((version,))
            elif living.latest.digest == digest:
                latest = living.latest
                version = replace(version, version=latest.version, created_unix_seconds=latest.created_unix_seconds)
                after = replace(living, versions=(*living.versions[:-1], version))
            else:
                after = living.with_version(version)
            after = after.with_details(details, now).with_newest(self._keep_versions)
            self._replace(before, after, sound=digest)
        return version

    def delete(self, reference: str) -> tuple[AdapterVersion, ...]:
        """Deletes the one version that `name@number` or `name@sha256:...` means, or with a bare name all of them.

        Returns what was deleted. Raises `AdapterNotFound`, and `AdapterError` for an alias or `latest`, which may
        have moved on since the caller looked, and for a version that still has an alias.
        """
        with self._write_lock:
            version = self.resolve(reference)
            record = self._records[version.name]
            selector = AdapterReference.parse(reference).selector
            if selector is None:
                self._replace(record, None)
                return record.versions
            _check_deletable(record, version, selector)
            self._replace(record, record.without_version(version))
        return (version,)

    def expire(self, now_unix_seconds: int) -> tuple[str, ...]:
        """Deletes the names whose time is up, and returns them."""
        with self._write_lock:
            expired = tuple(record for record in self.list() if record.is_expired(now_unix_seconds))
            for record in expired:
                self._replace(record, None)
        return tuple(record.name for record in expired)

    def collect(self) -> tuple[str, ...]:
        """Removes content that no version has and no request holds; returns the digests that are gone for good."""
        with self._write_lock:
            with self._state_lock:
                garbage = tuple(digest for digest in self._idle if self._is_garbage(digest))
                self._idle.clear()
                self._stored.difference_update(garbage)
            for digest in garbage:
                self._content.remove(digest)
        return garbage

    def set_alias(self, name: str, alias: str, target: str) -> tuple[AdapterVersion, AdapterVersion | None]:
        """Makes an alias mean the version that `target`, a selector of the same name, means now.

        Returns what the alias means and what it meant before. Raises `InvalidAdapterName`, `AdapterNotFound`.
        """
        check_alias(alias)
        with self._write_lock:
            version = self.resolve(f"{name}@{target}")
            record = self._records[version.name]
            before = record.meanings.get(alias)
            self._replace(record, record.with_alias(alias, version))
        return version, before

    def remove_alias(self, name: str, alias: str) -> AdapterVersion:
        """Makes an alias mean nothing and returns what it meant; raises `AdapterNotFound`."""
        with self._write_lock:
            record = self.record(name)
            if alias not in record.aliases:
                raise _no_such_selector(record, alias)
            self._replace(record, record.without_alias(alias))
        return record.meanings[alias]

    def update(self, name: str, details: AdapterDetails) -> AdapterRecord:
        """Changes what is said about a name, all of it or nothing; raises `AdapterNotFound`."""
        assert details.alias is None, "aliases are moved by set_alias"
        with self._write_lock:
            before = self.record(name)
            after = before.with_details(details, int(time.time()))
            self._replace(before, after)
        return after

    def quarantine(self, digest: str, reason: str) -> tuple[str, ...]:
        """Refuses damaged content to new requests until the same content is put again.

        Returns references to the versions that it concerns; content that no version has is not worth remembering.
        """
        with self._write_lock:
            concerned = self.names_of(digest)
            if concerned:
                self._index.quarantine(digest, reason)
                with self._state_lock:
                    self._quarantined[digest] = reason
        return concerned

    # Questions: they never wait for the disk

    def list(self) -> tuple[AdapterRecord, ...]:
        """What each name means now, by name."""
        with self._state_lock:
            records = tuple(self._records.values())
        return tuple(sorted(records, key=lambda record: record.name))

    def __contains__(self, name: str) -> bool:
        """Whether a name means anything now; unlike `record` it looks for no similar ones, which takes milliseconds."""
        return name in self._records

    def record(self, name: str) -> AdapterRecord:
        """What a name means now; raises `AdapterNotFound` with the nearest names."""
        record = self._records.get(name)
        if record is None:
            raise self._unknown_name(name)
        return record

    def versions(self, name: str) -> tuple[AdapterVersion, ...]:
        """The versions of a name that exist, oldest first; raises `AdapterNotFound`."""
        return self.record(name).versions

    def pinned(self) -> tuple[AdapterVersion, ...]:
        """The latest version of every pinned name, by name."""
        return tuple(record.latest for record in self.list() if record.is_pinned)

    def resolve(self, reference: str) -> AdapterVersion:
        """The version that a reference means now; raises `AdapterNotFound` with the nearest references."""
        version = self._meaning(reference)
        if version is None:
            raise self._not_found(reference)
        return version

    def acquire(self, reference: str) -> AdapterVersion:
        """`resolve` and `hold` at once, so that no deletion comes between them.

        Raises `AdapterNotFound`, and `AdapterDamaged` for content in quarantine.
        """
        with self._state_lock:
            version = self._meaning(reference)
            reason = None if version is None else self._quarantined.get(version.digest)
            if version is not None and reason is None:
                self._holds[version.digest] += 1
                return version
        if version is None:
            raise self._not_found(reference)
        raise AdapterDamaged(
            f"The adapter {version.reference} is in quarantine until it is uploaded again: {reason}", param="adapter"
        )

    def hold(self, digest: str) -> None:
        """Keeps content until `release`, whatever happens to its names; raises `AdapterNotFound` if it is gone."""
        with self._state_lock:
            if digest in self._stored:
                self._holds[digest] += 1
                return
        raise AdapterNotFound(f"No content with the digest {quoted(digest)} is stored; upload the adapter again.")

    def release(self, digest: str) -> bool:
        """Undoes one `hold`; True if nothing needs the content any more, so that `collect` has work."""
        with self._state_lock:
            assert self._holds[digest] > 0, "released more often than held"
            self._holds[digest] -= 1
            if not self._holds[digest]:
                del self._holds[digest]
            is_garbage = self._is_garbage(digest)
            if is_garbage:
                self._idle.add(digest)
        return is_garbage

    def num_holds(self, digest: str) -> int:
        """How many requests hold this content."""
        return self._holds[digest]

    def names_of(self, digest: str) -> tuple[str, ...]:
        """References to the versions that are this content, such as "sql@3", by name and number."""
        with self._state_lock:
            versions = tuple(self._versions_of.get(digest, ()))
        in_order = sorted(versions, key=lambda version: (version.name, version.version))
        return tuple(version.reference for version in in_order)

    def quarantine_reason(self, digest: str) -> str | None:
        """Why content is in quarantine; None if it is not."""
        return self._quarantined.get(digest)

    def content_paths(self, digest: str) -> ContentPaths:
        """Where the two files of a version lie."""
        return content_paths(self._path, digest)

    def _meaning(self, reference: str) -> AdapterVersion | None:
        try:
            parsed = AdapterReference.parse(reference)
        except InvalidAdapterName:
            return None
        record = self._records.get(parsed.name)
        return None if record is None else record.meanings.get(parsed.selector)

    def _replace(self, before: AdapterRecord | None, after: AdapterRecord | None, sound: str | None = None) -> None:
        """Makes one name mean `after` on disk, then in memory; the content `sound` is known to be whole."""
        self._index.replace(before, after, sound)
        with self._state_lock:
            if after is not None:
                self._records[after.name] = after  # in one step, since `resolve` reads without the lock
            elif before is not None:
                del self._records[before.name]
            if sound is not None:
                self._quarantined.pop(sound, None)
            self._count_versions(before, after)

    def _count_versions(self, before: AdapterRecord | None, after: AdapterRecord | None) -> None:
        old, new = (set(record.versions if record else ()) for record in (before, after))
        for version in new - old:
            self._versions_of.setdefault(version.digest, set()).add(version)
        for version in old - new:
            versions = self._versions_of[version.digest]
            versions.remove(version)
            if not versions:
                del self._versions_of[version.digest]
                self._quarantined.pop(version.digest, None)
                self._idle.add(version.digest)

    def _is_garbage(self, digest: str) -> bool:
        return digest not in self._versions_of and digest not in self._holds

    def _not_found(self, reference: str) -> AdapterNotFound:
        name, _, selector = reference.partition("@")
        record = self._records.get(name)
        return self._unknown_name(name) if record is None else _no_such_selector(record, selector)

    def _unknown_name(self, name: str) -> AdapterNotFound:
        if "@" in name:
            plain = quoted(name.partition("@")[0])
            return AdapterNotFound(f"{quoted(name)} is one version, and this is for a name as a whole: say {plain}.")
        with self._state_lock:
            known = tuple(self._records)
        nearest = nearest_names(name, known)
        hint = f"Did you mean {', '.join(nearest)}?" if nearest else "Upload it first, or see GET /v1/adapters."
        return AdapterNotFound(f"There is no adapter {quoted(name)}. {hint}", nearest=nearest)


def _new_version(name: str, number: int, checkpoint: Checkpoint, now_unix_seconds: int) -> AdapterVersion:
    return AdapterVersion(
        owner=LOCAL_OWNER,
        name=name,
        version=number,
        digest=checkpoint.digest,
        method=checkpoint.method,
        max_rank=checkpoint.max_rank,
        num_rows=checkpoint.num_rows,
        size_bytes=checkpoint.size_bytes,
        created_unix_seconds=now_unix_seconds,
        num_row_values=checkpoint.num_row_values,
        num_vector_values=checkpoint.num_vector_values,
        combination=checkpoint.combination,
    )


def _check_deletable(record: AdapterRecord, version: AdapterVersion, selector: str) -> None:
    """Only what says for good which version it means may delete one, and no alias may be left without a version."""
    if selector not in (str(version.version), version.digest):
        raise AdapterError(
            f"{record.name}@{selector} may mean another version soon: delete {version.reference}, which it means now, "
            "or remove the alias alone.",
            param="adapter",
        )
    aliases = record.aliases_of(version)
    if aliases:
        raise AdapterError(
            f"{version.reference} still has the alias {', '.join(aliases)}; move or remove it first.", param="adapter"
        )


def _no_such_selector(record: AdapterRecord, selector: str) -> AdapterNotFound:
    nearest = tuple(f"{record.name}@{alias}" for alias in nearest_names(selector, record.aliases))
    nearest = nearest or (record.latest.reference,)
    return AdapterNotFound(
        f"The adapter {record.name} has no version or alias {quoted(selector)}. Did you mean {', '.join(nearest)}?",
        nearest=nearest,
    )


def _lock_folder(path: Path, opened: ExitStack) -> None:
    """Takes the folder for this process; the system gives it back even if the process is killed."""
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    opened.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"Another server is using the adapter store {path}; give each server its own with --store."
        raise StoreUnusable(message) from error
