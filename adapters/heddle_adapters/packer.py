"""Lays a compiled adapter out in pages: rows in the compute dtype, vectors in float32, nothing padded to a common rank.

A row never straddles pages; one longer than a page takes a run of adjacent pages. A site's A rows lie one after
another, then its B rows, then its vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.canonical import CompiledAdapter, Floats, PrefixKv, SiteUpdate
from heddle_adapters.packed_adapter import ABSENT, PackedAdapter

COMPILER_VERSION = 2  # part of where rows files lie: raise it when folding or packing changes what they hold
ALIGNMENT_BYTES = 16  # of every row and vector, so that kernels may load 16 bytes at a time

Encode = Callable[[Floats], NDArray[Any]]


def to_bfloat16(values: Floats) -> NDArray[np.uint16]:
    """The upper halves of float32 numbers, rounded to the nearest, ties to even; NaN is not expected."""
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def to_float16(values: Floats) -> NDArray[np.float16]:
    """Rounded to the nearest; what is too large becomes infinite, as it does in the kernels' own conversions."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


def to_float32(values: Floats) -> Floats:
    return values.astype(np.float32, copy=False)


ROW_ENCODINGS: Mapping[str, Encode] = {"float32": to_float32, "float16": to_float16, "bfloat16": to_bfloat16}
ELEMENT_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


class PageSpace:
    """Finds room in an adapter's pages for blocks of equally long rows.

    A block goes on where the one before it ended, and splits between rows where a page ends. What is then left of the
    page is too short for one of its rows; a later block that fits in there whole takes it.
    """

    def __init__(self, page_bytes: int) -> None:
        assert page_bytes % ALIGNMENT_BYTES == 0, f"pages of {page_bytes} bytes cannot keep rows aligned"
        self._page_bytes = page_bytes
        self._num_pages = 0
        self._gaps: list[tuple[int, int]] = []  # (first byte, end) of what is free in a page, the newest page last
        self.run_lengths: list[int] = []

    def place(self, blocks: Sequence[tuple[int, int]]) -> list[NDArray[np.int64]]:
        """Byte offsets of every row, [num_rows] for each block (num_rows, row_bytes).

        The blocks keep their order, but for rows longer than a page: these come first, so that others can fill the
        pages which they leave half empty.
        """
        offsets = [np.zeros(0, np.int64)] * len(blocks)
        for number in sorted(range(len(blocks)), key=lambda number: blocks[number][1] <= self._page_bytes):
            num_rows, row_bytes = blocks[number]
            if num_rows:
                offsets[number] = self._place_block(num_rows, aligned(row_bytes))
        return offsets

    def _place_block(self, num_rows: int, stride: int) -> NDArray[np.int64]:
        if stride > self._page_bytes:
            return self._place_long(num_rows, stride)
        whole = next((i for i, (begin, end) in enumerate(self._gaps) if end - begin >= num_rows * stride), None)
        if whole is None:
            return self._place_over_pages(num_rows, stride)
        begin, end = self._gaps[whole]
        self._gaps[whole] = (begin + num_rows * stride, end)
        return begin + stride * np.arange(num_rows, dtype=np.int64)

    def _place_over_pages(self, num_rows: int, stride: int) -> NDArray[np.int64]:
        """The end of the newest page, then as many new pages as it takes."""
        begin, end = self._gaps.pop() if self._gaps else (0, 0)
        num_here, num_a_page = (end - begin) // stride, self._page_bytes // stride
        self._gaps.append((begin + num_here * stride, end))
        first_page, num_new = self._num_pages, -(-(num_rows - num_here) // num_a_page)
        self._add_runs([1] * num_new)
        for page in range(first_page, first_page + num_new):
            num_in_page = min(num_a_page, num_rows - num_here - (page - first_page) * num_a_page)
            self._gaps.append((page * self._page_bytes + num_in_page * stride, (page + 1) * self._page_bytes))
        here = begin + stride * np.arange(num_here, dtype=np.int64)
        page_number, in_page = np.divmod(np.arange(num_rows - num_here, dtype=np.int64), num_a_page)
        return np.concatenate([here, (first_page + page_number) * self._page_bytes + in_page * stride])

    def _place_long(self, num_rows: int, stride: int) -> NDArray[np.int64]:
        """A run of pages for each row."""
        length = -(-stride // self._page_bytes)
        run_bytes, begin = length * self._page_bytes, self._num_pages * self._page_bytes
        self._add_runs([length] * num_rows)
        offsets = begin + run_bytes * np.arange(num_rows, dtype=np.int64)
        self._gaps += [(offset + stride, offset + run_bytes) for offset in offsets.tolist()]
        return offsets

    def _add_runs(self, lengths: list[int]) -> None:
        self.run_lengths += lengths
        self._num_pages += sum(lengths)


def aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass
class Block:
    """Rows of one site that belong together, or one vector."""

    values: Floats  # [num_rows, width]
    encode: Encode
    element_bytes: int
    offsets: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # [num_rows], once placed

    @property
    def row_bytes(self) -> int:
        return int(self.values.shape[1]) * self.element_bytes

    @property
    def size_bytes(self) -> int:
        return int(self.values.size) * self.element_bytes

    def write(self, pages: NDArray[np.uint8]) -> None:
        """Put the rows where they belong: rows that lie one after another are one copy. `pages` is flat."""
        rows = np.ascontiguousarray(self.encode(self.values)).view(np.uint8)  # [num_rows, row_bytes]
        stride = aligned(self.row_bytes)
        ends = np.flatnonzero(np.diff(self.offsets, append=-1) != stride) + 1
        first = 0
        for end in ends.tolist():
            begin = int(self.offsets[first])
            stretch = pages[begin : begin + (end - first) * stride].reshape(end - first, stride)
            stretch[:, : self.row_bytes] = rows[first:end]
            first = end


@dataclass(frozen=True)
class SiteBlocks:
    """One site's update as blocks; what is absent has no row."""

    a: Block
    b: Block
    in_scale: Block
    out_scale: Block
    bias: Block
    delta: Block

    def all(self) -> tuple[Block, ...]:
        return self.a, self.b, self.in_scale, self.out_scale, self.bias, self.delta


class Packer:
    """Packs adapters for one base, one dtype and one size of pages."""

    def __init__(self, layout: BaseLayout, row_dtype: str, page_bytes: int, base_bias: Mapping[str, Floats]) -> None:
        """`row_dtype` is a key of ROW_ENCODINGS; `base_bias` has b0 [out_features] of the sites that have one."""
        self._kv = layout.kv
        self._site_index = layout.index()
        self._encode_row = ROW_ENCODINGS[row_dtype]
        self._row_element_bytes = ELEMENT_BYTES[row_dtype]
        self._page_bytes = page_bytes
        self._base_bias = base_bias

    def pack(self, compiled: CompiledAdapter) -> PackedAdapter:
        updates, tokens = compiled.updates, compiled.tokens
        prefix_pages = self._prefix_pages(compiled.prefix)
        sites = [self._site_blocks(update) for update in updates]
        token_block = self._row_block(None if tokens is None else tokens.values)
        blocks = [block for site in sites for block in site.all()] + [token_block]
        space = PageSpace(self._page_bytes)
        offsets = space.place([(len(block.values), block.row_bytes) for block in blocks])
        for block, block_offsets in zip(blocks, offsets, strict=True):
            block.offsets = block_offsets + prefix_pages.size
        pages = np.concatenate([prefix_pages, np.zeros((sum(space.run_lengths), self._page_bytes), np.uint8)])
        for block in blocks:
            block.write(pages.reshape(-1))
        rows = [update.rows for update in updates if update.rows is not None]
        has_delta = [update.delta is not None for update in updates]
        site_ids = np.array([self._site_index[update.site] for update in updates], np.int32)
        num_prefix_tokens = 0 if compiled.prefix is None else compiled.prefix.num_tokens
        return PackedAdapter(
            digest=compiled.digest,
            pages=pages,
            run_lengths=np.array([1] * len(prefix_pages) + space.run_lengths, np.int32),
            used_bytes=sum(block.size_bytes for block in blocks) + self._token_bytes * num_prefix_tokens,
            site=site_ids,
            count=np.array([update.num_rows for update in updates], np.int32),
            in_scale=_vector_offsets([site.in_scale for site in sites]),
            out_scale=_vector_offsets([site.out_scale for site in sites]),
            bias=_vector_offsets([site.bias for site in sites]),
            a_offset=_joined([site.a.offsets for site in sites], np.int64),
            b_offset=_joined([site.b.offsets for site in sites], np.int64),
            gain=_joined([each.gain for each in rows], np.float32),
            c=_joined([each.c for each in rows], np.float32),
            activation=_joined([each.activation for each in rows], np.int8),
            delta_site=site_ids[has_delta],
            delta_offset=_joined([site.delta.offsets for site in sites], np.int64),
            token_id=np.zeros(0, np.int64) if tokens is None else tokens.token_ids,
            token_offset=token_block.offsets,
            tokens_reach_head=tokens is not None and tokens.reach_head,
            num_prefix_tokens=num_prefix_tokens,
            num_prefix_pages=len(prefix_pages),
            positions=compiled.positions,
        )

    def _site_blocks(self, update: SiteUpdate) -> SiteBlocks:
        return SiteBlocks(
            a=self._row_block(None if update.rows is None else update.rows.a),
            b=self._row_block(None if update.rows is None else update.rows.b),
            in_scale=_vector_block(update.in_scale),
            out_scale=_vector_block(update.out_scale),
            bias=_vector_block(self._full_bias(update)),
            delta=self._row_block(update.delta),
        )

    def _row_block(self, rows: Floats | None) -> Block:
        return Block(np.zeros((0, 0), np.float32) if rows is None else rows, self._encode_row, self._row_element_bytes)

    @property
    def _token_bytes(self) -> int:
        """Of one token's keys and values in all layers."""
        return 0 if self._kv is None else self._kv.page_bytes(1, self._row_element_bytes)

    def _prefix_pages(self, prefix: PrefixKv | None) -> NDArray[np.uint8]:
        """[num_pages, page_bytes], each page [num_layers, 2, page_tokens, num_kv_heads, head_dim]."""
        if prefix is None:
            return np.zeros((0, self._page_bytes), np.uint8)
        page_tokens = self._page_bytes // self._token_bytes
        num_pages = -(-prefix.num_tokens // page_tokens)
        states = np.stack([prefix.keys, prefix.values], axis=1)  # [num_layers, 2, num_tokens, num_kv_heads, head_dim]
        room = num_pages * page_tokens - prefix.num_tokens
        states = np.pad(states, [(0, 0), (0, 0), (0, room), (0, 0), (0, 0)])
        paged = states.reshape(*states.shape[:2], num_pages, page_tokens, *states.shape[3:])
        paged = np.ascontiguousarray(np.moveaxis(paged, 2, 0))
        return np.ascontiguousarray(self._encode_row(paged)).view(np.uint8).reshape(num_pages, self._page_bytes)

    def _full_bias(self, update: SiteUpdate) -> Floats | None:
        """The canonical bias vector: what the adapter adds, and what scaling the base's own bias amounts to."""
        base_bias = self._base_bias.get(update.site)
        if not update.scales_base_bias or base_bias is None or update.out_scale is None:
            return update.bias
        scaled = (update.out_scale - 1) * base_bias
        return scaled if update.bias is None else update.bias + scaled


def _joined(arrays: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    """One after another; of none, an empty one."""
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)


def _vector_block(vector: Floats | None) -> Block:
    """Vectors stay float32: bfloat16 would lose up to 18 % of a small effect."""
    values = np.zeros((0, 0), np.float32) if vector is None else vector[None]
    return Block(values, to_float32, ELEMENT_BYTES["float32"])


def _vector_offsets(blocks: list[Block]) -> NDArray[np.int64]:
    """Where each site's vector lies, or ABSENT: [num_sites]."""
    return np.array([block.offsets[0] if len(block.offsets) else ABSENT for block in blocks], np.int64)
