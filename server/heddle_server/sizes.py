"""Sizes in bytes and large counts, as people write and read them."""

from __future__ import annotations

import re

MAX_SIZE = 2**62  # bytes: what fits into 64 bits, twice
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMGT]i?)?B?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes of "512MiB", "2GB" or "1000000"; raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size; write for example 512MiB or 2GB.")
    size = float(match["number"]) * _UNITS[(match["unit"] or "").lower()]
    if size >= MAX_SIZE:
        raise ValueError(f"{text!r} is more than any machine has.")
    return int(size)


def format_size(num_bytes: int) -> str:
    """Bytes for people, in powers of 1024."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    if num_bytes >= 2**20:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**10:.0f} KiB" if num_bytes >= 2**10 else f"{num_bytes} B"


def format_count(number: int) -> str:
    """A count for people: 71k, 1.2M; small ones as they are."""
    if number >= 10**6:
        return f"{number / 10**6:.1f}M"
    return f"{number / 10**3:.0f}k" if number >= 10**4 else str(number)
