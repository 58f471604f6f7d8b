"""The adapters and mixes that lie in the page pool now, and the table that says where.

The one file of this package that uses torch. An adapter comes in three acts, so that no step waits for a copy: the
engine's thread reserves pages, another thread copies, the engine's thread publishes the table's line between two
steps. Pages are not wiped: every byte of every page is written by the copy, and the table names nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.canonical import Floats
from heddle_adapters.packed_adapter import ABSENT, PackedAdapter
from heddle_adapters.packer import ALIGNMENT_BYTES, PageSpace, aligned
from heddle_adapters.page_pool import PagePool
from heddle_adapters.positions import Positions
from heddle_adapters.run_allocator import OutOfSpace, RunAllocator
from heddle_kernels.row_table import RowTable

VECTOR_BYTES = 4  # of a float32
QUAD = ALIGNMENT_BYTES // VECTOR_BYTES

# By site: the rows of [out_features, in_features] one below the other, as pieces [num_rows, in_features] of the pool.
Deltas = Mapping[int, tuple[Tensor, ...]]
NO_DELTAS: Deltas = {}


@dataclass(frozen=True, eq=False)
class PageMap:
    """Pages of the pool that are taken for an adapter."""

    pages: NDArray[np.int64]  # [num_pages] page of the pool that holds each page of the adapter
    freed: torch.cuda.Event | None  # on CUDA: passed when no step can still be using what lay there before

    def place(self, offsets: NDArray[np.int64], page_bytes: int) -> NDArray[np.int64]:
        """Bytes from the adapter's beginning -> bytes from the pool's beginning."""
        page, in_page = np.divmod(offsets, page_bytes)
        return self.pages[page] * page_bytes + in_page


@dataclass(frozen=True)
class PlacedAdapter:
    """A resident adapter: its line in the table and the pages it holds."""

    slot: int
    heap_first: int
    num_rows: int
    page_map: PageMap
    used_bytes: int  # rows and vectors without alignment and page ends
    num_prefix_tokens: int = 0  # whose keys and values lie in the first pages of its page map
    num_prefix_pages: int = 0
    positions: Positions = field(default_factory=Positions)  # of the tokens that it changes
    answers_tokens: bool = False  # whether tokens of the vocabulary have rows of its own

    @property
    def num_pages(self) -> int:
        return len(self.page_map.pages)

    @property
    def prefix_pages(self) -> list[int]:
        """Pages of the pool that hold its own keys and values, in order."""
        pages: list[int] = self.page_map.pages[: self.num_prefix_pages].tolist()
        return pages


@dataclass(frozen=True)
class PlacedMix:
    """A mix of resident adapters, which must stay resident as long as it does: their rows are its own."""

    slot: int
    heap_first: int
    num_rows: int
    page_map: PageMap  # of its vectors only
    used_bytes: int  # its vectors, each filled up to its alignment

    @property
    def num_pages(self) -> int:
        return len(self.page_map.pages)


@dataclass(frozen=True)
class PlacedTokens:
    """What an adapter's embedding answers to some tokens."""

    token_ids: NDArray[np.int64]  # [num_tokens], ascending
    offsets: NDArray[np.int64]  # [num_tokens], of rows of hidden_size in `DeviceRows.rows`
    reach_head: bool

    def find(self, token_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of these tokens, which are answered, and each one's offset."""
        place = np.minimum(np.searchsorted(self.token_ids, token_ids), len(self.token_ids) - 1)
        found = np.flatnonzero(self.token_ids[place] == token_ids)
        return found, self.offsets[place[found]]


@dataclass(frozen=True)
class LineSummary:
    """What a step must know of a table's line before it looks at single sites."""

    touched_sites: frozenset[int]  # where rows, vectors, deltas or tokens change anything
    touched_places: frozenset[int]  # of those, what is no linear
    scaled_input_sites: frozenset[int]  # of those, where the input is scaled
    deltas: Deltas = field(default_factory=dict)  # by site, see `DeviceRows._deltas`
    tokens: PlacedTokens | None = None
    is_plain: bool = True  # whether rows and vectors of linears and blocks are all there is


class DeviceRows:
    """Called from the engine's thread, between two steps, but for `copy` and `allocate_host`."""

    def __init__(
        self,
        memory: Tensor,
        pool: PagePool,
        row_dtype: torch.dtype,
        layout: BaseLayout,
        base_bias: Mapping[str, Floats],
    ) -> None:
        """`memory` is the pool's storage, uint8 [num_pages * page_bytes]; `base_bias` as for the Packer."""
        self.rows = memory.view(row_dtype)  # flat
        self.vectors = memory.view(torch.float32)  # flat
        self.table = RowTable(num_slots=64, num_sites=len(layout.sites), heap_capacity=1 << 16)
        self._widths = [(site.in_features, site.out_features) for site in layout.sites]
        self._vocabulary_size = layout.vocabulary_size
        kinds = [site.kind for site in layout.sites]
        self._places = frozenset(number for number, kind in enumerate(kinds) if kind != "linear")
        self._rare_places = frozenset(number for number, kind in enumerate(kinds) if kind in ("norm", "embedding"))
        self.graph_places = self._places - self._rare_places  # where a captured step may change anything
        self._head_site = None if layout.head is None else layout.index()[layout.head]
        self._pages = memory.view(pool.num_pages, pool.page_bytes)
        self._pool = pool
        self._mixer = VectorMixer(layout, base_bias, memory.device)
        self._copy_stream = torch.cuda.Stream(memory.device) if memory.is_cuda else None  # type: ignore[no-untyped-call]
        self._slots = RunAllocator(self.table.num_slots)
        self._heap = RunAllocator(self.table.heap_capacity)
        self._line_of_slot: dict[int, LineSummary] = {}

    def allocate_host(self, num_bytes: int) -> NDArray[np.uint8]:
        """Memory to read an adapter's pages into: pinned where the device copies from it, uninitialised."""
        buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._copy_stream is not None)
        content: NDArray[np.uint8] = buffer.numpy()
        return content

    def reserve(self, packed: PackedAdapter) -> PageMap:
        """Take pages for it. Raises OutOfSpace, and then takes nothing."""
        assert packed.page_bytes == self._pool.page_bytes, "packed for another size of pages"
        return self._reserve_pages(packed.run_lengths)

    def copy(self, packed: PackedAdapter, page_map: PageMap) -> None:
        """Write every byte of the reserved pages; returns when they are there. Any thread may call it."""
        if self._copy_stream is None:
            target = self._pages.numpy()  # numpy copies in this thread alone, and lets the others run meanwhile
            for source, pages in _stretches(page_map.pages):
                target[pages] = packed.pages[source]
            return
        content = torch.from_numpy(packed.pages)
        with torch.cuda.stream(self._copy_stream):
            if page_map.freed is not None:
                self._copy_stream.wait_event(page_map.freed)
            for source, pages in _stretches(page_map.pages):
                self._pages[pages].copy_(content[source], non_blocking=True)
            is_there = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            is_there.record(self._copy_stream)
        is_there.synchronize()

    def publish(self, packed: PackedAdapter, page_map: PageMap) -> PlacedAdapter:
        """Write the table's line of an adapter whose copy is complete."""
        slot, heap_first = self._reserve_line(packed.num_rows)
        table, page_bytes, row_bytes = self.table, self._pool.page_bytes, self.rows.element_size()
        table.first.numpy()[slot, packed.site] = heap_first + _begins(packed.count)
        table.count.numpy()[slot, packed.site] = packed.count
        heap = slice(heap_first, heap_first + packed.num_rows)
        table.a_offset.numpy()[heap] = page_map.place(packed.a_offset, page_bytes) // row_bytes
        table.b_offset.numpy()[heap] = page_map.place(packed.b_offset, page_bytes) // row_bytes
        table.gain.numpy()[heap] = packed.gain
        table.c.numpy()[heap] = packed.c
        table.activation.numpy()[heap] = packed.activation
        for column, offsets in zip(
            vector_columns(table), (packed.in_scale, packed.out_scale, packed.bias), strict=True
        ):
            present = offsets != ABSENT
            column[slot, packed.site[present]] = page_map.place(offsets[present], page_bytes) // VECTOR_BYTES
        self._finish_line(slot, heap, self._deltas(packed, page_map), self._tokens(packed, page_map))
        return PlacedAdapter(
            slot=slot,
            heap_first=heap_first,
            num_rows=packed.num_rows,
            page_map=page_map,
            used_bytes=packed.used_bytes,
            num_prefix_tokens=packed.num_prefix_tokens,
            num_prefix_pages=packed.num_prefix_pages,
            positions=packed.positions,
            answers_tokens=bool((packed.token_id < self._vocabulary_size).any()),
        )

    def _deltas(self, packed: PackedAdapter, page_map: PageMap) -> Deltas:
        """Views of the pool, in as many pieces as the rows of each delta lie in."""
        row_bytes = self.rows.element_size()
        offsets = page_map.place(packed.delta_offset, self._pool.page_bytes) // row_bytes
        deltas, begin = dict[int, tuple[Tensor, ...]](), 0
        for site in packed.delta_site.tolist():
            width, num_rows = self._widths[site]
            stride = aligned(width * row_bytes) // row_bytes
            pieces, first = list[Tensor](), 0
            own = offsets[begin : begin + num_rows]
            for end in (np.flatnonzero(np.diff(own, append=-1) != stride) + 1).tolist():
                pieces.append(self.rows.as_strided((end - first, width), (stride, 1), int(own[first])))
                first = end
            deltas[site] = tuple(pieces)
            begin += num_rows
        return deltas

    def _tokens(self, packed: PackedAdapter, page_map: PageMap) -> PlacedTokens | None:
        if not len(packed.token_id):
            return None
        offsets = page_map.place(packed.token_offset, self._pool.page_bytes) // self.rows.element_size()
        return PlacedTokens(packed.token_id, offsets, packed.tokens_reach_head)

    def cancel(self, page_map: PageMap) -> None:
        """Give back pages that were reserved and will not be published; no copy into them may be under way."""
        for page in page_map.pages.tolist():
            self._pool.free(page)

    def remove(self, placed: PlacedAdapter) -> None:
        """Give pages, heap entries and the slot back. No mix of it may be left."""
        self._remove_line(placed)

    def compose(
        self, parts: Sequence[tuple[PlacedAdapter, float]], ranks: Sequence[int | None] | None = None
    ) -> PlacedMix:
        """The mix of these adapters, each with its scale: the sum of what they add, the product of what they scale.

        Rows are listed again with scaled gains, and lie where they lay; of a part that has a rank, the first `rank` of
        each site. Vectors are new: biases are summed in the order of the parts, a factor l counts as
        1 + scale * (l - 1). The parts must be in use, so that nothing gives them up to make room for the mix. Raises
        OutOfSpace, and then takes nothing.
        """
        for placed, _ in parts:
            self._check_is_no_more_than_sites(placed)
        slots, scales = np.array([placed.slot for placed, _ in parts]), [scale for _, scale in parts]
        vectors = self._mixer.mix(self.table, self.vectors, slots, scales)
        counts = self.table.count.numpy()[slots]  # [num_parts, num_sites]
        if ranks is not None:
            most = [np.iinfo(np.int32).max if rank is None else rank for rank in ranks]
            counts = np.minimum(counts, np.array(most)[:, None])
        num_rows = int(counts.sum())
        page_map, offsets = self._place_vectors(vectors)
        slot, heap_first = self._reserve_line(num_rows)
        for column, begin in zip(vector_columns(self.table), vectors.columns_of(offsets), strict=True):
            column[slot] = begin
        self._list_rows(slot, heap_first, slots, scales, counts)
        self._finish_line(slot, slice(heap_first, heap_first + num_rows))
        return PlacedMix(slot, heap_first, num_rows, page_map, vectors.values.nbytes)

    def remove_mix(self, mix: PlacedMix) -> None:
        """Give the mix's own pages, heap entries and slot back."""
        self._remove_line(mix)

    def width_of(self, site: int) -> int:
        """out_features of a site."""
        return self._widths[site][1]

    def line_of(self, slot: int) -> LineSummary:
        """Where a resident adapter or mix changes anything."""
        return self._line_of_slot[slot]

    def _reserve_pages(self, run_lengths: NDArray[np.int32]) -> PageMap:
        """Pages for runs of these lengths, the long ones first: so a free pool has room for whatever fits in it."""
        self._pool.check_room(int(run_lengths.sum()))
        pages, begins = np.empty(run_lengths.sum(), np.int64), _begins(run_lengths)
        singles = run_lengths == 1
        taken: list[int] = []
        try:
            for run in np.argsort(-run_lengths, kind="stable")[: np.count_nonzero(~singles)].tolist():
                length = int(run_lengths[run])
                adjacent = range(first := self._pool.allocate_run(length), first + length)
                taken += adjacent
                pages[begins[run] : begins[run] + length] = adjacent
            pages[begins[singles]] = self._pool.allocate(int(np.count_nonzero(singles)))
        except OutOfSpace:
            for page in taken:
                self._pool.free(page)
            raise
        return PageMap(pages, self._record_event())

    def _record_event(self) -> torch.cuda.Event | None:
        """On CUDA, the moment up to which the steps have been given to the device."""
        if self._copy_stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._pages.device))
        return event

    def _place_vectors(self, vectors: MixedVectors) -> tuple[PageMap, NDArray[np.int64]]:
        """Write a mix's vectors into pages of its own; where each begins in the pool, in floats [num_vectors]."""
        space = PageSpace(self._pool.page_bytes)
        offsets = space.place([(1, num_quads * ALIGNMENT_BYTES) for num_quads in vectors.widths.tolist()])
        page_map = self._reserve_pages(np.array(space.run_lengths, np.int32))
        begins = np.concatenate([np.zeros(0, np.int64), *offsets])
        begins = page_map.place(begins, self._pool.page_bytes) // VECTOR_BYTES
        target = _index(begins // QUAD, vectors.widths, self.vectors.device)
        self.vectors.view(-1, QUAD).index_copy_(0, target, vectors.values)
        return page_map, begins

    def _check_is_no_more_than_sites(self, placed: PlacedAdapter) -> None:
        """What has more than rows and vectors is used alone; it is refused before it comes here."""
        line = self._line_of_slot[placed.slot]
        assert not line.deltas, "a dense delta in a mix"
        assert line.tokens is None, "an embedding's rows in a mix"
        assert not placed.num_prefix_tokens, "keys and values in a mix"
        assert placed.positions.are_all, "an adapter of some tokens only in a mix"

    def _list_rows(
        self,
        slot: int,
        heap_first: int,
        slots: NDArray[np.int64],
        scales: Sequence[float],
        counts: NDArray[Any],
    ) -> None:
        """At every site the first rows of all parts, one part after another, their gains scaled.

        counts [num_parts, num_sites] says how many.
        """
        table = self.table
        first = heap_first + _begins(counts.sum(axis=0))  # [num_sites]
        table.first.numpy()[slot] = first
        table.count.numpy()[slot] = counts.sum(axis=0)
        targets = first + np.cumsum(counts, axis=0) - counts  # [num_parts, num_sites]
        for part_slot, scale, target, count in zip(slots, scales, targets, counts, strict=True):
            source, destination = _spans(table.first.numpy()[part_slot], count), _spans(target, count)
            for heap in (table.a_offset, table.b_offset, table.gain, table.c, table.activation):
                heap.numpy()[destination] = heap.numpy()[source]
            table.gain.numpy()[destination] *= np.float32(scale)

    def _reserve_line(self, num_rows: int) -> tuple[int, int]:
        """A slot and the first of `num_rows` heap entries; the table grows as it must."""
        if self._slots.num_free == 0:
            self._grow(2 * self.table.num_slots, self.table.heap_capacity)
        try:
            heap_first = self._heap.allocate(num_rows) if num_rows else 0
        except OutOfSpace:  # too few entries, or too scattered
            self._grow(self.table.num_slots, 2 * self.table.heap_capacity + num_rows)
            heap_first = self._heap.allocate(num_rows)
        return self._slots.allocate(), heap_first

    def _grow(self, num_slots: int, heap_capacity: int) -> None:
        self.table.grow(num_slots, heap_capacity)
        self._slots.grow(num_slots)
        self._heap.grow(heap_capacity)

    def _finish_line(
        self, slot: int, heap: slice, deltas: Deltas = NO_DELTAS, tokens: PlacedTokens | None = None
    ) -> None:
        touched = self.table.sites_of(slot).union(deltas)
        if tokens is not None and tokens.reach_head and self._head_site is not None:
            touched = touched.union([self._head_site])
        scaled = (self.table.in_scale.numpy()[slot] != ABSENT).nonzero()[0]
        self._line_of_slot[slot] = LineSummary(
            touched_sites=touched,
            touched_places=touched & self._places,
            scaled_input_sites=frozenset(scaled.tolist()),
            deltas=deltas,
            tokens=tokens,
            is_plain=not deltas and tokens is None and touched.isdisjoint(self._rare_places),
        )
        self.table.note_change(slot, heap)

    def _remove_line(self, placed: PlacedAdapter | PlacedMix) -> None:
        self.table.clear(placed.slot)
        del self._line_of_slot[placed.slot]
        self.cancel(placed.page_map)
        if placed.num_rows:
            self._heap.free(placed.heap_first, placed.num_rows)
        self._slots.free(placed.slot)


@dataclass(frozen=True)
class MixedVectors:
    """A mix's vectors, computed and not yet placed. Vectors are numbered as in `VectorMixer`."""

    numbers: NDArray[np.int64]  # [num_vectors], ascending
    widths: NDArray[np.int64]  # [num_vectors], in quads
    values: Tensor  # [sum of widths, 4] float32, one vector after another
    num_sites: int

    def columns_of(self, begins: NDArray[np.int64]) -> NDArray[np.int64]:
        """The table's three columns for vectors that begin there: [3, num_sites]."""
        line = np.full(3 * self.num_sites, ABSENT, np.int64)
        line[self.numbers] = begins
        return line.reshape(3, self.num_sites)


class VectorMixer:
    """Computes the vectors of mixes for one base, all sites at once.

    A vector's number is its place in a table line's three columns one after another: site s has its in_scale at s, its
    out_scale at num_sites + s and its bias at 2 * num_sites + s. Vectors are gathered by quads, the four floats that
    their alignment keeps together; what fills a vector's last one up is never read.
    """

    def __init__(self, layout: BaseLayout, base_bias: Mapping[str, Floats], device: torch.device) -> None:
        in_features = [site.in_features for site in layout.sites]
        out_features = [site.out_features for site in layout.sites]
        self._num_sites = len(layout.sites)
        self._widths = _num_quads(np.array(in_features + out_features + out_features))
        self._has_base_bias = np.array([site.path in base_bias for site in layout.sites])
        bias_widths = np.where(self._has_base_bias, self._widths[-self._num_sites :], 0)
        self._bias_begins = _begins(bias_widths)  # [num_sites], in _base_bias
        padded = np.zeros((bias_widths.sum(), QUAD), np.float32)
        for site, begin in zip(layout.sites, self._bias_begins.tolist(), strict=True):
            if site.path in base_bias:
                padded.reshape(-1)[begin * QUAD : begin * QUAD + site.out_features] = base_bias[site.path]
        self._base_bias = torch.from_numpy(padded).to(device)  # [quads, 4]

    def mix(self, table: RowTable, vectors: Tensor, slots: NDArray[np.int64], scales: Sequence[float]) -> MixedVectors:
        """All vectors of a mix of these slots: products of factors, sums of biases; see `DeviceRows.compose`."""
        lines = np.concatenate([column[slots] for column in vector_columns(table)], axis=1)
        held = lines != ABSENT  # [num_parts, 3 * num_sites]
        self._check_scales_stand_alone(table.count.numpy()[slots], held)
        numbers = np.flatnonzero(held.any(axis=0))
        is_bias = numbers >= 2 * self._num_sites
        widths = self._widths[numbers]
        begins = _begins(widths)  # in `values`
        quads, device = vectors.view(-1, QUAD), vectors.device
        values = torch.ones(int(widths.sum()), QUAD, device=device)
        values[int(widths[~is_bias].sum()) :] = 0  # biases come last
        for line, part_holds, scale in zip(lines[:, numbers] // QUAD, held[:, numbers], scales, strict=True):
            factors, biases = part_holds & ~is_bias, part_holds & is_bias
            source, target = (_index(first[factors], widths[factors], device) for first in (line, begins))
            factor = 1 + scale * (quads.index_select(0, source) - 1)
            values.index_copy_(0, target, values.index_select(0, target) * factor)
            source, target = (_index(first[biases], widths[biases], device) for first in (line, begins))
            values.index_add_(0, target, quads.index_select(0, source), alpha=scale)
        self._scale_base_bias(values, numbers, begins)
        return MixedVectors(numbers, widths, values, self._num_sites)

    def _scale_base_bias(self, values: Tensor, numbers: NDArray[np.int64], begins: NDArray[np.int64]) -> None:
        """What scales a whole layer scales the base's bias too, which the product does once: (product - 1) * b0."""
        bias = np.flatnonzero(np.isin(numbers - self._num_sites, numbers) & (numbers >= 2 * self._num_sites))
        out_scale = np.searchsorted(numbers, numbers[bias] - self._num_sites)
        site = numbers[bias] - 2 * self._num_sites
        widths = self._widths[numbers[bias]]
        product, base_bias, target = (
            _index(first, widths, values.device) for first in (begins[out_scale], self._bias_begins[site], begins[bias])
        )
        values.index_copy_(
            0, target, (values.index_select(0, product) - 1) * self._base_bias.index_select(0, base_bias)
        )

    def _check_scales_stand_alone(self, counts: NDArray[np.int32], held: NDArray[np.bool_]) -> None:
        """What is scaled and added to at once has no one mix; such adapters are refused before they come here."""
        in_scale, out_scale, bias = held.reshape(len(counts), 3, self._num_sites).transpose(1, 0, 2)
        scaled = (in_scale | out_scale).any(axis=0)
        assert not counts[:, scaled].any(), "rows mixed with scales"
        assert not (bias & ~out_scale)[:, scaled].any(), "a bias mixed with scales"
        assert self._has_base_bias[(bias & out_scale).any(axis=0)].all(), "a bias of its own beside a scale"


def vector_columns(table: RowTable) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The table's in_scale, out_scale and bias as they are now, each [num_slots, num_sites], to read and to write."""
    return table.in_scale.numpy(), table.out_scale.numpy(), table.bias.numpy()


def _begins(lengths: NDArray[Any]) -> NDArray[np.int64]:
    """Where spans of these lengths begin if they lie one after another."""
    begins: NDArray[np.int64] = np.cumsum(lengths, dtype=np.int64) - lengths
    return begins


def _spans(begins: NDArray[np.int64], lengths: NDArray[Any]) -> NDArray[np.int64]:
    """All numbers of the spans begin, begin + 1, ..., begin + length - 1, one span after another."""
    return np.repeat(begins - _begins(lengths), lengths) + np.arange(lengths.sum())


def _index(begins: NDArray[np.int64], lengths: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(_spans(begins, lengths)).to(device)


def _num_quads(num_floats: NDArray[np.int64]) -> NDArray[np.int64]:
    return -(-num_floats // QUAD)


def _stretches(pages: NDArray[np.int64]) -> Iterator[tuple[slice, slice]]:
    """(pages of the adapter, pages of the pool) for every stretch that lies in one piece in the pool."""
    begin = 0
    for end in (np.flatnonzero(np.diff(pages, append=-1) != 1) + 1).tolist():
        first = int(pages[begin])
        yield slice(begin, end), slice(first, first + end - begin)
        begin = end
