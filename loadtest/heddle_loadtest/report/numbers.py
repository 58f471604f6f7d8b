"""Numbers as people read them. Every function takes None for a number that nobody measured and gives a dash."""

from __future__ import annotations

from collections.abc import Sequence

MISSING = "-"


def milliseconds(seconds: float | None) -> str:
    """0.0123 -> 12.3, with as many digits as mean anything."""
    return MISSING if seconds is None else amount(seconds * 1000)


def amount(value: float | None) -> str:
    """Three or four digits that count: 0.52, 41.7, 1,234."""
    if value is None:
        return MISSING
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 999.95 else 0
    return f"{value:,.{digits}f}"


def percent(share: float | None) -> str:
    """0.123 -> 12.3 %."""
    return MISSING if share is None else f"{share * 100:.1f} %"


def gibibytes(size_bytes: float | None) -> str:
    """In GiB."""
    return MISSING if size_bytes is None else f"{size_bytes / 2**30:.1f} GiB"


def milliseconds_between(bounds: Sequence[float] | None) -> str:
    """An interval of seconds, in milliseconds."""
    return f"{milliseconds(bounds[0])} to {milliseconds(bounds[1])}" if bounds else ""


def amount_between(bounds: Sequence[float] | None) -> str:
    """An interval of rates."""
    return f"{amount(bounds[0])} to {amount(bounds[1])}" if bounds else ""


def percent_between(bounds: Sequence[float] | None) -> str:
    """An interval of shares."""
    return f"{bounds[0] * 100:.1f} to {bounds[1] * 100:.1f} %" if bounds else ""


def bracketed(text: str) -> str:
    """In brackets with a space before, and nothing of nothing."""
    return f" ({text})" if text else ""


def of_many(count: int, noun: str) -> str:
    """1 request, 2,000 requests."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
