"""Which idle thing gives way first when a memory tier is full: one order for everything in it. No torch, no clock.

A thing's priority is a number that is computed when it is used or set idle and that nothing but its next use changes,
so the smallest, which goes first, stands at the top of a heap. Three policies compute that number:

    lru    last_used
    gdsf   num_uses * density + the priority of what was given up last
           (GreedyDual-Size-Frequency: Cherkasova, "Improving WWW Proxies Performance", HPL-98-69R1, 1998)
    cost   last_used + PATIENCE * log2(decayed uses * density)

where density is what having the thing again costs per byte that it takes. `cost` is LRU with a head start: a thing that
was used twice as often, or costs twice as much, stays so much longer. Time is counted in turnovers: one has passed when
things were used as many times as there are things here, so that the same constants suit a tier of ten things and one of
ten thousand, and a server at rest forgets nothing.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

Key = str | bytes  # an adapter's digest, a cached page's prefix key

# Chosen by the simulator of `heddle bench eviction`: bytes loaded again, beside the best of all that was tried in each
# case, are 1.050, 1.035, 1.028, 1.033 on average and 1.15, 1.11, 1.15, 1.42 at worst for a patience of 1, 1.5, 2, 3, so
# 1.5 is the safe one. With it, a memory of 5, 10, 20 or without end gives 1.049, 1.039, 1.035, 1.045.
PATIENCE = 1.5  # turnovers for every doubling
MEMORY = 20.0  # turnovers until a use counts half; above PATIENCE, so that a further use never lowers a priority
NUM_REMEMBERED = 8192  # things given up whose use is still known, so that a popular one comes back as a popular one


@dataclass(slots=True)
class Usage:
    """How a thing has been used, as far as any policy wants to know."""

    num_uses: int = 0
    decayed_uses: float = 0.0
    last_used: float = 0.0  # in turnovers since the beginning

    def count(self, now: float) -> None:
        self.num_uses += 1
        self.decayed_uses = 1.0 + self.decayed_uses * 2.0 ** ((self.last_used - now) / MEMORY)
        self.last_used = now


@dataclass(frozen=True, slots=True)
class Idle:
    """A thing that nobody uses and that can be had again."""

    key: Key
    size_bytes: int
    reload_bytes: int  # what having it again costs, in bytes copied
    give_back: Callable[[], None]  # frees its memory; to be called once it has left the order

    @property
    def density(self) -> float:
        return self.reload_bytes / self.size_bytes


Entry = tuple[float, int, Key]  # priority, a number that grows, key
Policy = Callable[[Usage, float, float], float]  # of the use, the density and the priority of what was given up last


def _lru(usage: Usage, density: float, inflation: float) -> float:
    return usage.last_used


def _gdsf(usage: Usage, density: float, inflation: float) -> float:
    return inflation + usage.num_uses * density


def _cost(usage: Usage, density: float, inflation: float) -> float:
    return usage.last_used + PATIENCE * math.log2(usage.decayed_uses * density)


POLICIES: dict[str, Policy] = {"lru": _lru, "gdsf": _gdsf, "cost": _cost}


class EvictionOrder:
    """The idle things of one memory tier, least valuable first. Every call takes O(log n)."""

    def __init__(self, policy: str) -> None:
        """`policy` is a name of `POLICIES`."""
        self.policy = policy
        self.num_bytes = 0  # of everything idle
        self._compute_priority = POLICIES[policy]
        self._now = 0.0  # turnovers
        self._inflation = 0.0
        self._idle: dict[Key, Idle] = {}
        self._heap: list[Entry] = []
        self._entry: dict[Key, Entry] = {}  # the one of each idle thing that counts; the others are out of date
        self._num_entries = 0
        self._usage: dict[Key, Usage] = {}  # of what has been offered and is still here, idle or in use
        self._remembered: OrderedDict[Key, Usage] = OrderedDict()  # of what is not, longest gone first

    def __len__(self) -> int:
        return len(self._idle)

    def __contains__(self, key: Key) -> bool:
        return key in self._idle

    def touch(self, key: Key) -> None:
        """A request uses `key`, whether it is here or not."""
        self._now += 1.0 / max(1, len(self._usage))
        usage = self._usage.get(key)
        if usage is None:
            usage = self._remembered.pop(key, None) or Usage()
            self._remember(key, usage)
        usage.count(self._now)
        if (idle := self._idle.get(key)) is not None:
            self._rank(idle)

    def offer(self, key: Key, size_bytes: int, reload_bytes: int, give_back: Callable[[], None]) -> None:
        """Nobody uses `key` now. Among equals, what was offered first goes first.

        What was never touched counts as used once, now.
        """
        assert key not in self._idle, f"{key!r} is idle already"
        usage = self._usage.get(key) or self._remembered.pop(key, None) or Usage()
        if not usage.num_uses:
            usage.count(self._now)
        usage.last_used = self._now
        self._usage[key] = usage
        self._idle[key] = idle = Idle(key, size_bytes, reload_bytes, give_back)
        self.num_bytes += size_bytes
        self._rank(idle)

    def withdraw(self, key: Key) -> None:
        """It is in use again, if it was idle, to be offered again or forgotten."""
        if (idle := self._idle.pop(key, None)) is not None:
            del self._entry[key]
            self.num_bytes -= idle.size_bytes

    def priority(self, key: Key) -> float:
        """Of an idle thing; to be compared with that of other idle things."""
        return self._entry[key][0]

    def worst(self) -> Idle | None:
        """The idle thing that goes first."""
        while self._heap and not self._is_valid(self._heap[0]):
            heapq.heappop(self._heap)
        return self._idle[self._heap[0][2]] if self._heap else None

    def pop(self, key: Key | None = None) -> Idle:
        """The idle thing that goes first, or `key`, removed from the order for the caller to give back.

        How it was used is remembered.
        """
        if key is None:
            worst = self.worst()
            assert worst is not None, "nothing is idle"
            self._inflation, _, key = self._entry[worst.key]
        idle = self._idle[key]
        self.withdraw(key)
        self._remember(key, self._usage.pop(key))
        return idle

    def forget(self, key: Key) -> None:
        """It is gone for good: nothing is remembered of it."""
        self.withdraw(key)
        self._usage.pop(key, None)
        self._remembered.pop(key, None)

    def _rank(self, idle: Idle) -> None:
        """Enter an idle thing into the heap by its priority now; its earlier entry, if any, no longer counts."""
        priority = self._compute_priority(self._usage[idle.key], idle.density, self._inflation)
        self._num_entries += 1
        self._entry[idle.key] = entry = (priority, self._num_entries, idle.key)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 64 + 2 * len(self._idle):  # mostly out of date
            self._heap = list(self._entry.values())
            heapq.heapify(self._heap)

    def _is_valid(self, entry: Entry) -> bool:
        return self._entry.get(entry[2]) is entry

    def _remember(self, key: Key, usage: Usage) -> None:
        self._remembered[key] = usage
        if len(self._remembered) > NUM_REMEMBERED:
            self._remembered.popitem(last=False)
