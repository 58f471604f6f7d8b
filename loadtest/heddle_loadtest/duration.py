"""Durations as people write them: `500ms`, `5s`, `2m`, `1h`, or a bare number of seconds."""

import math
import re

from heddle_loadtest.errors import SpecError

_SECONDS_PER_UNIT = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|)\s*", re.ASCII)


def parse_duration_seconds(text: str) -> float:
    """The seconds in `text`. Raises ValueError if it is no duration."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"not a duration: {text!r}")
    seconds = float(match[1]) * _SECONDS_PER_UNIT[match[2]]
    if not math.isfinite(seconds):
        raise ValueError(f"too long: {text!r}")
    return seconds


def read_duration_seconds(field: str, text: str) -> float:
    """The same for a setting. Raises SpecError, which names the field."""
    try:
        return parse_duration_seconds(text)
    except ValueError:
        raise SpecError(field, text, "is no duration", "Write it as 500ms, 5s, 2m or 1h") from None
