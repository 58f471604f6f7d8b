"""Adapters' rows against segments of tokens, straight from the row table: nothing is planned per site.

Segments of few tokens are bound by reading the rows, and are computed here from the pool. For segments of many tokens
the rows are widened into one float32 matrix, and the matrix product is torch's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from heddle_kernels.cpu_kernels.bits import Floats, Stored, compiled, narrow, widen
from heddle_kernels.cpu_kernels.exponential import gelu_tanh, silu
from heddle_kernels.cpu_kernels.inner_loops import add_four_scaled, add_scaled, dot, dot_four, widen_into
from heddle_kernels.cpu_kernels.team import Tasks, in_parallel, next_member, next_task

Longs = NDArray[np.int64]
Ints = NDArray[np.int32]
Bytes = NDArray[np.int8]

# Parts of a segment that are computed by themselves, by whichever thread is free. Their bounds depend on nothing but
# the segment, so that no bit depends on other segments or on the number of threads.
TOKENS_OF_PART = 16
ROWS_OF_PART = 16
OUTPUTS_OF_PART = 1024

_ZERO = np.float32(0)


@compiled
def shrink_segments(
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
    wide: Floats,
    h: Floats,
) -> None:
    """Semantics: h_g = gain · act(x_g A_gᵀ + c) over all rows of a group of sites.

    x [num_tokens, in_features]; segments [num_segments, 3] (begin, end, slot); rows flat; the others as in RowTable;
    wide [num_threads, 4, in_features] is room to work in; h flat, each segment [tokens, rows] row-major, one after
    another.
    """
    in_parallel(
        num_threads,
        _shrink_parts,
        (
            tasks, x, segments, rows, first, count, a_offset, gain, c, activation,
            first_site, num_sites, wide, h,
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
    wide: Floats,
    h: Floats,
) -> None:
    room, mine, part, segment_begin = wide[next_member(tasks)], next_task(tasks), 0, 0
    for begin, end, slot in segments:
        num_rows = rows_of_group(count, slot, first_site, num_sites)
        num_values = (end - begin) * num_rows
        h_segment = h[segment_begin : segment_begin + num_values].reshape(end - begin, num_rows)
        for token in range(0, end - begin, TOKENS_OF_PART):
            for row in range(0, num_rows, ROWS_OF_PART):
                if part == mine:
                    heap = first[slot, first_site] + row
                    h_part = h_segment[token : token + TOKENS_OF_PART, row : row + ROWS_OF_PART]
                    x_part = x[begin + token : begin + token + h_part.shape[0]]
                    _shrink_segment(x_part, rows, a_offset[heap : heap + h_part.shape[1]], room, h_part)
                    activate(h_part, gain[heap:], c[heap:], activation[heap:])
                    mine = next_task(tasks)
                part += 1
        segment_begin += num_values


@compiled
def rows_of_group(count: Ints, slot: int, first_site: int, num_sites: int) -> int:
    num_rows = 0
    for site in range(first_site, first_site + num_sites):
        num_rows += count[slot, site]
    return num_rows


@compiled
def _shrink_segment(x: Stored, rows: Stored, a_offset: Longs, wide: Floats, h: Floats) -> None:
    """x [tokens, in_features], a_offset [num_rows] -> h [tokens, num_rows], the bare dot products."""
    num_tokens, width = x.shape
    num_in_fours = num_tokens // 4 * 4
    for token in range(0, num_in_fours, 4):
        for i in range(4):
            widen_into(x[token + i], wide[i])
        for row, begin in enumerate(a_offset):
            dots = dot_four(rows[begin : begin + width], wide[0], wide[1], wide[2], wide[3])
            h[token, row], h[token + 1, row], h[token + 2, row], h[token + 3, row] = dots
    for token in range(num_in_fours, num_tokens):
        widen_into(x[token], wide[0])
        _shrink_token(wide[0], rows, a_offset, h[token])


@compiled
def _shrink_token(x: Floats, rows: Stored, a_offset: Longs, h: Floats) -> None:
    """x [in_features], a_offset [num_rows] -> h [num_rows].

    Rows are read from four places far apart, a quarter of them from each: the processor fetches ahead once a page of
    its own, so that this reads narrow rows 1.5 times as fast as four neighbours do (896 values, Sapphire Rapids).
    """
    width, quarter = x.shape[0], a_offset.shape[0] // 4
    for row in range(quarter):
        i, j, k, m = a_offset[row], a_offset[quarter + row], a_offset[2 * quarter + row], a_offset[3 * quarter + row]
        dots = dot_four(x, rows[i : i + width], rows[j : j + width], rows[k : k + width], rows[m : m + width])
        h[row], h[quarter + row], h[2 * quarter + row], h[3 * quarter + row] = dots
    for row in range(4 * quarter, a_offset.shape[0]):
        h[row] = dot(x, rows[a_offset[row] : a_offset[row] + width])


@compiled
def activate(h: Floats, gain: Floats, c: Floats, activation: Bytes) -> None:
    """Semantics: h = gain · act(h + c), in place. h [tokens, num_rows], the others [num_rows] or longer."""
    for token in range(h.shape[0]):
        for row in range(h.shape[1]):
            h[token, row] = gain[row] * act(h[token, row] + c[row], activation[row])


@compiled
def act(value: np.float32, number: int) -> np.float32:
    """By the number in RowTable.activation, as `reference.ACTIVATIONS`."""
    if number == 1:
        return max(value, _ZERO)
    if number == 2:
        return gelu_tanh(value)
    if number == 3:
        return silu(value)
    return value


@compiled
def expand_segments(
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
    total: Floats,
) -> None:
    """Semantics: y_g = out_scale · (y_g − b0) + b0 + bias + h_g B_g at each site of a group, in place.

    y [num_tokens, sum of out_features], where y is the base's W x + b0; h as `shrink_segments` wrote it; rows and
    vectors flat; out_features [num_sites]; base_bias b0 [sum of out_features], or empty;
    total [num_threads, TOKENS_OF_PART x OUTPUTS_OF_PART] is room to work in.
    """
    in_parallel(
        num_threads,
        _expand_parts,
        (
            tasks, y, h, segments, rows, vectors, first, count, b_offset, out_scale, bias,
            first_site, out_features, base_bias, total,
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
    total: Floats,
) -> None:
    room, mine, part, segment_begin = total[next_member(tasks)], next_task(tasks), 0, 0
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
                        h_part, stop = h_segment[token : token + TOKENS_OF_PART], min(at + OUTPUTS_OF_PART, width)
                        num_tokens, column = h_part.shape[0], site_begin + at
                        sums = room[: num_tokens * (stop - at)].reshape(num_tokens, stop - at)
                        _sum_rows(h_part, h_column, rows, b_offset[heap : heap + num_rows], at, sums)
                        b0 = base_bias[column : site_begin + stop]
                        scale = vectors[scale_begin + at : scale_begin + stop] if scale_begin >= 0 else vectors[:0]
                        site_bias = vectors[bias_begin + at : bias_begin + stop] if bias_begin >= 0 else vectors[:0]
                        finish(y[begin + token : begin + token + num_tokens], column, sums, b0, scale, site_bias)
                        mine = next_task(tasks)
                    part += 1
            site_begin += width
            h_column += num_rows
        segment_begin = segment_end


@compiled
def _sum_rows(h: Floats, h_column: int, rows: Stored, b_offset: Longs, at: int, total: Floats) -> None:
    """Semantics: total = h B, of B's columns those from `at` on. h [tokens, rows of the group], of which this site's
    begin at h_column; b_offset [num_rows] -> total [tokens, width].

    Rows are read from four places as in `_shrink_token`, and used for all tokens while they are at hand.
    """
    num_tokens, width = total.shape
    quarter = b_offset.shape[0] // 4
    total[:] = _ZERO
    for row in range(quarter):
        i, j = b_offset[row] + at, b_offset[quarter + row] + at
        k, m = b_offset[2 * quarter + row] + at, b_offset[3 * quarter + row] + at
        a, b, c, d = rows[i : i + width], rows[j : j + width], rows[k : k + width], rows[m : m + width]
        for token in range(num_tokens):
            products = h[token, h_column + row :]
            scales = (products[0], products[quarter], products[2 * quarter], products[3 * quarter])
            add_four_scaled(total[token], scales, a, b, c, d)
    for row in range(4 * quarter, b_offset.shape[0]):
        i = b_offset[row] + at
        for token in range(num_tokens):
            add_scaled(total[token], h[token, h_column + row], rows[i : i + width])


@compiled
def finish(y: Stored, column: int, total: Floats, base_bias: Stored, scale: Floats, bias: Floats) -> None:
    """Semantics: y = scale · (y − b0) + b0 + bias + total, rounded once. Vectors [width], or empty for none.

    y [tokens, columns], of which those from `column` on are changed; total [tokens, width] is changed as well.
    """
    num_tokens, width = total.shape
    for token in range(num_tokens):
        changed, sums = y[token, column : column + width], total[token]
        if scale.shape[0] and base_bias.shape[0]:
            for k in range(width):
                b0 = widen(base_bias[k])
                sums[k] += scale[k] * (widen(changed[k]) - b0) + b0
        elif scale.shape[0]:
            for k in range(width):
                sums[k] += scale[k] * widen(changed[k])
        else:
            for k in range(width):
                sums[k] += widen(changed[k])
        if bias.shape[0]:
            for k in range(width):
                sums[k] += bias[k]
        for k in range(width):
            changed[k] = narrow(sums[k], changed[k])


@compiled
def gather_rows(rows: Stored, offsets: Longs, wide: Floats) -> None:
    """Copy rows of the pool into one matrix. rows flat, offsets [num_rows] -> wide [num_rows, width]."""
    for row, begin in enumerate(offsets):
        widen_into(rows[begin : begin + wide.shape[1]], wide[row])


@compiled
def scale_segments(x: Stored, segments: Longs, vectors: Floats, in_scale: Longs, site: int) -> None:
    """Semantics: x_g = x_g · in_scale where the segment's adapter scales this site's input, in place.

    x [num_tokens, in_features]; segments [num_segments, 3] (begin, end, slot); in_scale as in RowTable.
    """
    for begin, end, slot in segments:
        if in_scale[slot, site] < 0:
            continue
        scale = vectors[in_scale[slot, site] :]
        for token in range(begin, end):
            scaled = x[token]
            for k in range(scaled.shape[0]):
                scaled[k] = narrow(widen(scaled[k]) * scale[k], scaled[k])
