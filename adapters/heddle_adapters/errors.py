"""Why an adapter cannot be taken or served.

    AdapterError
    ├── InvalidAdapter        the upload itself is wrong: file, config, shapes, values
    │   └── AdapterIncompatible   it is sound, but not for this base
    ├── InvalidAdapterName    the name breaks the naming rule or is reserved
    ├── AdapterNotFound       no such adapter, or none that the asker may know of
    ├── NotTheOwner           a public adapter is changed by its owner only
    ├── NameTaken             another owner has published an adapter of this name
    ├── AdapterDamaged        the stored bytes no longer match their digest
    ├── AdapterExceedsPool    sound, but larger than the whole page pool
    └── StoreUnusable         the store's folder cannot be used by this process

Every message names the field, says what was wrong and what to do. The server's error table maps
each class to an HTTP status and an OpenAI error code.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

MAX_LISTED = 20
MAX_MISMATCHES = 5  # of an adapter for another base, where everything is wrong in the same way
MAX_QUOTED_CHARS = 160


class AdapterError(Exception):
    """What is asked of an adapter cannot be; `param` names the offending request field."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidAdapter(AdapterError):
    """The uploaded files cannot be read as an adapter."""


class AdapterIncompatible(InvalidAdapter):
    """The adapter does not fit the base this server runs."""


class InvalidAdapterName(AdapterError):
    """The name is not allowed."""


class AdapterNotFound(AdapterError):
    """No adapter of that name."""

    def __init__(self, message: str, *, nearest: tuple[str, ...] = (), param: str | None = "adapter") -> None:
        super().__init__(message, param=param)
        self.nearest = nearest


class NotTheOwner(AdapterError):
    """The adapter is public, so its existence is no secret, and somebody else's."""

    def __init__(self, message: str, *, owner: str, param: str | None = "adapter") -> None:
        super().__init__(message, param=param)
        self.owner = owner


class NameTaken(AdapterError):
    """Public names are unique: one that another owner has published cannot be published again."""


class AdapterDamaged(AdapterError):
    """Stored bytes do not match the digest they are stored under."""


class AdapterExceedsPool(AdapterError):
    """The adapter's rows are larger than the whole page pool, so no eviction could ever make room for them."""


class StoreUnusable(AdapterError):
    """The machine does not let the store work now: its folder is taken, too new or damaged, or its disk fails."""


def quoted(text: object) -> str:
    """Uploaded text as it may appear in a message: escaped, then cut to `MAX_QUOTED_CHARS` characters."""
    shown = text if isinstance(text, str) else reprlib.repr(text)
    escaped = repr(shown[:MAX_QUOTED_CHARS])
    is_whole = len(shown) <= MAX_QUOTED_CHARS and len(escaped) <= MAX_QUOTED_CHARS + 2
    return escaped if is_whole else escaped[:MAX_QUOTED_CHARS] + "...'"


def listed(lines: Sequence[str], limit: int = MAX_LISTED) -> str:
    """At most `limit` lines joined for a message, with a count of those left out."""
    shown = "; ".join(lines[:limit])
    left_out = len(lines) - limit
    return f"{shown}; and {left_out} more" if left_out > 0 else shown
