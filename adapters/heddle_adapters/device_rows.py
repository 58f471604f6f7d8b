"""Adapters in the page pool: packing rows and vectors into pages, and the table that says where they lie.

The one file of this package that uses torch. A row never straddles pages; one longer than a page takes a run of
adjacent pages; nothing is padded to a common rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heddle_adapters.canonical import CompiledAdapter, Floats, SiteUpdate
from heddle_adapters.page_pool import PagePool
from heddle_adapters.run_allocator import OutOfSpace, RunAllocator
from heddle_kernels.row_table import ABSENT, RowTable

ALIGNMENT_BYTES = 16  # of every row and vector, so that kernels may load 16 bytes at a time
VECTOR_BYTES = 4  # vectors are float32: bfloat16 would lose up to 18 % of a small effect


@dataclass
class Run:
    """Adjacent pages being filled, and what they will hold."""

    num_pages: int
    used_bytes: int = 0
    pieces: list[tuple[int, Tensor]] = field(default_factory=list)  # (byte offset in the run, 1-D values)

    def content(self, page_bytes: int) -> Tensor:
        """The run's bytes, zero where nothing lies: uint8 [num_pages * page_bytes]."""
        content = torch.zeros(self.num_pages * page_bytes, dtype=torch.uint8)
        for offset, values in self.pieces:
            data = values.view(torch.uint8)
            content[offset : offset + data.shape[0]] = data
        return content


@dataclass(frozen=True)
class Place:
    """Where a row or vector lies inside a packed adapter."""

    run: int
    offset_bytes: int


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter ready to be copied into pages, wherever those turn out to lie."""

    runs: tuple[Tensor, ...]  # uint8 [pages of the run * page_bytes] each
    used_bytes: int  # rows and vectors without alignment and page ends
    sites: tuple[PackedSite, ...]
    num_pages: int


@dataclass(frozen=True)
class PackedSite:
    """One site's rows and vectors inside a packed adapter."""

    site: int
    a: tuple[Place, ...]  # [num_rows]
    b: tuple[Place, ...]  # [num_rows]
    gain: Floats  # [num_rows]
    c: Floats  # [num_rows]
    activation: int
    in_scale: Place | None
    out_scale: Place | None
    bias: Place | None


@dataclass(frozen=True)
class PlacedAdapter:
    """A resident adapter: its line in the table and the pages it holds."""

    slot: int
    heap_first: int
    num_rows: int
    run_pages: tuple[tuple[int, int], ...]  # (first page, number of pages) of each run

    @property
    def num_pages(self) -> int:
        return sum(length for _, length in self.run_pages)


class Packer:
    """Fills pages with the pieces of one adapter, in order, opening a new run when the next piece does not fit."""

    def __init__(self, page_bytes: int, row_dtype: torch.dtype) -> None:
        self._page_bytes = page_bytes
        self._row_dtype = row_dtype
        self._runs: list[Run] = []
        self._used_bytes = 0

    def pack(
        self, adapter: CompiledAdapter, site_index: dict[str, int], base_bias: Callable[[str], Floats | None]
    ) -> PackedAdapter:
        """Lay out every update. `base_bias(path)` gives b0 of a site, None where the base has none."""
        sites = tuple(self._pack_site(update, site_index[update.site], base_bias) for update in adapter.updates)
        return PackedAdapter(
            runs=tuple(run.content(self._page_bytes) for run in self._runs),
            used_bytes=self._used_bytes,
            sites=sites,
            num_pages=sum(run.num_pages for run in self._runs),
        )

    def _pack_site(self, update: SiteUpdate, site: int, base_bias: Callable[[str], Floats | None]) -> PackedSite:
        return PackedSite(
            site=site,
            a=tuple(self._rows(update.a)),
            b=tuple(self._rows(update.b)),
            gain=update.gain,
            c=update.c,
            activation=int(update.activation),
            in_scale=self._vector(update.in_scale),
            out_scale=self._vector(update.out_scale),
            bias=self._vector(_full_bias(update, base_bias(update.site))),
        )

    def _rows(self, rows: Floats) -> Iterator[Place]:
        for row in torch.from_numpy(rows).to(self._row_dtype):
            yield self._add(row)

    def _vector(self, vector: Floats | None) -> Place | None:
        return None if vector is None else self._add(torch.from_numpy(vector.astype(np.float32)))

    def _add(self, values: Tensor) -> Place:
        size_bytes = values.numel() * values.element_size()
        aligned_bytes = -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if not self._runs or self._runs[-1].used_bytes + aligned_bytes > self._runs[-1].num_pages * self._page_bytes:
            self._runs.append(Run(num_pages=-(-aligned_bytes // self._page_bytes)))
        run = self._runs[-1]
        place = Place(len(self._runs) - 1, run.used_bytes)
        run.pieces.append((run.used_bytes, values.contiguous()))
        run.used_bytes += aligned_bytes
        self._used_bytes += size_bytes
        return place


class DeviceRows:
    """The adapters that lie in the pool now. Called from the engine's thread only, between two steps."""

    def __init__(self, memory: Tensor, pool: PagePool, row_dtype: torch.dtype, num_sites: int) -> None:
        """`memory` is the pool's storage, uint8 [num_pages * page_bytes]."""
        self.rows = memory.view(row_dtype)  # flat
        self.vectors = memory.view(torch.float32)  # flat
        self.table = RowTable(num_slots=8, num_sites=num_sites, heap_capacity=1024)
        self._memory = memory
        self._pool = pool
        self._slots = RunAllocator(self.table.num_slots)
        self._heap = RunAllocator(self.table.heap_capacity)
        self._sites_of_slot: dict[int, frozenset[int]] = {}

    def place(self, packed: PackedAdapter) -> PlacedAdapter:
        """Copy into free pages and write the table's line. Raises OutOfSpace, leaving everything as it was."""
        run_pages = self._allocate_pages([run.shape[0] // self._pool.page_bytes for run in packed.runs])
        for (first, length), content in zip(run_pages, packed.runs, strict=True):
            begin = first * self._pool.page_bytes
            self._memory[begin : begin + length * self._pool.page_bytes].copy_(content)
        num_rows = sum(len(site.a) for site in packed.sites)
        slot, heap_first = self._reserve_line(num_rows)
        self._write_line(slot, heap_first, packed, [first for first, _ in run_pages])
        self._sites_of_slot[slot] = self.table.sites_of(slot)
        return PlacedAdapter(slot, heap_first, num_rows, run_pages)

    def remove(self, placed: PlacedAdapter) -> None:
        """Give pages, heap entries and the slot back; the pages are wiped, so that no next owner can read them."""
        self.table.clear(placed.slot)
        del self._sites_of_slot[placed.slot]
        for first, length in placed.run_pages:
            self._memory[first * self._pool.page_bytes : (first + length) * self._pool.page_bytes] = 0
            for page in range(first, first + length):
                self._pool.free(page)
        if placed.num_rows:
            self._heap.free(placed.heap_first, placed.num_rows)
        self._slots.free(placed.slot)

    def sites_of(self, slot: int) -> frozenset[int]:
        """The sites a resident adapter changes."""
        return self._sites_of_slot[slot]

    def _allocate_pages(self, lengths: list[int]) -> tuple[tuple[int, int], ...]:
        """Pages for runs of these lengths, the long ones first: so a free pool always has room for what fits in it."""
        self._pool.check_room(sum(lengths))
        taken: dict[int, tuple[int, int]] = {}
        try:
            for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
                taken[number] = (self._pool.allocate_run(lengths[number]), lengths[number])
        except OutOfSpace:
            for first, length in taken.values():
                for page in range(first, first + length):
                    self._pool.free(page)
            raise
        return tuple(taken[number] for number in range(len(lengths)))

    def _reserve_line(self, num_rows: int) -> tuple[int, int]:
        if self._slots.num_free == 0 or self._heap.num_free < num_rows:
            self._grow(num_rows)
        slot = self._slots.allocate()
        try:
            return slot, self._heap.allocate(num_rows) if num_rows else 0
        except OutOfSpace:  # enough entries, but scattered
            self._grow(num_rows)
            return slot, self._heap.allocate(num_rows)

    def _grow(self, num_rows: int) -> None:
        num_slots = 2 * self.table.num_slots if self._slots.num_free == 0 else self.table.num_slots
        self.table.grow(num_slots, 2 * self.table.heap_capacity + num_rows)
        self._slots.grow(self.table.num_slots)
        self._heap.grow(self.table.heap_capacity)

    def _write_line(self, slot: int, heap_first: int, packed: PackedAdapter, first_pages: list[int]) -> None:
        table, page_bytes = self.table, self._pool.page_bytes

        def offsets(places: tuple[Place, ...], element_bytes: int) -> NDArray[np.int64]:
            begin = [first_pages[place.run] * page_bytes + place.offset_bytes for place in places]
            return np.array(begin, dtype=np.int64) // element_bytes

        def vector(place: Place | None) -> int:
            return ABSENT if place is None else int(offsets((place,), VECTOR_BYTES)[0])

        row_bytes, entry = self.rows.element_size(), heap_first
        for packed_site in packed.sites:
            site, num_rows = packed_site.site, len(packed_site.a)
            table.first[slot, site], table.count[slot, site] = entry, num_rows
            heap = slice(entry, entry + num_rows)
            table.a_offset[heap] = torch.from_numpy(offsets(packed_site.a, row_bytes))
            table.b_offset[heap] = torch.from_numpy(offsets(packed_site.b, row_bytes))
            table.gain[heap] = torch.from_numpy(packed_site.gain)
            table.c[heap] = torch.from_numpy(packed_site.c)
            table.activation[heap] = packed_site.activation
            table.in_scale[slot, site] = vector(packed_site.in_scale)
            table.out_scale[slot, site] = vector(packed_site.out_scale)
            table.bias[slot, site] = vector(packed_site.bias)
            entry += num_rows


def _full_bias(update: SiteUpdate, base_bias: Floats | None) -> Floats | None:
    """The canonical bias vector: what the adapter adds, and what scaling the base's own bias amounts to."""
    if not update.scales_base_bias or base_bias is None or update.out_scale is None:
        return update.bias
    scaled = (update.out_scale - 1) * base_bias
    return scaled if update.bias is None else update.bias + scaled
