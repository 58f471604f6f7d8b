"""Which tokens of a flattened batch use which adapter slot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

BASE_SLOT = -1  # the slot of tokens that use no adapter


@dataclass(frozen=True)
class Segments:
    """Runs of neighbouring tokens that share a slot; built once per step, on the host.

    Semantics: tokens start[g] .. start[g + 1] - 1 use slot[g].
    """

    start: tuple[int, ...]  # [num_segments + 1], start[0] = 0, start[-1] = num_tokens
    slot: tuple[int, ...]  # [num_segments], BASE_SLOT = no adapter

    @classmethod
    def from_runs(cls, runs: Iterable[tuple[int, int]]) -> Segments:
        """Build from (slot, num_tokens) in batch order; neighbours of one slot become one segment."""
        start, slots = [0], list[int]()
        for slot, num_tokens in runs:
            if num_tokens == 0:
                continue
            if slots and slots[-1] == slot:
                start[-1] += num_tokens
            else:
                slots.append(slot)
                start.append(start[-1] + num_tokens)
        return cls(tuple(start), tuple(slots))

    @property
    def num_tokens(self) -> int:
        return self.start[-1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each segment."""
        return tuple(end - begin for begin, end in pairwise(self.start))

    def with_adapters(self) -> Iterator[tuple[int, int, int]]:
        """(begin, end, slot) of every segment that uses an adapter."""
        for begin, end, slot in zip(self.start, self.start[1:], self.slot, strict=False):
            if slot != BASE_SLOT:
                yield begin, end, slot
