"""Adapters' rows against segments of many tokens, on matrix tiles: bfloat16 products, summed in float32.

A part's rows are brought once into the order that tiles want, and used for all of its tokens. Between shrink and expand
h keeps float32's precision: a product takes two bfloat16 numbers for it, one rounded and one for what that left over.
"""

from __future__ import annotations

import numpy as np

from heddle_kernels.cpu_kernels.bits import Floats, Stored, compiled, narrow, widen
from heddle_kernels.cpu_kernels.rows import Bytes, Ints, Longs, activate, rows_of_group
from heddle_kernels.cpu_kernels.team import Tasks, in_parallel, next_member, next_task
from heddle_kernels.cpu_kernels.tiles import (
    add_tile_product,
    add_tile_rounded,
    load_tile,
    release_tiles,
    rows_of_tiles,
    shape_tiles,
    store_tile,
    zero_tile,
)
from heddle_kernels.cpu_kernels.vectors import CHUNK, PANEL, repeat_pairs, transpose_pairs

# Bounds of parts, as in `rows`: by the segment alone.
TOKENS_OF_PART = 128
OUTPUTS_OF_PART = 1024
NUM_SUMS = 4  # that take turns, since a product waits for the sum it adds to

_ZERO, _ONE = np.float32(0), np.float32(1)


@compiled
def shrink_by_tiles(
    num_threads: int,
    tasks: Tasks,
    x: Stored,
    segments: Longs,
    rows: Stored,
    first: Ints,
    count: Ints,
    a_offset: Longs,
    gain: Floats,
    c: Floats,
    activation: Bytes,
    first_site: int,
    num_sites: int,
    pair_room: Stored,
    sum_room: Floats,
    h: Floats,
) -> None:
    """As `rows.shrink_segments`, in bfloat16, in_features a multiple of CHUNK.

    To work in, of each thread: pair_room [in_features / CHUNK or more, CHUNK / 2, PANEL, 2],
    sum_room [NUM_SUMS, TILE_ROWS, PANEL].
    """
    in_parallel(
        num_threads,
        _shrink_parts,
        (
            tasks, x, segments, rows, first, count, a_offset, gain, c, activation,
            first_site, num_sites, pair_room, sum_room, h,
        ),
    )  # fmt: skip


@compiled
def _shrink_parts(
    tasks: Tasks,
    x: Stored,
    segments: Longs,
    rows: Stored,
    first: Ints,
    count: Ints,
    a_offset: Longs,
    gain: Floats,
    c: Floats,
    activation: Bytes,
    first_site: int,
    num_sites: int,
    pair_room: Stored,
    sum_room: Floats,
    h: Floats,
) -> None:
    member, mine, part, segment_begin = next_member(tasks), next_task(tasks), 0, 0
    for begin, end, slot in segments:
        num_rows = rows_of_group(count, slot, first_site, num_sites)
        num_values = (end - begin) * num_rows
        h_segment = h[segment_begin : segment_begin + num_values].reshape(end - begin, num_rows)
        for row in range(0, num_rows, PANEL):
            for token in range(0, end - begin, TOKENS_OF_PART):
                if part == mine:
                    heap = first[slot, first_site] + row
                    h_part = h_segment[token : token + TOKENS_OF_PART, row : row + PANEL]
                    x_part = x[begin + token : begin + token + h_part.shape[0]]
                    transpose_pairs(rows, a_offset[heap : heap + h_part.shape[1]], x.shape[1], pair_room[member])
                    _shrink_part(x_part, pair_room[member], sum_room[member], h_part)
                    activate(h_part, gain[heap:], c[heap:], activation[heap:])
                    mine = next_task(tasks)
                part += 1
        segment_begin += num_values
    release_tiles()


@compiled
def _shrink_part(x: Stored, pairs: Stored, sums: Floats, h: Floats) -> None:
    """x [tokens, in_features], pairs [chunks, CHUNK / 2, PANEL, 2] -> h [tokens, at most PANEL]."""
    num_tokens, num_chunks, row_bytes = x.shape[0], x.shape[1] // CHUNK, x.shape[1] * 2
    num_rows = rows_of_tiles(num_tokens)
    shape_tiles(num_rows)
    for i in range(0, num_tokens, num_rows):
        token = min(i, num_tokens - num_rows)
        zero_tile(0)
        zero_tile(1)
        zero_tile(2)
        zero_tile(3)
        for chunk in range(0, num_chunks, NUM_SUMS):
            load_tile(4, x[token, chunk * CHUNK :], row_bytes)
            load_tile(5, pairs[chunk], PANEL * 4)
            add_tile_product(0, 4, 5)
            if chunk + 1 < num_chunks:
                load_tile(4, x[token, (chunk + 1) * CHUNK :], row_bytes)
                load_tile(6, pairs[chunk + 1], PANEL * 4)
                add_tile_product(1, 4, 6)
            if chunk + 2 < num_chunks:
                load_tile(4, x[token, (chunk + 2) * CHUNK :], row_bytes)
                load_tile(7, pairs[chunk + 2], PANEL * 4)
                add_tile_product(2, 4, 7)
            if chunk + 3 < num_chunks:
                load_tile(4, x[token, (chunk + 3) * CHUNK :], row_bytes)
                load_tile(5, pairs[chunk + 3], PANEL * 4)
                add_tile_product(3, 4, 5)
        store_tile(0, sums[0], PANEL * 4)
        store_tile(1, sums[1], PANEL * 4)
        store_tile(2, sums[2], PANEL * 4)
        store_tile(3, sums[3], PANEL * 4)
        for row in range(num_rows):
            for k in range(h.shape[1]):
                h[token + row, k] = (sums[0, row, k] + sums[1, row, k]) + (sums[2, row, k] + sums[3, row, k])


@compiled
def expand_by_tiles(
    num_threads: int,
    tasks: Tasks,
    y: Stored,
    h: Floats,
    segments: Longs,
    rows: Stored,
    vectors: Floats,
    first: Ints,
    count: Ints,
    b_offset: Longs,
    out_scale: Longs,
    bias: Longs,
    first_site: int,
    out_features: Longs,
    base_bias: Stored,
    half_room: Stored,
    pair_room: Stored,
    float_room: Floats,
) -> None:
    """As `rows.expand_segments`, in bfloat16.

    To work in, of each thread, for r rows of a site at most: half_room [r / PANEL, TOKENS_OF_PART, CHUNK],
    pair_room [r / PANEL, CHUNK / 2, PANEL, 2], float_room [3, TILE_ROWS, PANEL].
    """
    in_parallel(
        num_threads,
        _expand_parts,
        (
            tasks, y, h, segments, rows, vectors, first, count, b_offset, out_scale, bias,
            first_site, out_features, base_bias, half_room, pair_room, float_room,
        ),
    )  # fmt: skip


@compiled
def _expand_parts(
    tasks: Tasks,
    y: Stored,
    h: Floats,
    segments: Longs,
    rows: Stored,
    vectors: Floats,
    first: Ints,
    count: Ints,
    b_offset: Longs,
    out_scale: Longs,
    bias: Longs,
    first_site: int,
    out_features: Longs,
    base_bias: Stored,
    half_room: Stored,
    pair_room: Stored,
    float_room: Floats,
) -> None:
    member, mine, part, segment_begin = next_member(tasks), next_task(tasks), 0, 0
    halves, pairs = half_room[member], pair_room[member]
    products, change = float_room[member, :2], float_room[member, 2, :3]
    for begin, end, slot in segments:
        group_rows = rows_of_group(count, slot, first_site, out_features.shape[0])
        segment_end = segment_begin + (end - begin) * group_rows
        h_segment = h[segment_begin:segment_end].reshape(end - begin, group_rows)
        site_begin, h_column = 0, 0
        for j, width in enumerate(out_features):
            site = first_site + j
            num_rows, scale_begin, bias_begin = count[slot, site], out_scale[slot, site], bias[slot, site]
            is_changed = num_rows > 0 or scale_begin >= 0 or bias_begin >= 0
            heap = first[slot, site]
            for token in range(0, end - begin if is_changed else 0, TOKENS_OF_PART):
                for at in range(0, width, OUTPUTS_OF_PART):
                    if part == mine:
                        h_part = h_segment[token : token + TOKENS_OF_PART, h_column : h_column + num_rows]
                        _split(h_part, halves)
                        stop = min(at + OUTPUTS_OF_PART, width)
                        scale = vectors[scale_begin + at : scale_begin + stop] if scale_begin >= 0 else vectors[:0]
                        site_bias = vectors[bias_begin + at : bias_begin + stop] if bias_begin >= 0 else vectors[:0]
                        b0 = base_bias[site_begin + at : site_begin + stop]
                        offsets = b_offset[heap : heap + num_rows]
                        y_part = y[begin + token : begin + token + h_part.shape[0]]
                        for output in range(0, stop - at, PANEL):
                            num_outputs = min(PANEL, stop - at - output)
                            _fill_change(scale[output:], site_bias[output:], b0[output:], change)
                            _repeat_rows(rows, offsets, at + output, num_outputs, pairs)
                            column = site_begin + at + output
                            _expand_panel(halves, pairs, num_rows, change, products, y_part, column, num_outputs)
                        mine = next_task(tasks)
                    part += 1
            site_begin += width
            h_column += num_rows
        segment_begin = segment_end
    release_tiles()


@compiled
def _split(h: Floats, halves: Stored) -> None:
    """h [tokens, rows] -> halves [rows / PANEL, tokens or more, PANEL, 2 of CHUNK]: each rounded to bfloat16, and what
    that left over."""
    num_rows = h.shape[1]
    for chunk in range((num_rows + PANEL - 1) // PANEL):
        for token in range(h.shape[0]):
            split = halves[chunk, token]
            for i in range(PANEL):
                row = chunk * PANEL + i
                value = h[token, row] if row < num_rows else _ZERO
                rounded = narrow(value, split[0])
                rest = value - widen(rounded)
                split[2 * i] = rounded
                split[2 * i + 1] = narrow(rest if rest == rest else _ZERO, split[0])


@compiled
def _fill_change(scale: Floats, bias: Floats, base_bias: Stored, change: Floats) -> None:
    """change [3, PANEL], so that scale · (y − b0) + b0 + bias = change[0] · (y − change[1]) + change[2], and y where
    there is neither. Vectors of any length, or empty for none."""
    for k in range(PANEL):
        change[0, k] = scale[k] if k < scale.shape[0] else _ONE
        change[1, k] = widen(base_bias[k]) if k < scale.shape[0] and k < base_bias.shape[0] else _ZERO
        change[2, k] = change[1, k] + (bias[k] if k < bias.shape[0] else _ZERO)


@compiled
def _expand_panel(
    halves: Stored,
    pairs: Stored,
    rank: int,
    change: Floats,
    products: Floats,
    y: Stored,
    column: int,
    num_outputs: int,
) -> None:
    """Semantics: y = change[0] · (y − change[1]) + change[2] + h B for PANEL outputs or fewer, from `column` on.

    halves as `_split` made them, pairs as `_repeat_rows` did; products [2, TILE_ROWS, PANEL] is room to work in.
    """
    num_tokens, num_rows, row_bytes = y.shape[0], rows_of_tiles(y.shape[0]), y.shape[1] * 2
    shape_tiles(num_rows)
    for begin in range(0, num_tokens, num_rows):
        token = min(begin, num_tokens - num_rows)
        num_done = begin - token  # rows that the tile before has changed
        product = products[begin // num_rows & 1]
        zero_tile(0)
        for chunk in range((rank + PANEL - 1) // PANEL):
            load_tile(4, halves[chunk, token], CHUNK * 2)
            load_tile(5, pairs[chunk], PANEL * 4)
            add_tile_product(0, 4, 5)
        store_tile(0, product, PANEL * 4)
        if num_outputs == PANEL:
            add_tile_rounded(y[begin, column:], row_bytes, change, product[num_done:], num_rows - num_done)
        else:
            for row in range(num_done, num_rows):
                for k in range(num_outputs):
                    value = y[token + row, column + k]
                    total = change[0, k] * (widen(value) - change[1, k]) + change[2, k] + product[row, k]
                    y[token + row, column + k] = narrow(total, value)


@compiled
def _repeat_rows(rows: Stored, b_offset: Longs, at: int, width: int, pairs: Stored) -> None:
    """Some rows' columns from `at` on, at most PANEL -> pairs [rows / PANEL, PANEL rows, PANEL, 2], each number twice,
    for both halves of an h; zeros where there is none."""
    num_rows = b_offset.shape[0]
    num_chunks = (num_rows + PANEL - 1) // PANEL
    if width < PANEL:
        pairs[:num_chunks] = 0
    elif num_rows % PANEL:
        pairs[num_chunks - 1] = 0
    for row in range(num_rows):
        target = pairs[row // PANEL, row % PANEL]
        if width == PANEL:
            repeat_pairs(rows, b_offset[row] + at, target)
        else:
            for k in range(width):
                target[k, :] = rows[b_offset[row] + at + k]
