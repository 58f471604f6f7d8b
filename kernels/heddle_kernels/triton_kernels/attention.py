"""Attention over pages of keys and values: storing new ones, one new token a sequence (decode), many (prefill).

All query heads that share a key head are rows of one tile, so that every key and value is read once. Softmax runs
online, in float32 and in powers of two. What a sequence gets depends on its own tokens and the layer's shape alone:
nothing about its neighbours changes where its sums are cut.
"""

# Triton has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import functools
import math
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from heddle_kernels.paged_batch import PagedBatch
from heddle_kernels.triton_kernels.target import INTERPRETED, num_programs

LOG2_E = math.log2(math.e)
_LOG2_E = tl.constexpr(LOG2_E)  # kernels may read no other kind of global
MIN_SPLIT_TOKENS = 256  # a split's partial result costs 2/256 of a 128-wide group-of-4 split's own reads, or less


def write_kv(key: Tensor, value: Tensor, kv: Tensor, batch: PagedBatch) -> None:
    """Store the new tokens' keys and values in their pages.

    Semantics: kv[slot // page_tokens, 0 | 1, slot % page_tokens] = key | value, with slot = batch.write_slot[token].
    key, value [num_tokens, num_kv_heads, head_dim], each head's values side by side; kv one layer, a view of any page
    stride [num_pages, 2, page_tokens, num_kv_heads, head_dim].
    """
    num_tokens, num_kv_heads, head_dim = key.shape
    _write_kv_kernel[(num_tokens,)](
        key,
        value,
        kv,
        batch.write_slot,
        *key.stride()[:2],
        *value.stride()[:2],
        *kv.stride()[:4],
        PAGE_TOKENS=kv.shape[2],
        HEAD_DIM=head_dim,
        NUM_VALUES=num_kv_heads * head_dim,
        BLOCK=triton.next_power_of_2(num_kv_heads * head_dim),
    )


def paged_attention(
    query: Tensor,
    kv: Tensor,
    batch: PagedBatch,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of each sequence's new tokens over its own pages, and over nothing else.

    query [num_tokens, num_heads, head_dim]; kv one layer as in `write_kv` -> [num_tokens, num_heads, head_dim].
    sinks [num_heads]: an extra logit per head that takes weight and gives no value.

    Sequences with one new token take the decode kernel, those with several the prefill kernel, also side by side in one
    batch. The single tokens of sequences of length 0, which fill up a captured batch, get zeros.
    """
    if query.stride(-1) != 1:
        query = query.contiguous()
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    shared = _shared_arguments(query, kv, scaling, sliding_window, softcap, sinks)
    if batch.is_decode or any(end - begin == 1 for begin, end in pairwise(batch.query_bounds)):
        _decode(query, kv, out, batch, sliding_window, sinks, shared)
    if not batch.is_decode:
        _prefill(query, kv, out, batch, sinks, shared)
    return out


def max_splits(num_kv_heads: int) -> int:
    """Into how many parts a long sequence is cut, so that a batch of one fills a GPU of some 130 processors."""
    wanted: int = triton.next_power_of_2(128 // num_kv_heads)
    return min(32, max(8, wanted))


@functools.cache
def capability(device: torch.device) -> int:
    """The device's compute capability without its point; 0 in the interpreter."""
    if INTERPRETED:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def decode_tile(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Tokens of a key block, warps, and stages of loading, such that two programs fit a processor's shared memory."""
    row_bytes = triton.next_power_of_2(head_dim) * dtype.itemsize
    return {"BLOCK_TOKENS": 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16, "num_warps": 4, "num_stages": 3}


def prefill_tile(head_dim: int, dtype: torch.dtype, group: int, capability: int) -> dict[str, int]:
    """Rows of a query tile, tokens of a key block, warps, and stages of loading.

    The largest that need no spilled registers; `capability` of the device without the point, as in 90. Hopper's
    tensor cores read from shared memory, which leaves registers for twice the tokens.
    """
    if dtype.itemsize == 4:  # multiplied by ordinary cores
        rows, tokens = (32, 16) if head_dim <= 128 else (16, 16)
    elif head_dim <= 128:
        rows, tokens = 128, 64 if head_dim <= 64 or capability >= 90 else 32
    else:
        rows, tokens = 64, 32
    rows = max(rows, triton.next_power_of_2(group))
    return {"BLOCK_ROWS": rows, "BLOCK_TOKENS": tokens, "num_warps": 8, "num_stages": 3}


def _shared_arguments(
    query: Tensor,
    kv: Tensor,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> dict[str, Any]:
    """What decode and prefill kernels take alike. Scores are kept as powers of two: both factors include log2(e)."""
    num_kv_heads, head_dim = kv.shape[3:]
    return {
        "scale": scaling * LOG2_E if softcap is None else scaling / softcap,
        "softcap": 0.0 if softcap is None else softcap * LOG2_E,
        "window": sliding_window or 0,
        "query_token_stride": query.stride(0),
        "query_head_stride": query.stride(1),
        "page_stride": kv.stride(0),
        "value_offset": kv.stride(1),
        "place_stride": kv.stride(2),
        "kv_head_stride": kv.stride(3),
        "PAGE_TOKENS": kv.shape[2],
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": query.shape[1] // num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": max(16, triton.next_power_of_2(head_dim)),
        "HAS_WINDOW": sliding_window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "HAS_SINKS": sinks is not None,
        "UPCAST": INTERPRETED,
    }


def _decode(
    query: Tensor,
    kv: Tensor,
    out: Tensor,
    batch: PagedBatch,
    sliding_window: int | None,
    sinks: Tensor | None,
    shared: dict[str, Any],
) -> None:
    """Launch a grid that depends on shapes only, so that a captured launch fits every step of the same shapes."""
    num_sequences, max_pages = batch.page_table.shape
    num_heads, head_dim, num_kv_heads = query.shape[1], query.shape[2], kv.shape[3]
    capacity = max_pages * kv.shape[2] if sliding_window is None else min(max_pages * kv.shape[2], sliding_window)
    most_splits = max_splits(num_kv_heads)
    splits = min(most_splits, triton.cdiv(capacity, MIN_SPLIT_TOKENS))  # that any sequence here can come to
    programs = triton.cdiv(num_programs(query.device), num_sequences * num_kv_heads)  # that share a sequence's splits
    partial = statistics = out  # not touched where one split is all
    if splits > 1:
        partial = query.new_empty(num_sequences, num_heads, splits, head_dim, dtype=torch.float32)
        statistics = query.new_empty(num_sequences, num_heads, splits, 2, dtype=torch.float32)
    _decode_kernel[(min(programs, splits), num_kv_heads, num_sequences)](
        query,
        kv,
        out,
        partial,
        statistics,
        sinks,
        batch.query_start,
        batch.length,
        batch.page_table,
        batch.page_table.stride(0),
        splits,
        **shared,
        **decode_tile(head_dim, kv.dtype),
        BLOCK_GROUP=max(16, triton.next_power_of_2(shared["GROUP"])),
        MIN_SPLIT=MIN_SPLIT_TOKENS,
        MAX_SPLITS=most_splits,
    )
    if splits > 1:
        _decode_reduce_kernel[(num_heads, num_sequences)](
            out,
            partial,
            statistics,
            sinks,
            batch.query_start,
            batch.length,
            shared["window"],
            splits,
            HEAD_DIM=head_dim,
            BLOCK_DIM=shared["BLOCK_DIM"],
            HAS_WINDOW=shared["HAS_WINDOW"],
            HAS_SINKS=shared["HAS_SINKS"],
            MIN_SPLIT=MIN_SPLIT_TOKENS,
            MAX_SPLITS=most_splits,
            BLOCK_TOKENS=decode_tile(head_dim, kv.dtype)["BLOCK_TOKENS"],
            num_warps=4,
        )


def _prefill(
    query: Tensor, kv: Tensor, out: Tensor, batch: PagedBatch, sinks: Tensor | None, shared: dict[str, Any]
) -> None:
    """Launch a program for every tile there can be; those that find no sequence with several new tokens return."""
    num_tokens, num_sequences = query.shape[0], batch.page_table.shape[0]
    tile = prefill_tile(query.shape[2], kv.dtype, shared["GROUP"], capability(query.device))
    num_tiles = num_tokens // (tile["BLOCK_ROWS"] // shared["GROUP"]) + num_sequences
    _prefill_kernel[(num_tiles, kv.shape[3])](
        query,
        kv,
        out,
        sinks,
        batch.query_start,
        batch.length,
        batch.page_table,
        batch.page_table.stride(0),
        num_sequences,
        **shared,
        **tile,
    )


@triton.jit
def _write_kv_kernel(
    key_ptr,
    value_ptr,
    kv_ptr,
    slot_ptr,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    page_stride,
    value_offset,
    place_stride,
    kv_head_stride,
    PAGE_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a token: copies its keys and its values of all heads."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    place_ptr = kv_ptr + slot // PAGE_TOKENS * page_stride + slot % PAGE_TOKENS * place_stride
    number = tl.arange(0, BLOCK)
    head, dim, is_value = number // HEAD_DIM, number % HEAD_DIM, number < NUM_VALUES
    keys = tl.load(key_ptr + token * key_token_stride + head * key_head_stride + dim, mask=is_value)
    values = tl.load(value_ptr + token * value_token_stride + head * value_head_stride + dim, mask=is_value)
    tl.store(place_ptr + head * kv_head_stride + dim, keys, mask=is_value)
    tl.store(place_ptr + value_offset + head * kv_head_stride + dim, values, mask=is_value)


@triton.jit
def _decode_kernel(
    query_ptr,
    kv_ptr,
    out_ptr,
    partial_ptr,
    statistics_ptr,
    sinks_ptr,
    query_start_ptr,
    length_ptr,
    page_table_ptr,
    page_table_stride,
    splits,
    scale,
    softcap,
    window,
    query_token_stride,
    query_head_stride,
    page_stride,
    value_offset,
    place_stride,
    kv_head_stride,
    PAGE_TOKENS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Splits number program_id(0), + num_programs(0), ... of one sequence and one key head.

    A sequence with a single split is finished here; of the others every split leaves its unscaled sum of values
    (partial [num_sequences, num_heads, splits, head_dim]), highest score and sum of weights (statistics [.., 2]).
    """
    kv_head, sequence = tl.program_id(1), tl.program_id(2)
    token = tl.load(query_start_ptr + sequence).to(tl.int64)
    if tl.load(query_start_ptr + sequence + 1) - token != 1:
        return
    length = tl.load(length_ptr + sequence)
    first, split_tokens, num_splits = _splits_of(length, window, HAS_WINDOW, MIN_SPLIT, MAX_SPLITS, BLOCK_TOKENS)
    group, dim = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_DIM)
    head = kv_head * GROUP + group  # [BLOCK_GROUP]
    is_head = group < GROUP
    is_kept = is_head[:, None] & (dim < HEAD_DIM)[None, :]
    out_here = out_ptr + (token * NUM_KV_HEADS * GROUP + head)[:, None] * HEAD_DIM + dim[None, :]
    if length == 0:
        tl.store(out_here, tl.zeros([BLOCK_GROUP, BLOCK_DIM], out_ptr.dtype.element_ty), mask=is_kept)
        return
    query_here = query_ptr + token * query_token_stride + (head * query_head_stride)[:, None] + dim[None, :]
    query = tl.load(query_here, mask=is_kept, other=0.0)  # [BLOCK_GROUP, BLOCK_DIM]
    if UPCAST:
        query = query.to(tl.float32)
    pages_ptr = page_table_ptr + sequence.to(tl.int64) * page_table_stride
    head_ptr = kv_ptr + kv_head * kv_head_stride
    for split in range(tl.program_id(0), num_splits, tl.num_programs(0)):
        begin = first + split * split_tokens
        end = tl.minimum(begin + split_tokens, length)
        highest = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_GROUP], tl.float32)
        attended = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
        for block in range(begin, end, BLOCK_TOKENS):
            position = block + tl.arange(0, BLOCK_TOKENS)
            keys, values = _load_block(
                head_ptr,
                pages_ptr,
                tl.minimum(position, end - 1),
                dim,
                page_stride,
                value_offset,
                place_stride,
                PAGE_TOKENS,
                HEAD_DIM,
                BLOCK_DIM,
                UPCAST,
            )
            scores = _scores(query, keys, scale, softcap, HAS_SOFTCAP)
            scores = tl.where((position < end)[None, :], scores, float("-inf"))
            highest, total, attended = _attend(scores, values, highest, total, attended, False)
        if num_splits == 1:
            if HAS_SINKS:
                sink = tl.load(sinks_ptr + head, mask=is_head, other=0.0).to(tl.float32) * _LOG2_E
                highest, total, attended = _add_sink(sink, highest, total, attended)
            tl.store(out_here, (attended / total[:, None]).to(out_ptr.dtype.element_ty), mask=is_kept)
        else:
            line = (sequence.to(tl.int64) * NUM_KV_HEADS * GROUP + head) * splits + split  # [BLOCK_GROUP]
            tl.store(partial_ptr + line[:, None] * HEAD_DIM + dim[None, :], attended, mask=is_kept)
            tl.store(statistics_ptr + line * 2, highest, mask=is_head)
            tl.store(statistics_ptr + line * 2 + 1, total, mask=is_head)


@triton.jit
def _decode_reduce_kernel(
    out_ptr,
    partial_ptr,
    statistics_ptr,
    sinks_ptr,
    query_start_ptr,
    length_ptr,
    window,
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Put the splits of one sequence and one head together, all in one sum of fixed shape."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    num_heads = tl.num_programs(0)
    token = tl.load(query_start_ptr + sequence).to(tl.int64)
    if tl.load(query_start_ptr + sequence + 1) - token != 1:
        return
    length = tl.load(length_ptr + sequence)
    _, _, num_splits = _splits_of(length, window, HAS_WINDOW, MIN_SPLIT, MAX_SPLITS, BLOCK_TOKENS)
    if num_splits <= 1:  # finished already
        return
    split, dim = tl.arange(0, MAX_SPLITS), tl.arange(0, BLOCK_DIM)
    line = (sequence.to(tl.int64) * num_heads + head) * splits + split  # [MAX_SPLITS]
    is_split, is_dim = split < num_splits, dim < HEAD_DIM
    highest = tl.load(statistics_ptr + line * 2, mask=is_split, other=float("-inf"))
    totals = tl.load(statistics_ptr + line * 2 + 1, mask=is_split, other=0.0)
    here = partial_ptr + line[:, None] * HEAD_DIM + dim[None, :]
    parts = tl.load(here, mask=is_split[:, None] & is_dim[None, :], other=0.0)  # [MAX_SPLITS, BLOCK_DIM]
    top = tl.max(highest, 0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * _LOG2_E
        top = tl.maximum(top, sink)
    weight = tl.exp2(highest - top)
    total = tl.sum(weight * totals, 0)
    if HAS_SINKS:
        total += tl.exp2(sink - top)
    attended = tl.sum(weight[:, None] * parts, 0) / total
    out_here = out_ptr + (token * num_heads + head) * HEAD_DIM + dim
    tl.store(out_here, attended.to(out_ptr.dtype.element_ty), mask=is_dim)


@triton.jit
def _prefill_kernel(
    query_ptr,
    kv_ptr,
    out_ptr,
    sinks_ptr,
    query_start_ptr,
    length_ptr,
    page_table_ptr,
    page_table_stride,
    num_sequences,
    scale,
    softcap,
    window,
    query_token_stride,
    query_head_stride,
    page_stride,
    value_offset,
    place_stride,
    kv_head_stride,
    PAGE_TOKENS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """BLOCK_ROWS // GROUP new tokens of one sequence, with all query heads of one key head.

    Row r of the tile is head r % GROUP of token r // GROUP. Key blocks begin at multiples of BLOCK_TOKENS wherever the
    tile lies.
    """
    TILE_TOKENS: tl.constexpr = BLOCK_ROWS // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tiles have the most keys: they begin first
    kv_head = tl.program_id(1)
    sequence = _sequence_of_tile(tile, query_start_ptr, num_sequences, TILE_TOKENS)
    begin = tl.load(query_start_ptr + sequence)
    num_new = tl.load(query_start_ptr + sequence + 1) - begin
    first_token = (tile - begin // TILE_TOKENS - sequence) * TILE_TOKENS  # of the tile, within the sequence's new ones
    if (num_new <= 1) | (first_token >= num_new):
        return
    length = tl.load(length_ptr + sequence)
    row, dim = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_DIM)
    token = first_token + row // GROUP  # [BLOCK_ROWS]
    head = kv_head * GROUP + row % GROUP
    is_row = (token < num_new) & (row < TILE_TOKENS * GROUP)
    is_kept = is_row[:, None] & (dim < HEAD_DIM)[None, :]
    flat_token = (begin + token).to(tl.int64)
    query_here = query_ptr + (flat_token * query_token_stride + head * query_head_stride)[:, None] + dim[None, :]
    query = tl.load(query_here, mask=is_kept, other=0.0)  # [BLOCK_ROWS, BLOCK_DIM]
    if UPCAST:
        query = query.to(tl.float32)
    own_position = length - num_new + token  # [BLOCK_ROWS]
    first_position = length - num_new + first_token
    key_begin = 0
    if HAS_WINDOW:
        key_begin = tl.maximum(first_position - window + 1, 0)
    key_end = tl.minimum(first_position + TILE_TOKENS, length)
    pages_ptr = page_table_ptr + sequence.to(tl.int64) * page_table_stride
    head_ptr = kv_ptr + kv_head * kv_head_stride
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    attended = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    masked_begin = key_begin // BLOCK_TOKENS * BLOCK_TOKENS
    if not HAS_WINDOW:  # blocks that every row sees whole
        masked_begin = (first_position + 1) // BLOCK_TOKENS * BLOCK_TOKENS
        for block in range(0, masked_begin, BLOCK_TOKENS):
            keys, values = _load_block(
                head_ptr,
                pages_ptr,
                block + tl.arange(0, BLOCK_TOKENS),
                dim,
                page_stride,
                value_offset,
                place_stride,
                PAGE_TOKENS,
                HEAD_DIM,
                BLOCK_DIM,
                UPCAST,
            )
            scores = _scores(query, keys, scale, softcap, HAS_SOFTCAP)
            highest, total, attended = _attend(scores, values, highest, total, attended, False)
    for block in range(masked_begin, key_end, BLOCK_TOKENS):
        position = block + tl.arange(0, BLOCK_TOKENS)
        keys, values = _load_block(
            head_ptr,
            pages_ptr,
            tl.minimum(tl.maximum(position, key_begin), key_end - 1),
            dim,
            page_stride,
            value_offset,
            place_stride,
            PAGE_TOKENS,
            HEAD_DIM,
            BLOCK_DIM,
            UPCAST,
        )
        scores = _scores(query, keys, scale, softcap, HAS_SOFTCAP)
        age = own_position[:, None] - position[None, :]
        is_visible = age >= 0
        if HAS_WINDOW:
            is_visible = is_visible & (age < window)
        scores = tl.where(is_visible, scores, float("-inf"))
        highest, total, attended = _attend(scores, values, highest, total, attended, HAS_WINDOW)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head, mask=is_row, other=0.0).to(tl.float32) * _LOG2_E
        highest, total, attended = _add_sink(sink, highest, total, attended)
    out_here = out_ptr + (flat_token * NUM_KV_HEADS * GROUP + head)[:, None] * HEAD_DIM + dim[None, :]
    total = tl.where(is_row, total, 1.0)  # rows of nothing may have seen nothing
    tl.store(out_here, (attended / total[:, None]).to(out_ptr.dtype.element_ty), mask=is_kept)


@triton.jit
def _splits_of(
    length,
    window,
    HAS_WINDOW: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """(first visible position, tokens of a split, number of splits) of a sequence's last token."""
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - window, 0)
    blocks = tl.cdiv(tl.cdiv(length - first, MAX_SPLITS), BLOCK_TOKENS)
    split_tokens = tl.maximum(blocks * BLOCK_TOKENS, MIN_SPLIT)
    return first, split_tokens, tl.cdiv(length - first, split_tokens)


@triton.jit
def _sequence_of_tile(tile, query_start_ptr, num_sequences, TILE_TOKENS: tl.constexpr):
    """The sequence whose run of tile numbers has `tile`: sequence s owns those from query_start[s] // TILE + s on."""
    number = tl.arange(0, 128)
    not_after = 0
    for part in range(0, num_sequences, 128):
        start = tl.load(query_start_ptr + part + number, mask=part + number < num_sequences, other=2**30)
        not_after += tl.sum((start // TILE_TOKENS + part + number <= tile).to(tl.int32), 0)
    return not_after - 1


@triton.jit
def _load_block(
    head_ptr,
    pages_ptr,
    position,
    dim,
    page_stride,
    value_offset,
    place_stride,
    PAGE_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Keys and values [BLOCK_TOKENS, BLOCK_DIM] at these positions.

    They must be ones that hold a token: what else lies in a page is arbitrary, and a NaN stays one with no weight.
    """
    page = tl.load(pages_ptr + position // PAGE_TOKENS).to(tl.int64)  # times the stride it may pass 2**31
    here = (page * page_stride + position % PAGE_TOKENS * place_stride)[:, None] + dim[None, :]
    if HEAD_DIM == BLOCK_DIM:
        keys = tl.load(head_ptr + here)
        values = tl.load(head_ptr + value_offset + here)
    else:
        is_dim = (dim < HEAD_DIM)[None, :]
        keys = tl.load(head_ptr + here, mask=is_dim, other=0.0)
        values = tl.load(head_ptr + value_offset + here, mask=is_dim, other=0.0)
    if UPCAST:
        keys, values = keys.to(tl.float32), values.to(tl.float32)
    return keys, values


@triton.jit
def _scores(query, keys, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """log2(e) * (query keysᵀ * scaling), softly capped -> [rows, BLOCK_TOKENS] float32."""
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    if HAS_SOFTCAP:
        scores = _tanh(scores) * softcap
    return scores


@triton.jit
def _attend(scores, values, highest, total, attended, CAN_BE_EMPTY: tl.constexpr):
    """One step of the online softmax. CAN_BE_EMPTY: a row may have seen nothing so far, and see nothing here."""
    raised = tl.maximum(highest, tl.max(scores, 1))  # [rows]
    level = raised
    if CAN_BE_EMPTY:
        level = tl.where(raised == float("-inf"), 0.0, raised)
    weights = tl.exp2(scores - level[:, None])
    decay = tl.exp2(highest - level)
    total = total * decay + tl.sum(weights, 1)
    attended = tl.dot(weights.to(values.dtype), values, attended * decay[:, None], input_precision="ieee")
    return raised, total, attended


@triton.jit
def _add_sink(sink, highest, total, attended):
    """A score that takes weight and gives no value; sink [rows] in powers of two."""
    raised = tl.maximum(highest, sink)
    decay = tl.exp2(highest - raised)
    return raised, total * decay + tl.exp2(sink - raised), attended * decay[:, None]


@triton.jit
def _tanh(x):
    """tanh to float32 accuracy relative to its value; Triton itself has none that the interpreter knows.

    Near zero by its series to x⁹: 1 - exp(-2|x|) would lose the leading digits there.
    """
    decay = tl.exp(-2 * tl.abs(x))
    far = (1 - decay) / (1 + decay)
    square = x * x
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))
