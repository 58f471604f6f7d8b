"""Which names adapters may have, and which known names are near a wrong one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice

from heddle_adapters.errors import InvalidAdapterName, quoted

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
RESERVED_NAME = "base"  # in a request it means: no adapter
MAX_COMPARED = 1000  # bounds the work that a wrong name can cause


def check_name(name: str) -> None:
    """Raises `InvalidAdapterName` unless an adapter may have this name."""
    if NAME.fullmatch(name) is None:
        raise InvalidAdapterName(
            f"The adapter name {quoted(name)} is not allowed; a name has 1 to 96 letters, digits, '.', '_' and '-', "
            "and begins with a letter or digit.",
            param="name",
        )
    if name.lower() == RESERVED_NAME:
        message = f"The adapter name {quoted(name)} is reserved for the base model without an adapter; choose another."
        raise InvalidAdapterName(message, param="name")


def nearest_names(name: str, known: Iterable[str]) -> tuple[str, ...]:
    """At most three known names that a mistyped one may have meant, nearest first."""
    if NAME.fullmatch(name) is None:
        return ()
    return tuple(get_close_matches(name, list(islice(known, MAX_COMPARED)), n=3))
