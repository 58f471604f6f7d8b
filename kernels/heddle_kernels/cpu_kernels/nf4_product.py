"""Tokens against an NF4 weight, which is decoded into registers or tiles; and that weight written out.

A code value is rounded to bfloat16, the products of a block are summed in float32, and the block's scale is applied to
that sum: as accurate as weights that are rounded to bfloat16 after they are scaled.
"""

from __future__ import annotations

from heddle_kernels.cpu_kernels.bits import Floats, Stored, compiled, narrow, widen
from heddle_kernels.cpu_kernels.team import Tasks, in_parallel, next_member, next_task
from heddle_kernels.cpu_kernels.tiles import (
    TILE_ROWS,
    add_scaled_tile,
    add_tile_product,
    load_tile,
    release_tiles,
    rows_of_tiles,
    shape_tiles,
    store_tile,
    zero_tile,
)
from heddle_kernels.cpu_kernels.vectors import (
    PANEL,
    decode_block,
    multiply_block_1,
    multiply_block_2,
    multiply_block_4,
    multiply_block_8,
    write_block,
)

PANELS_PER_TASK = 8
MOST_ROWS = 64  # that share one decoding: their sums stay in the first-level cache
_ROWS_BY_VECTORS = 8  # that share one decoding: their sums stay in registers
_BLOCK = 64  # input features that share a scale
_HALF = _BLOCK // 2  # and that a tile holds


@compiled
def multiply_by_vectors(
    num_threads: int,
    tasks: Tasks,
    x: Stored,
    words: Stored,
    scales: Floats,
    bias: Stored,
    float_room: Floats,
    y: Stored,
) -> None:
    """Semantics: y = x Wᵀ + bias, summed in float32 and rounded once.

    x [num_tokens, in_features], y [num_tokens, out_features], bias [out_features] or empty, all bfloat16; words and
    scales as in Nf4Panels; float_room [num_threads, 2, MOST_ROWS, PANEL] to work in.
    """
    in_parallel(num_threads, _by_vectors, (tasks, x, words, scales, bias, float_room, y))


@compiled
def multiply_by_tiles(
    num_threads: int,
    tasks: Tasks,
    x: Stored,
    words: Stored,
    scales: Floats,
    bias: Stored,
    pair_room: Stored,
    float_room: Floats,
    y: Stored,
) -> None:
    """As `multiply_by_vectors`, where there are tiles; pair_room [num_threads, 2, BLOCK_PAIRS, PANEL, 2] as well."""
    in_parallel(num_threads, _by_tiles, (tasks, x, words, scales, bias, pair_room, float_room, y))


@compiled
def _by_vectors(
    tasks: Tasks, x: Stored, words: Stored, scales: Floats, bias: Stored, float_room: Floats, y: Stored
) -> None:
    totals = float_room[next_member(tasks), 0, :_ROWS_BY_VECTORS]
    while True:
        first = next_task(tasks) * PANELS_PER_TASK
        if first >= words.shape[0]:
            return
        for panel in range(first, min(first + PANELS_PER_TASK, words.shape[0])):
            for token in range(0, x.shape[0], _ROWS_BY_VECTORS):
                rows = x[token : token + _ROWS_BY_VECTORS]
                totals[:] = 0
                for block in range(words.shape[1]):
                    _add_block(rows, block, words[panel, block], scales[panel, block], totals)
                _finish(totals[: rows.shape[0]], panel, bias, y[token:])


@compiled
def _add_block(x: Stored, block: int, words: Stored, scales: Floats, totals: Floats) -> None:
    """x [at most 8, in_features], of which one block is multiplied -> totals [8, PANEL]."""
    num_rows, in_features = x.shape
    here = x[0, block * _BLOCK :]
    if num_rows == 8:
        multiply_block_8(here, words, scales, totals, in_features)
        return
    row = 0
    if num_rows & 4:
        multiply_block_4(here, words, scales, totals, in_features)
        row = 4
    if num_rows & 2:
        multiply_block_2(x[row, block * _BLOCK :], words, scales, totals[row:], in_features)
        row += 2
    if num_rows & 1:
        multiply_block_1(x[row, block * _BLOCK :], words, scales, totals[row:], in_features)


@compiled
def _by_tiles(
    tasks: Tasks,
    x: Stored,
    words: Stored,
    scales: Floats,
    bias: Stored,
    pair_room: Stored,
    float_room: Floats,
    y: Stored,
) -> None:
    """Tokens go in groups of about equal size that a tile takes; the last group begins early to be as large as the
    others, so some tokens are computed twice, with the same outcome."""
    num_tokens, row_bytes = x.shape[0], x.shape[1] * 2
    member = next_member(tasks)
    pairs, totals, products = pair_room[member], float_room[member, 0], float_room[member, 1]
    num_rows = rows_of_tiles(num_tokens)
    num_tiles = (num_tokens + num_rows - 1) // num_rows
    tiles_at_once = MOST_ROWS // num_rows
    shape_tiles(num_rows)
    while True:
        first = next_task(tasks) * PANELS_PER_TASK
        if first >= words.shape[0]:
            break
        for first_tile in range(0, num_tiles, tiles_at_once):
            for panel in range(first, min(first + PANELS_PER_TASK, words.shape[0])):
                num_here = min(num_tiles - first_tile, tiles_at_once)
                totals[: num_here * num_rows] = 0
                for block in range(words.shape[1]):
                    decode_block(words[panel, block], pairs[block & 1])
                    load_tile(5, pairs[block & 1, 0], PANEL * 4)
                    load_tile(6, pairs[block & 1, TILE_ROWS], PANEL * 4)
                    for i in range(num_here):
                        token = min((first_tile + i) * num_rows, num_tokens - num_rows)
                        product = products[(i & 1) * TILE_ROWS :]
                        zero_tile(0)
                        load_tile(1, x[token, block * _BLOCK :], row_bytes)
                        add_tile_product(0, 1, 5)
                        load_tile(2, x[token, block * _BLOCK + _HALF :], row_bytes)
                        add_tile_product(0, 2, 6)
                        store_tile(0, product, PANEL * 4)
                        add_scaled_tile(totals[i * num_rows :], product, scales[panel, block], num_rows)
                for i in range(num_here):
                    token = min((first_tile + i) * num_rows, num_tokens - num_rows)
                    _finish(totals[i * num_rows : (i + 1) * num_rows], panel, bias, y[token:])
    release_tiles()


@compiled
def _finish(totals: Floats, panel: int, bias: Stored, y: Stored) -> None:
    """Round a panel's sums [rows, PANEL] into its columns of y."""
    begin = panel * PANEL
    width = min(PANEL, y.shape[1] - begin)
    for row in range(totals.shape[0]):
        sums, rounded = totals[row], y[row, begin : begin + width]
        if bias.shape[0]:
            for k in range(width):
                rounded[k] = narrow(sums[k] + widen(bias[begin + k]), rounded[k])
        else:
            for k in range(width):
                rounded[k] = narrow(sums[k], rounded[k])


@compiled
def write_out(num_threads: int, tasks: Tasks, words: Stored, scales: Floats, weight: Stored) -> None:
    """Semantics: weight = code · scale, rounded once. weight [out_features, in_features] bfloat16."""
    in_parallel(num_threads, _write_out, (tasks, words, scales, weight))


@compiled
def _write_out(tasks: Tasks, words: Stored, scales: Floats, weight: Stored) -> None:
    while True:
        panel = next_task(tasks)
        if panel >= words.shape[0]:
            return
        num_outputs = min(PANEL, weight.shape[0] - panel * PANEL)
        for block in range(words.shape[1]):
            target = weight[panel * PANEL, block * _BLOCK :]
            write_block(words[panel, block], scales[panel, block], target, weight.shape[1] * 2, num_outputs)
