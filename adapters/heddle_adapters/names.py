"""How adapters are called: names, aliases, references, and which known names are near a wrong one.

    reference   = [namespace "/"] name ["@" selector]
    selector    = version number | alias | "latest" | "sha256:" 64 hex digits

No part of a reference holds a comma, a colon (but for a digest's) or a second slash, and none becomes a path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice

from heddle_adapters.digest import DIGEST
from heddle_adapters.errors import InvalidAdapterName, quoted

PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
NAME = re.compile(rf"(?:{PART}/)?(?P<last>{PART})")
ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,95}")
NUMBER = re.compile(r"[1-9][0-9]{0,17}")  # fits the index's integers

RESERVED_NAME = "base"  # in a request it means: no adapter
RESERVED_ENDINGS = ("aliases", "versions")  # team/versions could be read as the versions of team
LATEST = "latest"

# A wrong name is answered on the event loop, in 20 ms at most: two names take time by the product of their lengths.
MAX_COMPARED_NAMES = 1000
MAX_COMPARED_PRODUCT = 200_000


@dataclass(frozen=True)
class AdapterReference:
    """What a request calls an adapter by."""

    name: str  # "sql" or "team/sql"
    selector: str | None  # "3", "prod", "latest" or "sha256:<hex>"; None where there is none, which means the latest

    @classmethod
    def parse(cls, text: str) -> AdapterReference:
        """Reads `[namespace/]name[@selector]`; raises `InvalidAdapterName`."""
        name, separator, selector = text.partition("@")
        check_name(name)
        if not separator:
            return cls(name, None)
        if not any(pattern.fullmatch(selector) for pattern in (NUMBER, ALIAS, DIGEST)):
            message = (
                f"The adapter reference {quoted(text)} is not understood; after '@' comes a version number, an alias "
                "or sha256:<64 hex digits>."
            )
            raise InvalidAdapterName(message, param="name")
        return cls(name, selector)


def check_name(name: str) -> None:
    """Raises `InvalidAdapterName` unless an adapter may have this name."""
    match = NAME.fullmatch(name)
    if match is None:
        raise InvalidAdapterName(
            f"The adapter name {quoted(name)} is not allowed; a name has 1 to 96 letters, digits, '.', '_' and '-', "
            "and begins with a letter or digit; a namespace of the same form and '/' may come before it.",
            param="name",
        )
    if name.lower() == RESERVED_NAME:
        message = f"The adapter name {quoted(name)} is reserved for the base model without an adapter; choose another."
        raise InvalidAdapterName(message, param="name")
    if match["last"] in RESERVED_ENDINGS:
        message = f"The adapter name {quoted(name)} is reserved: it would be read as a list; choose another."
        raise InvalidAdapterName(message, param="name")


def check_alias(alias: str) -> None:
    """Raises `InvalidAdapterName` unless a version may have this alias."""
    if ALIAS.fullmatch(alias) is None:
        raise InvalidAdapterName(
            f"The alias {quoted(alias)} is not allowed; an alias has 1 to 96 letters, digits, '.', '_' and '-', and "
            "begins with a letter.",
            param="alias",
        )
    if alias.lower() == LATEST:
        message = f"The alias {quoted(alias)} is reserved for the newest version; choose another."
        raise InvalidAdapterName(message, param="alias")
    if alias.lower().startswith("sha256") or DIGEST.fullmatch(f"sha256:{alias.lower()}"):
        message = f"The alias {quoted(alias)} looks like a digest; choose another."
        raise InvalidAdapterName(message, param="alias")


def nearest_names(name: str, known: Iterable[str]) -> tuple[str, ...]:
    """At most three known names that a mistyped one may have meant, nearest first."""
    if NAME.fullmatch(name) is None:
        return ()
    num_compared = min(MAX_COMPARED_NAMES, MAX_COMPARED_PRODUCT // len(name) ** 2)
    return tuple(get_close_matches(name, list(islice(known, num_compared)), n=3))
