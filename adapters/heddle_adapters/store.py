"""The adapters this server knows: names, their versions, and the content behind them.

A name means one version at a time; a version is its content's digest. Content is written and flushed before the
index names it, and removed only when no name means it and no request holds it:

    put, delete    change what a name means; `release` says when the last request let go of replaced content
    collect        removes the content that nothing needs any more and returns its digests

`put`, `delete`, `versions` and `collect` wait for the disk and belong in a worker thread; `resolve`, `acquire`,
`hold`, `release` and `list` never do and belong on the event loop. Any thread may call any of them.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections import Counter
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from threading import Lock

from heddle_adapters.checkpoint import Checkpoint
from heddle_adapters.content_folder import ContentFolder, ContentPaths, content_paths
from heddle_adapters.errors import AdapterNotFound, StoreUnusable, quoted
from heddle_adapters.names import check_name, nearest_names
from heddle_adapters.store_index import LOCAL_OWNER, AdapterVersion, StoreIndex


class AdapterStore:
    """A folder of adapters, owned by one process until `close`."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the store and clears away what a crash left; raises `StoreUnusable`."""
        self._path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnusable(f"The adapter store {path} cannot be made: {error.strerror}. See --store.") from error
        with ExitStack() as opened:
            _lock_folder(path, opened)
            self._index = StoreIndex(path / "index.sqlite3")
            opened.callback(self._index.close)
            self._content = ContentFolder(path)
            self._write_lock = Lock()  # one writer of disk and index at a time
            self._state_lock = Lock()  # guards the four fields below, never held while the disk works
            self._current = {version.name: version for version in self._index.current()}
            self._uses = Counter(version.digest for version in self._current.values())  # names that mean a digest
            self._holds: Counter[str] = Counter()
            self._stored = self._content.digests()
            self.collect()
            self._opened = opened.pop_all()

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> AdapterStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def upload_folder(self) -> AbstractContextManager[Path]:
        """A fresh folder to stream an upload into, on the store's disk, so that `put` moves instead of copying."""
        return self._content.upload_folder()

    def put(self, name: str, checkpoint: Checkpoint, config: bytes, weights_path: Path) -> AdapterVersion:
        """Makes `name` mean the checkpoint that was read from `config` and `weights_path`; durable on return.

        A name's current content again is no new version. Raises `InvalidAdapterName`, and `OSError` or
        `sqlite3.Error` where the disk fails; either way the name means what it meant before.
        """
        check_name(name)
        digest = checkpoint.digest
        with self._write_lock:
            self._content.add(digest, config, weights_path)
            with self._state_lock:
                self._stored.add(digest)
            current = self._current.get(name)
            if current is not None and current.digest == digest:
                return current
            version = AdapterVersion(
                owner=LOCAL_OWNER,
                name=name,
                version=self._index.next_version(name),
                digest=digest,
                method=checkpoint.method,
                max_rank=checkpoint.max_rank,
                num_rows=checkpoint.num_rows,
                size_bytes=checkpoint.size_bytes,
                created_unix_seconds=int(time.time()),
            )
            self._index.set_current(version)
            self._change(name, version)
        return version

    def delete(self, name: str) -> AdapterVersion:
        """Makes `name` mean nothing and returns what it meant; raises `AdapterNotFound`."""
        with self._write_lock:
            version = self.resolve(name)
            self._index.remove_current(name)
            self._change(name, None)
        return version

    def collect(self) -> tuple[str, ...]:
        """Removes content that no name means and no request holds; returns the digests that are gone for good."""
        with self._write_lock:
            with self._state_lock:
                garbage = tuple(digest for digest in self._stored if self._is_garbage(digest))
                self._stored.difference_update(garbage)
            for digest in garbage:
                self._content.remove(digest)
        return garbage

    def versions(self, name: str) -> tuple[AdapterVersion, ...]:
        """Every version of a known name, oldest first; only the last still has content for sure."""
        self.resolve(name)
        with self._write_lock:
            return self._index.versions(name)

    def list(self) -> tuple[AdapterVersion, ...]:
        """What each name means now, by name."""
        with self._state_lock:
            versions = tuple(self._current.values())
        return tuple(sorted(versions, key=lambda version: version.name))

    def resolve(self, name: str) -> AdapterVersion:
        """The version that `name` means now; raises `AdapterNotFound` with the nearest names."""
        version = self._current.get(name)
        if version is None:
            raise self._not_found(name)
        return version

    def acquire(self, name: str) -> AdapterVersion:
        """`resolve` and `hold` at once, so that no replacement comes between them."""
        with self._state_lock:
            version = self._current.get(name)
            if version is not None:
                self._holds[version.digest] += 1
        if version is None:
            raise self._not_found(name)
        return version

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
            return self._is_garbage(digest)

    def content_paths(self, digest: str) -> ContentPaths:
        """Where the two files of a version lie."""
        return content_paths(self._path, digest)

    def _change(self, name: str, version: AdapterVersion | None) -> None:
        with self._state_lock:
            replaced = self._current.get(name)
            if version is not None:  # in one step, since `resolve` reads without the lock
                self._current[name] = version
                self._uses[version.digest] += 1
            else:
                del self._current[name]
            if replaced is not None:
                self._uses[replaced.digest] -= 1
                if not self._uses[replaced.digest]:
                    del self._uses[replaced.digest]

    def _is_garbage(self, digest: str) -> bool:
        return digest not in self._uses and digest not in self._holds

    def _not_found(self, name: str) -> AdapterNotFound:
        with self._state_lock:
            known = tuple(self._current)
        nearest = nearest_names(name, known)
        hint = f"Did you mean {', '.join(nearest)}?" if nearest else "Upload it first, or see the list of adapters."
        return AdapterNotFound(f"There is no adapter {quoted(name)}. {hint}", nearest=nearest)


def _lock_folder(path: Path, opened: ExitStack) -> None:
    """Takes the folder for this process; the system gives it back even if the process is killed."""
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    opened.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreUnusable("Another server is using the adapter store; give each server its own folder.") from error
