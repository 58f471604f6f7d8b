"""One adapter that somebody uses, waits for or has left on the device, and how far it is on its way. No torch.

absent -> queued -> reading -> staged -> copying -> resident
          disk ------------->  host  ------------>  device
"""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from heddle_adapters.packed_adapter import PackedAdapter

if TYPE_CHECKING:  # device_rows needs torch; this file does not
    from heddle_adapters.device_rows import PageMap, PlacedAdapter


class State(Enum):
    """How far an adapter is on its way to the device."""

    ABSENT = auto()
    QUEUED = auto()  # to be read when a reader is free
    READING = auto()
    STAGED = auto()  # in host memory, held there until it is copied or nobody waits any more
    COPYING = auto()
    RESIDENT = auto()


ON_THE_WAY = (State.QUEUED, State.READING, State.COPYING)  # nothing to be done but to wait


@dataclass(eq=False)
class TrackedAdapter:
    """What is known of one adapter that somebody uses, waits for or has left on the device."""

    digest: str
    tenant: str  # whose share of the pool it takes
    state: State = State.ABSENT
    num_waiting: int = 0  # requests that have not started
    num_references: int = 0  # running requests, and mixes of them
    users: Counter[str] = field(default_factory=Counter)  # those running requests, by tenant
    is_pinned: bool = False
    is_forgotten: bool = False  # to be removed as soon as nobody uses it
    failure: Exception | None = None  # of the last load, until those who waited for it are gone
    state_since: float = 0.0
    packed: PackedAdapter | None = None  # while staged or copying
    read: Future[PackedAdapter] | None = None
    copied: Future[None] | None = None
    page_map: PageMap | None = None  # while copying
    placed: PlacedAdapter | None = None  # while resident
    published_at: float = 0.0
    last_used: float = 0.0

    @property
    def is_unused(self) -> bool:
        """Whether no request runs on it and no pin keeps it."""
        return not self.users and not self.is_pinned

    @property
    def num_pages(self) -> int:
        if self.placed is not None:
            return self.placed.num_pages
        return self.packed.num_pages if self.packed is not None else 0

    def enter(self, state: State) -> float:
        """Change the state; the seconds spent in the one before."""
        now = time.monotonic()
        seconds, self.state, self.state_since = now - self.state_since, state, now
        return seconds
