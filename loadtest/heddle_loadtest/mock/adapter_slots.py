"""Which adapters the fake device holds, and when each is there. Moves no bytes and reads no clock."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple


class Loading(NamedTuple):
    """What one request meets."""

    cache: str  # where its adapter was: device, host or disk
    ready_at: float  # when it is on the device, on the caller's clock


class AdapterSlots:
    """The `num_slots` adapters used last are on the device; what was there before is on the host, the rest on disk.

    Loads run side by side. A request that finds its adapter being loaded waits for what is left of that.
    """

    def __init__(self, num_slots: int, load_seconds: float) -> None:
        self._num_slots = num_slots
        self._load_seconds = load_seconds
        self._loads: OrderedDict[str, Loading] = OrderedDict()  # of what is on the device, least recently used first
        self._on_host: set[str] = set()

    def use(self, adapter: str, now: float) -> Loading:
        """A request for `adapter` comes."""
        load = self._loads.pop(adapter, None)
        if load is None:
            load = Loading("host" if adapter in self._on_host else "disk", now + self._load_seconds)
            if len(self._loads) == self._num_slots:
                self._on_host.add(self._loads.popitem(last=False)[0])
        self._loads[adapter] = load
        return load if load.ready_at > now else Loading("device", now)
