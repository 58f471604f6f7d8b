"""Where uploaded adapters lie on disk, each under its digest, complete or not at all.

    <store>/content/<64 hex digits>/adapter_config.json, adapter_model.safetensors
    <store>/incoming/<32 hex digits>/...    being written or removed; emptied at start-up

Content appears by one rename after its bytes have reached the disk, and disappears by one rename before they are
removed, so a crash at any point leaves a whole version or none. Paths are made of digests and random digits only.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.checkpoint import Checkpoint, fit_to_base
from heddle_adapters.content import AdapterContent
from heddle_adapters.digest import digest_hex
from heddle_adapters.errors import AdapterDamaged, AdapterIncompatible, InvalidAdapter
from heddle_adapters.tensor_file import WEIGHTS_FILE

CONTENT_NAME = re.compile(r"[0-9a-f]{64}")
INCOMING_NAME = re.compile(r"[0-9a-f]{32}")


class ContentPaths(NamedTuple):
    config: Path
    weights: Path


def content_paths(store_path: Path, digest: str) -> ContentPaths:
    """Where the files of one version lie in the store at `store_path`."""
    folder = store_path / "content" / digest_hex(digest)
    return ContentPaths(folder / CONFIG_FILE, folder / WEIGHTS_FILE)


def open_content(store_path: Path, digest: str, base: BaseLayout) -> Checkpoint:
    """Reads one stored version and proves that it is the one: hashed as a whole before anything is made of it.

    Raises `AdapterDamaged` where the files are missing or not what `digest` says, and what `fit_to_base` raises
    where they are whole but this base is another than the one they were uploaded for.
    """
    try:
        content = AdapterContent(*content_paths(store_path, digest))
        found = content.digest
    except InvalidAdapter as error:
        raise _damaged(digest, error.message) from error
    except OSError as error:
        raise _damaged(digest, error.strerror or "unreadable") from error
    if found != digest:
        raise _damaged(digest, f"its files have the digest {found}")
    try:
        return fit_to_base(content, base)
    except AdapterIncompatible:
        raise
    except InvalidAdapter as error:  # once it fitted: what the digest does not cover has changed
        raise _damaged(digest, error.message) from error


def _damaged(digest: str, problem: str) -> AdapterDamaged:
    return AdapterDamaged(f"The stored adapter {digest} is damaged: {problem}; upload it again.", param="adapter")


class ContentFolder:
    """The two folders above, for the one process that may write them."""

    def __init__(self, store_path: Path) -> None:
        self._store_path = store_path
        self._content = store_path / "content"
        self._incoming = store_path / "incoming"
        self._content.mkdir(exist_ok=True)
        self._incoming.mkdir(exist_ok=True)
        for folder in (store_path, store_path.parent):
            _sync(folder)
        for leftover in self._incoming.iterdir():
            if INCOMING_NAME.fullmatch(leftover.name):
                shutil.rmtree(leftover)

    def digests(self) -> set[str]:
        """All versions on disk."""
        return {f"sha256:{entry.name}" for entry in self._content.iterdir() if CONTENT_NAME.fullmatch(entry.name)}

    @contextmanager
    def upload_folder(self) -> Iterator[Path]:
        """A fresh folder on the store's own disk, removed with what is left in it at the end."""
        folder = self._incoming / secrets.token_hex(16)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def add(self, digest: str, config: bytes, weights_path: Path) -> None:
        """Stores one version durably; weights from an `upload_folder` are moved, others copied.

        Where the version is already there its files are replaced by the equal new ones, which repairs damaged ones.
        Raises `OSError`, for example on a full disk, and then leaves what was stored as it was.
        """
        final = content_paths(self._store_path, digest)
        with self.upload_folder() as folder:
            new = ContentPaths(folder / CONFIG_FILE, folder / WEIGHTS_FILE)
            new.config.write_bytes(config)
            if self._incoming in weights_path.parents:
                weights_path.rename(new.weights)
            else:
                shutil.copyfile(weights_path, new.weights)
            for path in (*new, folder):
                _sync(path)
            if final.config.parent.exists():
                for source, target in zip(new, final, strict=True):
                    source.replace(target)
                _sync(final.config.parent)
            else:
                folder.rename(final.config.parent)
                _sync(self._content)

    def remove(self, digest: str) -> None:
        """Removes one version, if it is there."""
        folder = content_paths(self._store_path, digest).config.parent
        with self.upload_folder() as trash:
            if folder.exists():
                folder.rename(trash / folder.name)


def _sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
