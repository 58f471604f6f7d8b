"""What the row kernels work on: a step's tiles, and the row table's mirror in device memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heddle_kernels.row_table import COLUMNS, HEAP_COLUMNS, SLOT_COLUMNS, RowTable
from heddle_kernels.segments import BASE_SLOT, Segments


@dataclass(frozen=True)
class TileShape:
    """How a step is cut into the tiles that programs take. What a tile has room for and a segment lacks is masked."""

    shrink_tokens: int
    shrink_rows: int
    expand_tokens: int


# Few tokens a segment, most often one. The smallest tile of a tensor core, its 16-wide side for the rows; `expand`
# reads a segment's rows again for every token, from the second on out of the cache.
DECODE = TileShape(shrink_tokens=8, shrink_rows=16, expand_tokens=1)
# Many tokens a segment: 64 is what Hopper's warp group instructions want.
PREFILL = TileShape(shrink_tokens=64, shrink_rows=64, expand_tokens=64)

# A tile is one line of these numbers, complete in itself, so that a program finds its work with one access.
FIRST_TOKEN, NUM_TOKENS, SLOT, H_BEGIN, H_STRIDE, FIRST_ROW = range(6)
TILE_COLUMNS = 6
NUM_COUNTERS = 2  # (tiles, token tiles)


class PlanTooLarge(ValueError):
    """A step does not fit the capacity that a CUDA graph was captured with."""


@dataclass(frozen=True)
class PlanCapacity:
    """The largest step that a CUDA graph takes."""

    num_tiles: int
    num_token_tiles: int
    num_h_values: int

    @property
    def num_words(self) -> int:
        """Of the packed plan, int32 each."""
        return NUM_COUNTERS + TILE_COLUMNS * (self.num_tiles + self.num_token_tiles)


@dataclass(frozen=True)
class TritonRowPlan:
    """A step's work, in device memory. Every tile lies within one segment.

    The dot product of token t with row i of a group, as far as split p of the sum goes, is
    `h[p, h_begin + (t - first_token) * h_stride + i]`. h_stride is the most rows that any group has for the slot, so
    one plan serves all groups; tiles that begin beyond a group's rows have no work there.
    """

    counters: Tensor  # [2] int32: how many lines of `tiles` and of `token_tiles` are filled
    tiles: Tensor  # [num_tiles, 6] int32, of segments with rows: work of `shrink`
    token_tiles: Tensor  # [num_token_tiles, 6] int32, of all segments, FIRST_ROW 0: work of `expand`
    num_h_values: int
    shape: TileShape

    @staticmethod
    def pack(
        segments: Segments, rows_of_slot: NDArray[np.int32], shape: TileShape, capacity: PlanCapacity | None = None
    ) -> PackedPlan:
        """Lay out a step's work in one array, so that one copy takes it to the device.

        rows_of_slot [num_slots] is the most rows that any group has for each slot. Without a capacity the plan is
        exactly as large as the step. Raises PlanTooLarge if the step exceeds the capacity.
        """
        start, slot = np.array(segments.start, np.int32), np.array(segments.slot, np.int32)
        num_rows = np.where(slot == BASE_SLOT, 0, rows_of_slot[slot])
        lines = np.zeros((len(slot), TILE_COLUMNS), np.int32)  # each segment as one tile
        lines[:, FIRST_TOKEN], lines[:, NUM_TOKENS] = start[:-1], np.diff(start)
        lines[:, SLOT], lines[:, H_STRIDE] = slot, num_rows
        num_values = lines[:, NUM_TOKENS] * num_rows
        lines[:, H_BEGIN] = _begins(num_values)
        tiles = _cut_rows(_cut_tokens(lines[num_rows > 0], shape.shrink_tokens), shape.shrink_rows)
        token_tiles = _cut_tokens(lines, shape.expand_tokens)
        needed = PlanCapacity(len(tiles), len(token_tiles), int(num_values.sum()))
        return PackedPlan(_join(tiles, token_tiles, _fit(needed, capacity)), capacity or needed, shape)


@dataclass(frozen=True)
class PackedPlan:
    """A plan in host memory."""

    words: NDArray[np.int32]  # [capacity.num_words]: counters, tiles, token tiles
    capacity: PlanCapacity
    shape: TileShape

    def views(self, words: Tensor) -> TritonRowPlan:
        """The plan, once `words` (int32, in device memory, at least as many) holds a copy of this one's."""
        lines = words[NUM_COUNTERS : self.capacity.num_words].view(-1, TILE_COLUMNS)
        tiles, token_tiles = lines[: self.capacity.num_tiles], lines[self.capacity.num_tiles :]
        return TritonRowPlan(words[:NUM_COUNTERS], tiles, token_tiles, self.capacity.num_h_values, self.shape)


class DeviceTable:
    """The row table in device memory, for kernels to read; see RowTable for what the tensors mean."""

    first: Tensor  # [num_slots, num_sites] int32
    count: Tensor  # [num_slots, num_sites] int32
    in_scale: Tensor  # [num_slots, num_sites] int64
    out_scale: Tensor  # [num_slots, num_sites] int64
    bias: Tensor  # [num_slots, num_sites] int64
    a_offset: Tensor  # [heap_capacity] int64
    b_offset: Tensor  # [heap_capacity] int64
    gain: Tensor  # [heap_capacity] float32
    c: Tensor  # [heap_capacity] float32
    activation: Tensor  # [heap_capacity] int8
    generation: int  # counts how often the tensors were replaced, after which captured graphs read freed memory

    def __init__(self, table: RowTable, device: torch.device) -> None:
        self._device = device
        self.generation = 0
        table.take_changes()
        self._copy_all(table)

    @property
    def num_sites(self) -> int:
        return self.first.shape[1]

    def sync(self, table: RowTable) -> NDArray[np.int64]:
        """Copy what changed since the last time, between two steps and on their stream. Returns the changed slots."""
        changes = table.take_changes()
        if changes.has_grown:
            self.generation += 1
            self._copy_all(table)
            return np.arange(table.num_slots)
        slots = torch.tensor(sorted(changes.slots), dtype=torch.int64)
        if len(slots):
            on_device = slots.to(self._device)
            for name in SLOT_COLUMNS:
                getattr(self, name)[on_device] = getattr(table, name)[slots].to(self._device)
        for entries in changes.heap:
            for name in HEAP_COLUMNS:
                getattr(self, name)[entries].copy_(getattr(table, name)[entries])
        return slots.numpy()

    def _copy_all(self, table: RowTable) -> None:
        for name in COLUMNS:
            setattr(self, name, getattr(table, name).to(self._device, copy=True))


def _fit(needed: PlanCapacity, capacity: PlanCapacity | None) -> PlanCapacity:
    if capacity is None:
        return needed
    for name, number in vars(needed).items():
        if number > (limit := getattr(capacity, name)):
            raise PlanTooLarge(f"the step needs {number} {name.removeprefix('num_')}, the graph has room for {limit}")
    return capacity


def _join(tiles: NDArray[np.int32], token_tiles: NDArray[np.int32], capacity: PlanCapacity) -> NDArray[np.int32]:
    words = np.zeros(capacity.num_words, np.int32)
    words[:NUM_COUNTERS] = len(tiles), len(token_tiles)
    words[NUM_COUNTERS:][: tiles.size] = tiles.ravel()
    words[NUM_COUNTERS + TILE_COLUMNS * capacity.num_tiles :][: token_tiles.size] = token_tiles.ravel()
    return words


def _cut_tokens(tiles: NDArray[np.int32], most_tokens: int) -> NDArray[np.int32]:
    """The same work in tiles of at most so many tokens."""
    whole, nth = _enumerate(-(-tiles[:, NUM_TOKENS] // most_tokens))
    cut, passed = tiles[whole], nth * most_tokens
    cut[:, FIRST_TOKEN] += passed
    cut[:, NUM_TOKENS] = np.minimum(cut[:, NUM_TOKENS] - passed, most_tokens)
    cut[:, H_BEGIN] += passed * cut[:, H_STRIDE]
    return cut


def _cut_rows(tiles: NDArray[np.int32], most_rows: int) -> NDArray[np.int32]:
    """The same work in tiles of at most so many rows."""
    whole, nth = _enumerate(-(-tiles[:, H_STRIDE] // most_rows))
    cut = tiles[whole]
    cut[:, FIRST_ROW] = nth * most_rows
    return cut


def _begins(lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    """Where spans of these lengths begin if they lie one after another."""
    begins: NDArray[np.int32] = np.cumsum(lengths, dtype=np.int32) - lengths
    return begins


def _enumerate(counts: NDArray[np.int32]) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
    """For `counts[i]` things of every i, one after another: whose each is, and the how-manieth of its owner."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner), dtype=np.int32) - _begins(counts)[owner]
