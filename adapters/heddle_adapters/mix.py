"""Which adapters a request uses, and how strongly: the identity of one adapter or of a mix.

A mix of several adapters is the exact sum of what each adds (or, where they scale channels, the product); its
identity is that of its parts, so that nothing computed for one mix is ever taken for another.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import sha256

import msgspec

BASE_KEY = ""  # the identity of no adapter at all
FORMAT_TAG = b"heddle mix 2"


class AdapterPart(msgspec.Struct, frozen=True):
    """One adapter of a request, by content."""

    digest: str  # "sha256:<hex>"
    scale: float = 1.0  # of everything the adapter changes; 0 is the base, 1 the adapter as it was trained
    rank: int | None = None  # how many of its first rows are used at each site, >= 1; None = all

    @property
    def is_whole(self) -> bool:
        """Whether the adapter is used as it was trained."""
        return self.scale == 1.0 and self.rank is None


def adapter_key(parts: Sequence[AdapterPart]) -> str:
    """What tells one mix from another: `BASE_KEY`, an adapter's own digest, or "mix:<hex>" over its sorted parts.

    The order of the parts does not count; a part's scale and rank do.
    """
    if not parts:
        return BASE_KEY
    if len(parts) == 1 and parts[0].is_whole:
        return parts[0].digest
    hasher = sha256(FORMAT_TAG)
    for part in in_order(parts):
        digest = part.digest.encode()
        hasher.update(len(digest).to_bytes(8, "little") + digest + struct.pack("<dQ", part.scale, part.rank or 0))
    return f"mix:{hasher.hexdigest()}"


def in_order(parts: Sequence[AdapterPart]) -> tuple[AdapterPart, ...]:
    """The parts in the one order in which they are added up, whatever order the client wrote."""
    return tuple(sorted(parts, key=lambda part: (part.digest, part.scale, part.rank or 0)))
