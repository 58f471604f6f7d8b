"""Where an adapter is, and what is told of it when that changes."""

from __future__ import annotations

from typing import Literal

import msgspec

Tier = Literal["device", "host", "disk"]
TIERS: tuple[Tier, ...] = ("device", "host", "disk")  # nearest first: the nearer, the sooner its request can run


def farthest(tiers: list[Tier]) -> Tier | None:
    """The tier that a request has to wait for; None if it uses no adapter."""
    return max(tiers, key=TIERS.index, default=None)


class AdapterMove(msgspec.Struct, frozen=True):
    """An adapter has come to a tier or left one. Nothing is told of what stays where it is."""

    adapter_digest: str
    source: Tier
    target: Tier  # where it is now, nearest to the device
    size_bytes: int
    seconds: float = 0.0  # what it took, for a move towards the device


class CachedAdapter(msgspec.Struct, frozen=True):
    """One adapter that is held somewhere nearer than the disk."""

    adapter_digest: str
    tier: Tier
    num_pages: int
    size_bytes: int
    num_references: int  # running requests that use it
    num_waiting: int  # requests that wait for it
    is_pinned: bool
    num_uses: int  # requests since the engine started
    idle_seconds: float  # since the last one ended; 0 while in use
