"""Adapters in host memory, laid out as the device wants them: the tier between the disk and the device. No torch.

Reader threads put adapters in, the engine's thread looks them up and holds those that are on their way to the device.
"""

from __future__ import annotations

import threading
from collections import Counter
from functools import partial

from heddle_adapters.eviction import EvictionOrder
from heddle_adapters.packed_adapter import PackedAdapter


class HostTier:
    """Packed adapters by content digest, within a budget of bytes. Safe to call from any thread.

    What is held is never given up, even over the budget; the rest goes by the eviction order.
    """

    def __init__(self, budget_bytes: int, eviction: EvictionOrder) -> None:
        """`eviction` is this tier's own order. A budget of 0 keeps nothing longer than it is held."""
        self.budget_bytes = budget_bytes
        self.num_bytes = 0
        self.num_evictions = 0
        self._eviction = eviction
        self._adapters: dict[str, PackedAdapter] = {}
        self._holds: Counter[str] = Counter()
        self._evicted: list[str] = []
        self._lock = threading.Lock()

    @property
    def num_adapters(self) -> int:
        return len(self._adapters)

    @property
    def num_held_bytes(self) -> int:
        """Bytes of what cannot be given up now."""
        return self.num_bytes - self._eviction.num_bytes

    def digests(self) -> set[str]:
        with self._lock:
            return set(self._adapters)

    def touch(self, digest: str) -> None:
        """A request uses the adapter, whether it is here or not."""
        with self._lock:
            self._eviction.touch(digest)

    def get(self, digest: str) -> PackedAdapter | None:
        """The adapter if it is here."""
        with self._lock:
            return self._adapters.get(digest)

    def put(self, packed: PackedAdapter) -> PackedAdapter:
        """Enter what has been read, giving up others for it; the copy to use, which is the one that came first.

        Where it cannot fit beside what is held nothing is given up: it is here, over the budget, as long as it is held
        itself, and otherwise the caller's alone.
        """
        with self._lock:
            if (present := self._adapters.get(packed.digest)) is not None:
                return present
            if self._make_room(packed.size_bytes) or packed.digest in self._holds:
                self._enter(packed)
            return packed

    def hold(self, digest: str) -> None:
        """Do not give it up from now on, whether it is here or still to be put, until released as often as held."""
        with self._lock:
            self._holds[digest] += 1
            self._eviction.withdraw(digest)

    def release(self, digest: str) -> None:
        """One hold less; after the last it stays if there is room."""
        with self._lock:
            assert self._holds[digest] > 0, f"{digest} was released more often than held"
            self._holds[digest] -= 1
            if self._holds[digest]:
                return
            del self._holds[digest]
            if (packed := self._adapters.get(digest)) is not None:
                self._remove(digest)
                if self._make_room(packed.size_bytes):
                    self._enter(packed)
                else:
                    self._count_eviction(digest)

    def drop(self, digest: str) -> None:
        """Its content is gone for good. Whoever copies it just now keeps what it has."""
        with self._lock:
            if digest in self._adapters:
                self._remove(digest)
            self._eviction.forget(digest)

    def evicted(self) -> list[str]:
        """Digests given up for lack of room since this was last asked."""
        with self._lock:
            evicted, self._evicted = self._evicted, []
            return evicted

    def check_integrity(self) -> None:
        """The bytes add up, whatever is not held can be given up, and only what is held may exceed the budget."""
        with self._lock:
            sizes = {digest: packed.size_bytes for digest, packed in self._adapters.items()}
            assert self.num_bytes == sum(sizes.values()), f"{self.num_bytes} bytes are counted"
            idle = {digest for digest in sizes if digest not in self._holds}
            assert all(digest in self._eviction for digest in idle), "an adapter that nobody holds can never go"
            assert len(self._eviction) == len(idle), "an adapter is idle that is held or gone"
            assert self.num_bytes <= self.budget_bytes or len(idle) < len(sizes), "over the budget with nothing held"

    def _enter(self, packed: PackedAdapter) -> None:
        digest, size_bytes = packed.digest, packed.size_bytes
        self._adapters[digest] = packed
        self.num_bytes += size_bytes
        if digest not in self._holds:
            self._eviction.offer(digest, size_bytes, size_bytes, partial(self._give_back, digest))

    def _make_room(self, size_bytes: int) -> bool:
        """Give up idle adapters until so many bytes fit; none if that would not be enough."""
        if self.num_bytes - self._eviction.num_bytes + size_bytes > self.budget_bytes:
            return False
        while self.num_bytes + size_bytes > self.budget_bytes:
            self._eviction.pop().give_back()
        return True

    def _give_back(self, digest: str) -> None:
        self._remove(digest)
        self._count_eviction(digest)

    def _count_eviction(self, digest: str) -> None:
        self.num_evictions += 1
        self._evicted.append(digest)

    def _remove(self, digest: str) -> None:
        self.num_bytes -= self._adapters.pop(digest).size_bytes
