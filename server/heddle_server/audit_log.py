"""Who changed which adapter or key, and when: `audit.jsonl` in the store's folder, one JSON object a line.

A line is on the disk before its change counts, and a change whose line cannot be written is not made. So a full disk
stops changes, and loses none in silence; a line that it cut off is ended by the next one. The file is opened for every
line, so that it may be moved away at any time.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from heddle_adapters.store_folder import make_private_file

AUDIT_FILE = "audit.jsonl"


@dataclass(frozen=True)
class AuditEntry:
    """One change, or one that was refused. None where there is no such thing."""

    action: str  # "adapter.upload", "key.create", ...
    tenant: str | None = None  # who did it; None = the server itself, or somebody at its command line
    key_id: str | None = None  # by which key
    request_id: str | None = None
    owner: str | None = None  # whose adapter or key it is
    name: str | None = None  # of the adapter, or the key's id
    version: int | None = None
    digest: str | None = None
    detail: str | None = None  # what else has changed
    outcome: str = "done"  # or the code of the error that refused it


class AuditLog:
    """Appends; several processes may at once."""

    def __init__(self, store_path: Path) -> None:
        self._path = store_path / AUDIT_FILE

    def append(self, entries: Sequence[AuditEntry]) -> None:
        """One line for each, all of them on the disk on return; raises `OSError`."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        text = "".join(json.dumps({"time": time, **asdict(entry)}) + "\n" for entry in entries)
        descriptor = self._open()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # until it is closed: another's line, half written, would look torn
            lines = (_end_of_torn_line(descriptor) + text).encode()
            if os.write(descriptor, lines) < len(lines):
                raise OSError(f"{AUDIT_FILE} could not be written whole")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_APPEND
        with suppress(FileExistsError):
            return make_private_file(self._path, flags)
        return os.open(self._path, flags | os.O_CREAT | os.O_CLOEXEC, 0o600)  # it may just have been moved away


def _end_of_torn_line(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    return "\n" if size and os.pread(descriptor, 1, size - 1) != b"\n" else ""
