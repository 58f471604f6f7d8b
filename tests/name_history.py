"""What adapter names meant when, as far as somebody outside of the server can know it."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple


class Meaning(NamedTuple):
    """One version of an adapter."""

    version: int
    digest: str


class Change(NamedTuple):
    """A change that took effect at some moment between its sending and its acknowledgement."""

    sent_seconds: float
    acknowledged_seconds: float
    meaning: Meaning | None  # from then on; None = no such adapter


class NameHistory:
    """Changes by name; those of one name come one after the other."""

    def __init__(self) -> None:
        self._changes: defaultdict[str, list[Change]] = defaultdict(list)

    def add(self, name: str, change: Change) -> None:
        self._changes[name].append(change)

    def latest(self, name: str) -> Meaning | None:
        """What a name means after all changes."""
        changes = self._changes[name]
        return changes[-1].meaning if changes else None

    def meanings(self, name: str, begin_seconds: float, end_seconds: float) -> set[Meaning | None]:
        """Everything that a name may have meant at some moment between the two."""
        before: Meaning | None = None
        during = set[Meaning | None]()
        for change in self._changes[name]:
            if change.acknowledged_seconds <= begin_seconds:
                before = change.meaning
            elif change.sent_seconds < end_seconds:
                during.add(change.meaning)
        return {before, *during}
