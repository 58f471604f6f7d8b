"""First-fit allocation of runs of units from a fixed range, without torch."""

from __future__ import annotations


class OutOfSpace(Exception):
    """No run of the wanted length is free."""


class RunAllocator:
    """Hands out runs of adjacent units; a freed run may be handed out again in any other shape."""

    def __init__(self, capacity: int) -> None:
        self._free = bytearray(b"\x01" * capacity)  # one byte per unit, 1 = free: searched at memchr speed
        self._lowest = 0  # no unit below it is free, so that single units are found at once
        self.num_free = capacity

    @property
    def capacity(self) -> int:
        return len(self._free)

    def allocate(self, length: int = 1) -> int:
        """First unit of a free run of `length`. Raises OutOfSpace."""
        first = self._free.find(b"\x01" * length, self._lowest)
        if first < 0:
            raise OutOfSpace(f"no run of {length} free among {self.num_free} free of {self.capacity}")
        self._free[first : first + length] = bytes(length)
        if length == 1:  # the first free unit of all; a longer run may have passed over some
            self._lowest = first + 1
        self.num_free -= length
        return first

    def free(self, first: int, length: int = 1) -> None:
        assert not any(self._free[first : first + length]), "freed twice"
        self._free[first : first + length] = b"\x01" * length
        self._lowest = min(self._lowest, first)
        self.num_free += length

    def is_free(self, unit: int) -> bool:
        return bool(self._free[unit])

    def grow(self, capacity: int) -> None:
        self.num_free += capacity - self.capacity
        self._free.extend(b"\x01" * (capacity - self.capacity))
