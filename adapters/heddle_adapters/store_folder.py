"""The folder that a store lies in: made when there is none, and one process's at a time."""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack
from pathlib import Path

from heddle_adapters.errors import StoreUnusable


def make_store_folder(path: Path) -> None:
    """For its owner alone, and so all that comes to lie in it; one that is there stays as it is.

    Raises `StoreUnusable`.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreUnusable(f"The adapter store {path} cannot be made: {error.strerror}. See --store.") from error


def make_private_file(path: Path, flags: int) -> int:
    """Makes a file in a store's folder, for the folder's owner alone, also where root makes it; its descriptor.

    Raises `FileExistsError`, and leaves alone what is there: it may be a link to anything.
    """
    descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    if os.geteuid() == 0:
        owner = path.parent.stat()
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
    return descriptor


def lock_store_folder(path: Path, opened: ExitStack) -> None:
    """Takes the folder for this process until `opened` is closed; the system gives it back even if it is killed."""
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    opened.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"Another server is using the adapter store {path}; give each server its own with --store."
        raise StoreUnusable(message) from error
