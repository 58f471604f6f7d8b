"""The adapters this server knows: names, their versions, and the content behind them.

A name has an owner and versions, each of which is its content's digest; aliases point at versions. Versions stay until
they are deleted. What a name means depends on who asks (`catalog`); who changes one is its `Author`. Content is stored
once, however many owners have it; it is written and flushed before the index names it, and removed only when no version
has it and no request holds it:

    put, delete, expire   change what a name means; `release` says when the last request let go of deleted content
    collect               removes the content that nothing needs any more and returns its digests

What changes the store or cleans it up waits for the disk and belongs in a worker thread: `put`, `delete`, `expire`,
`collect`, `set_alias`, `remove_alias`, `update`, `quarantine`. Everything else never waits for it and belongs on the
event loop. Any thread may call any of them.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Lock

from heddle_adapters.author import Author
from heddle_adapters.base_file import LazyBase, base_file_path
from heddle_adapters.catalog import Catalog
from heddle_adapters.checkpoint import Checkpoint
from heddle_adapters.content_folder import ContentFolder, ContentPaths, content_paths
from heddle_adapters.errors import (
    AdapterDamaged,
    AdapterError,
    AdapterNotFound,
    NameTaken,
    NotTheOwner,
    quoted,
)
from heddle_adapters.names import AdapterReference, check_alias, check_name, nearest_names
from heddle_adapters.source import BaseWeights
from heddle_adapters.store_folder import lock_store_folder, make_store_folder
from heddle_adapters.store_index import LOCAL_OWNER, AdapterDetails, AdapterRecord, AdapterVersion, StoreIndex

NO_DETAILS = AdapterDetails()
OPERATOR = Author()


class AdapterStore:
    """A folder of adapters, owned by one process until `close`."""

    def __init__(self, path: Path, keep_versions: int | None = None) -> None:
        """Opens or creates the store and clears away what a crash left; raises `StoreUnusable`.

        With `keep_versions`, an upload drops all but that many newest versions of its name and the aliased ones.
        """
        self._path = path
        self._keep_versions = keep_versions
        make_store_folder(path)
        with ExitStack() as opened:
            lock_store_folder(path, opened)
            self._content = ContentFolder(path)
            self._stored = self._content.digests()
            self._index = StoreIndex(path / "index.sqlite3", must_exist=bool(self._stored))
            opened.callback(self._index.close)
            self._write_lock = Lock()  # one writer of disk and index at a time
            self._state_lock = Lock()  # guards all fields below and `_stored`, never held while the disk works
            self._catalog = Catalog(self._index.records())
            self._quarantined = self._index.quarantined()
            self._holds: Counter[str] = Counter()
            self._idle = set(self._stored)  # what `collect` looks at: everything that may be garbage
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
        self,
        name: str,
        checkpoint: Checkpoint,
        config: bytes,
        weights_path: Path,
        details: AdapterDetails = NO_DETAILS,
        by: Author = OPERATOR,
    ) -> AdapterVersion:
        """Makes the checkpoint that was read from `config` and `weights_path` the latest version; durable on return.

        The latest version's content again is no new version, but repairs it and applies `details`. Raises
        `InvalidAdapterName`, `NameTaken`, what the author's `permit` and `record` raise, and `OSError` or
        `sqlite3.Error` where the disk fails; then the name means what it meant.
        """
        with self._write_lock:
            before, after = self._planned(name, checkpoint, details, by)
            self._content.add(checkpoint.digest, config, weights_path)
            with self._state_lock:
                self._stored.add(checkpoint.digest)
                self._idle.add(checkpoint.digest)  # until a version has it
            self._replace(before, after, by, sound=checkpoint.digest)
        return after.latest

    def check_put(
        self, name: str, checkpoint: Checkpoint, details: AdapterDetails = NO_DETAILS, by: Author = OPERATOR
    ) -> None:
        """Raises what forbids this `put`, but for the disk."""
        with self._write_lock:
            self._planned(name, checkpoint, details, by)

    def delete(self, reference: str, by: Author = OPERATOR) -> tuple[AdapterVersion, ...]:
        """Deletes the one version that `name@number` or `name@sha256:...` means, or with a bare name all of them.

        Returns what was deleted. Raises `AdapterNotFound`, `NotTheOwner`, and `AdapterError` for an alias or `latest`,
        which may have moved on since the caller looked, and for a version that still has an alias; what the author's
        `permit` raises too, as the version that the name means then may be a larger one.
        """
        with self._write_lock:
            record, version = self._changeable_version(reference, by)
            selector = AdapterReference.parse(reference).selector
            if selector is None:
                self._replace(record, None, by)
                return record.versions
            _check_deletable(record, version, selector)
            after = record.without_version(version)
            if after is not None:
                by.permit(record, after, self.owned_by(by.owner))
            self._replace(record, after, by)
        return (version,)

    def expire(self, now_unix_seconds: int, by: Author = OPERATOR) -> tuple[str, ...]:
        """Deletes the names of every owner whose time is up, and returns the full names."""
        with self._write_lock:
            expired = tuple(record for record in self.list() if record.is_expired(now_unix_seconds))
            for record in expired:
                self._replace(record, None, by)
        return tuple(record.latest.full_name for record in expired)

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

    def set_alias(
        self, name: str, alias: str, target: str, by: Author = OPERATOR
    ) -> tuple[AdapterVersion, AdapterVersion | None]:
        """Makes an alias mean the version that `target`, a selector of the same name, means now.

        Returns what the alias means and what it meant before. Raises `InvalidAdapterName`, `AdapterNotFound`,
        `NotTheOwner`.
        """
        check_alias(alias)
        with self._write_lock:
            record, version = self._changeable_version(f"{name}@{target}", by)
            before = record.meanings.get(alias)
            self._replace(record, record.with_alias(alias, version), by)
        return version, before

    def remove_alias(self, name: str, alias: str, by: Author = OPERATOR) -> AdapterVersion:
        """Makes an alias mean nothing and returns what it meant; raises `AdapterNotFound`, `NotTheOwner`."""
        with self._write_lock:
            record = self._changeable(name, by)
            if alias not in record.aliases:
                raise _no_such_selector(record, alias)
            self._replace(record, record.without_alias(alias), by)
        return record.meanings[alias]

    def update(self, name: str, details: AdapterDetails, by: Author = OPERATOR) -> AdapterRecord:
        """Changes what is said about a name, all of it or nothing.

        Raises `AdapterNotFound`, `NotTheOwner`, `NameTaken` and what the author's `permit` and `record` raise.
        """
        assert details.alias is None, "aliases are moved by set_alias"
        with self._write_lock:
            before = self._changeable(name, by)
            after = before.with_details(details, int(time.time()))
            self._check_permitted(before, after, by)
            self._replace(before, after, by)
        return after

    def quarantine(self, digest: str, reason: str) -> tuple[str, ...]:
        """Refuses damaged content to new requests until the same content is put again.

        Returns full references to the versions that it concerns, of whichever owner; content that no version has is
        not worth remembering.
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
        """What each name of every owner means now, by name and owner: for the operator, not for a tenant."""
        with self._state_lock:
            return self._catalog.all()

    def visible_to(self, tenant: str) -> tuple[AdapterRecord, ...]:
        """What each name means to a tenant now, by name."""
        with self._state_lock:
            return self._catalog.visible_to(tenant)

    def owned_by(self, owner: str) -> tuple[AdapterRecord, ...]:
        """What each name of one owner means now, in no order."""
        with self._state_lock:
            return self._catalog.owned_by(owner)

    def own(self, name: str, owner: str = LOCAL_OWNER) -> AdapterRecord | None:
        """What an owner's own name means now; it looks for no similar ones, which takes milliseconds."""
        return self._catalog.own(name, owner)

    def published(self, name: str) -> AdapterRecord | None:
        """The one public adapter of a name, whoever owns it."""
        return self._catalog.published(name)

    def __contains__(self, full_name: str) -> bool:
        """Whether a full name (`AdapterVersion.full_name`) means anything now."""
        owner, _, name = full_name.rpartition(":")
        return self.own(name, owner or LOCAL_OWNER) is not None

    def record(self, name: str, tenant: str = LOCAL_OWNER) -> AdapterRecord:
        """What a name means to a tenant now; raises `AdapterNotFound` with the nearest names."""
        record = self._catalog.find(name, tenant)
        if record is None:
            raise self._unknown_name(name, tenant)
        return record

    def versions(self, name: str, tenant: str = LOCAL_OWNER) -> tuple[AdapterVersion, ...]:
        """The versions of a name that exist, oldest first; raises `AdapterNotFound`."""
        return self.record(name, tenant).versions

    def pinned(self) -> tuple[AdapterVersion, ...]:
        """The latest version of every owner's pinned names, by name and owner."""
        return tuple(record.latest for record in self.list() if record.is_pinned)

    def resolve(self, reference: str, tenant: str = LOCAL_OWNER) -> AdapterVersion:
        """The version that a reference means to a tenant now; raises `AdapterNotFound` with the nearest references."""
        version = self._catalog.meaning(reference, tenant)
        if version is None:
            raise self._not_found(reference, tenant)
        return version

    def acquire(self, reference: str, tenant: str = LOCAL_OWNER) -> AdapterVersion:
        """`resolve` and `hold` at once, so that no deletion comes between them.

        Raises `AdapterNotFound`, and `AdapterDamaged` for content in quarantine.
        """
        with self._state_lock:
            version = self._catalog.meaning(reference, tenant)
            reason = None if version is None else self._quarantined.get(version.digest)
            if version is not None and reason is None:
                self._holds[version.digest] += 1
                return version
        if version is None:
            raise self._not_found(reference, tenant)
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
        """Full references to the versions of every owner that are this content, such as "sql@3", in order."""
        return tuple(version.full_reference for version in self._versions_of(digest))

    def visible_names_of(self, digest: str, tenant: str) -> tuple[str, ...]:
        """References by which a tenant can ask for this content, in order."""
        return tuple(
            version.reference
            for version in self._versions_of(digest)
            if self._catalog.meaning(version.reference, tenant) == version
        )

    def own_names_of(self, digest: str, owner: str) -> tuple[str, ...]:
        """References to an owner's own versions that are this content, in order."""
        return tuple(version.reference for version in self._versions_of(digest) if version.owner == owner)

    def quarantine_reason(self, digest: str) -> str | None:
        """Why content is in quarantine; None if it is not."""
        return self._quarantined.get(digest)

    def content_paths(self, digest: str) -> ContentPaths:
        """Where the two files of a version lie."""
        return content_paths(self._path, digest)

    def base_weights(self, fingerprint: str, dtype: str) -> BaseWeights | None:
        """The weights of a base, loaded in that dtype, that an engine has left beside the store; None without."""
        path = base_file_path(self._path, fingerprint, dtype)
        return LazyBase(path) if path.exists() else None

    def _planned(
        self, name: str, checkpoint: Checkpoint, details: AdapterDetails, by: Author
    ) -> tuple[AdapterRecord | None, AdapterRecord]:
        """What a name means, and what it is to mean with one more upload; raises what forbids that."""
        check_name(name)
        now = int(time.time())
        before = self._catalog.own(name, by.owner)
        living = before if before is not None and not before.is_expired(now) else None
        version = _new_version(by.owner, name, self._index.next_version(by.owner, name), checkpoint, now)
        if living is None:
            after = AdapterRecord((version,))
        elif living.latest.digest == checkpoint.digest:
            latest = living.latest
            version = replace(version, version=latest.version, created_unix_seconds=latest.created_unix_seconds)
            after = replace(living, versions=(*living.versions[:-1], version))
        else:
            after = living.with_version(version)
        after = after.with_details(details, now).with_newest(self._keep_versions)
        self._check_permitted(before, after, by)
        return before, after

    def _check_permitted(self, before: AdapterRecord | None, after: AdapterRecord, by: Author) -> None:
        by.permit(before, after, self.owned_by(by.owner))
        published = self._catalog.published(after.name)
        if after.is_public and published is not None and published.owner != after.owner:
            raise NameTaken(
                f"Another owner has published an adapter {quoted(after.name)}, and public names are unique. Publish "
                "yours under another name, or keep it private.",
                param="visibility",
            )

    def _changeable(self, name: str, by: Author) -> AdapterRecord:
        """The author's own adapter of a name; raises `AdapterNotFound`, `NotTheOwner`."""
        record = self.record(name, by.owner)
        _check_owner(record, by)
        return record

    def _changeable_version(self, reference: str, by: Author) -> tuple[AdapterRecord, AdapterVersion]:
        """The author's own version that a reference means, and its name; raises `AdapterNotFound`, `NotTheOwner`."""
        version = self.resolve(reference, by.owner)
        record = self.record(version.name, by.owner)
        _check_owner(record, by)
        return record, version

    def _replace(
        self, before: AdapterRecord | None, after: AdapterRecord | None, by: Author, sound: str | None = None
    ) -> None:
        """Makes one name mean `after` on disk, then in memory; the content `sound` is known to be whole."""
        self._index.replace(before, after, sound, before_commit=lambda: by.record(before, after))
        with self._state_lock:
            if sound is not None:
                self._quarantined.pop(sound, None)
            for digest in self._catalog.replace(before, after):
                self._quarantined.pop(digest, None)
                self._idle.add(digest)

    def _versions_of(self, digest: str) -> tuple[AdapterVersion, ...]:
        with self._state_lock:
            return self._catalog.versions_of(digest)

    def _is_garbage(self, digest: str) -> bool:
        return not self._catalog.is_named(digest) and digest not in self._holds

    def _not_found(self, reference: str, tenant: str) -> AdapterNotFound:
        name, _, selector = reference.partition("@")
        record = self._catalog.find(name, tenant)
        return self._unknown_name(name, tenant) if record is None else _no_such_selector(record, selector)

    def _unknown_name(self, name: str, tenant: str) -> AdapterNotFound:
        """The same for a name that nobody has and for another owner's private one, in the time that it takes too."""
        if "@" in name:
            plain = quoted(name.partition("@")[0])
            return AdapterNotFound(f"{quoted(name)} is one version, and this is for a name as a whole: say {plain}.")
        with self._state_lock:
            known = self._catalog.names_visible_to(tenant)
        nearest = nearest_names(name, known)
        hint = f"Did you mean {', '.join(nearest)}?" if nearest else "Upload it first, or see GET /v1/adapters."
        return AdapterNotFound(f"There is no adapter {quoted(name)}. {hint}", nearest=nearest)


def _new_version(owner: str, name: str, number: int, checkpoint: Checkpoint, now_unix_seconds: int) -> AdapterVersion:
    return AdapterVersion(
        owner=owner,
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
        num_virtual_tokens=checkpoint.num_virtual_tokens,
        num_prefix_tokens=checkpoint.num_prefix_tokens,
        positions=checkpoint.positions,
        sites_by_pattern=checkpoint.sites_by_pattern,
    )


def _check_owner(record: AdapterRecord, by: Author) -> None:
    if record.owner != by.owner:
        raise NotTheOwner(
            f"The adapter {quoted(record.name)} is {record.owner}'s, who made it public: you can use it, and only its "
            "owner can change it. Upload one of your own, under any name.",
            owner=record.owner,
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
