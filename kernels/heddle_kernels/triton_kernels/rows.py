"""Rank-one updates and vectors of many adapters, for all tokens of a batch and all sites of a group in one launch.

A program of a persistent grid takes one tile after another from the step's plan. An adapter's rows are gathered
through the row table and lie anywhere; a row that a tile has room for and an adapter lacks is masked and costs no
memory traffic. `shrink` splits its sums over the input's width, because a decode step has too few tiles to keep the
memory busy; each split stores its part and `expand` adds them up, always in the same order: nothing is zeroed, and
no result depends on what else is in the batch.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heddle_kernels.site_group import SiteGroup
from heddle_kernels.triton_kernels import row_plan
from heddle_kernels.triton_kernels.row_plan import DECODE, DeviceTable, TileShape, TritonRowPlan
from heddle_kernels.triton_kernels.target import INTERPRETED, num_programs

FIRST_TOKEN = tl.constexpr(row_plan.FIRST_TOKEN)
NUM_TOKENS = tl.constexpr(row_plan.NUM_TOKENS)
SLOT = tl.constexpr(row_plan.SLOT)
H_BEGIN = tl.constexpr(row_plan.H_BEGIN)
H_STRIDE = tl.constexpr(row_plan.H_STRIDE)
FIRST_ROW = tl.constexpr(row_plan.FIRST_ROW)
TILE_COLUMNS = tl.constexpr(row_plan.TILE_COLUMNS)

RELU = tl.constexpr(1)  # numbers in RowTable.activation; 0 is the identity
GELU = tl.constexpr(2)  # its tanh form
SILU = tl.constexpr(3)

ALIGNMENT_BYTES = 16  # of rows and vectors in the pool
SPLIT_GRAIN = 512  # a split's share of the input's width is a multiple of this
MAX_SPLITS_DECODE = 16
MAX_SPLITS_PREFILL = 4  # more tokens make more tiles


def warps_of(shape: TileShape) -> int:
    """Warps of a program. A single one never waits for another, and leaves room for many programs at once."""
    return 1 if shape == DECODE else 4


def num_splits(in_features: int, shape: TileShape) -> int:
    """Parts that `shrink` splits a sum over the input's width into: by the layer's shape alone."""
    return -(-in_features // _split_width(in_features, shape))


def shrink(x: Tensor, rows: Tensor, table: DeviceTable, plan: TritonRowPlan, group: SiteGroup) -> Tensor:
    """The dot products of every token with the `a` rows that its adapter has for the group.

    Semantics: h_g = x_g A_gᵀ, its sum over the input's width split into parts.
    x [num_tokens, in_features], scaled already where an adapter scales it; rows flat -> h float32
    [num_splits, plan.num_h_values], laid out as TritonRowPlan says, values that no row stands for undefined.
    """
    assert x.is_contiguous()
    assert x.shape[1] == group.in_features
    splits = num_splits(group.in_features, plan.shape)
    assert splits * plan.num_h_values < 1 << 31, "the kernels count h in 32 bits"
    h = torch.empty(splits, plan.num_h_values, dtype=torch.float32, device=x.device)
    if len(plan.tiles) == 0:
        return h
    num_warps = warps_of(plan.shape)
    _shrink_kernel[_grid(x, len(plan.tiles) * splits, num_warps)](
        x, rows, h, plan.counters, plan.tiles, table.first, table.count, table.a_offset,
        plan.num_h_values, table.num_sites, group.first_site,
        **shrink_constants(group, plan.shape, x.element_size()), UPCAST=INTERPRETED, num_warps=num_warps,
    )  # fmt: skip
    return h


def shrink_constants(group: SiteGroup, shape: TileShape, element_bytes: int) -> dict[str, int]:
    """The kernel's constants for a group; `element_bytes` is the size of x's and the rows' elements."""
    return {
        "IN_FEATURES": group.in_features,
        "NUM_SITES": len(group.out_features),
        "NUM_SPLITS": num_splits(group.in_features, shape),
        "SPLIT_WIDTH": _split_width(group.in_features, shape),
        "BLOCK_TOKENS": shape.shrink_tokens,
        "BLOCK_ROWS": shape.shrink_rows,
        "BLOCK_WIDTH": (512 if shape == DECODE and element_bytes == 2 else 128) // element_bytes,
        "ROW_ALIGNMENT": ALIGNMENT_BYTES // element_bytes,
        "NUM_STAGES": 3,
    }


def expand(
    source: Tensor,
    h: Tensor,
    rows: Tensor,
    vectors: Tensor,
    table: DeviceTable,
    plan: TritonRowPlan,
    group: SiteGroup,
    base_bias: Tensor | None,
    out: Tensor,
) -> None:
    """Turn the base's output into the adapters' output, for all sites of a group.

    Semantics: out_g = out_scale · W x_g + b0 + bias + Σ_i gain_i · act_i(h_gi + c_i) · b_i, where W x is either
    the sum over the first axis of `source`, a workspace float32 [splits, num_tokens, at least width] without b0, and
    then every token of `out` is written; or `source` is `out`, which holds W x + b0, and then tokens without an
    adapter are left as they are.
    h as `shrink` returned it; base_bias b0 [width] or None; out [num_tokens, width], width = sum of out_features.
    """
    assert out.is_contiguous()
    assert source.is_contiguous()
    assert out.shape[1] == sum(group.out_features)
    in_place = source is out
    assert in_place or source.dim() == 3
    if len(plan.token_tiles) == 0:
        return
    constants = expand_constants(group, plan.shape, rows.element_size())
    num_column_tiles = sum(-(-width // constants["BLOCK_COLUMNS"]) for width in group.out_features)
    num_warps = warps_of(plan.shape)
    _expand_kernel[_grid(out, len(plan.token_tiles) * num_column_tiles, num_warps)](
        source, h, rows, vectors, base_bias, out, plan.counters, plan.token_tiles,
        table.first, table.count, table.out_scale, table.bias,
        table.b_offset, table.gain, table.c, table.activation,
        len(out), plan.num_h_values, table.num_sites, group.first_site,
        **constants,
        NUM_SPLITS=len(h), NUM_SOURCES=1 if in_place else len(source), SOURCE_WIDTH=source.shape[-1],
        IN_PLACE=in_place, HAS_BASE_BIAS=base_bias is not None, UPCAST=INTERPRETED, num_warps=num_warps,
    )  # fmt: skip


def expand_constants(group: SiteGroup, shape: TileShape, element_bytes: int) -> dict[str, int]:
    """The kernel's constants for a group; `element_bytes` is the size of the rows' elements."""
    assert len(group.out_features) <= 3
    widths = (*group.out_features, 0, 0)
    return {
        "NUM_SITES": len(group.out_features),
        "WIDTH_0": widths[0],
        "WIDTH_1": widths[1],
        "WIDTH_2": widths[2],
        "BLOCK_TOKENS": shape.expand_tokens,
        "BLOCK_ROWS": 16,
        "BLOCK_COLUMNS": 512 // element_bytes if shape == DECODE else 64,
        "ROW_ALIGNMENT": ALIGNMENT_BYTES // element_bytes,
    }


def scale_input(x: Tensor, vectors: Tensor, table: DeviceTable, plan: TritonRowPlan, site: int) -> Tensor:
    """Semantics: x_g · in_scale for the segments whose adapter scales this site's input, x_g for the others.

    x [num_tokens, in_features] -> a new tensor.
    """
    assert x.is_contiguous()
    scaled = torch.empty_like(x)
    if len(plan.token_tiles) == 0:
        return scaled
    num_column_tiles = -(-x.shape[1] // SCALE_BLOCK_COLUMNS)
    _scale_input_kernel[_grid(x, len(plan.token_tiles) * num_column_tiles, 1)](
        x, vectors, scaled, plan.counters, plan.token_tiles, table.in_scale, table.num_sites, site,
        WIDTH=x.shape[1], BLOCK_TOKENS=plan.shape.expand_tokens, BLOCK_COLUMNS=SCALE_BLOCK_COLUMNS,
        UPCAST=INTERPRETED, num_warps=1,
    )  # fmt: skip
    return scaled


SCALE_BLOCK_COLUMNS = 256


@triton.jit(do_not_specialize=["num_h_values", "num_sites", "first_site"])
def _shrink_kernel(
    x,  # [num_tokens, IN_FEATURES]
    rows,  # flat
    h,  # [NUM_SPLITS, num_h_values] float32
    counters,  # [2]
    tiles,  # [at least counters[0], TILE_COLUMNS]
    first,  # [num_slots, num_sites], like count
    count,
    a_offset,  # [heap]
    num_h_values,
    num_sites,
    first_site,
    IN_FEATURES: tl.constexpr,
    NUM_SITES: tl.constexpr,  # of the group
    NUM_SPLITS: tl.constexpr,
    SPLIT_WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    ROW_ALIGNMENT: tl.constexpr,  # elements
    NUM_STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    ROWS_FIRST: tl.constexpr = BLOCK_ROWS > BLOCK_TOKENS
    num_items = tl.load(counters) * NUM_SPLITS
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        tile = tiles + item // NUM_SPLITS * TILE_COLUMNS
        split = item % NUM_SPLITS
        line = tl.load(tile + SLOT).to(tl.int64) * num_sites + first_site
        first_row = tl.load(tile + FIRST_ROW)
        num_rows = 0
        for site in tl.static_range(NUM_SITES):
            num_rows += tl.load(count + line + site)
        if first_row < num_rows:
            row = first_row + tl.arange(0, BLOCK_ROWS)
            is_row = row < num_rows
            a_entry = a_offset + tl.load(first + line) + row
            a_begin = tl.multiple_of(tl.load(a_entry, mask=is_row, other=0), ROW_ALIGNMENT)
            token = tl.arange(0, BLOCK_TOKENS)
            is_token = token < tl.load(tile + NUM_TOKENS)
            x_tile = x + tl.load(tile + FIRST_TOKEN).to(tl.int64) * IN_FEATURES
            # The tensor cores want the longer side first, [rows, tokens] or [tokens, rows].
            dots = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS] if ROWS_FIRST else [BLOCK_TOKENS, BLOCK_ROWS], tl.float32)
            for done in tl.range(0, SPLIT_WIDTH, BLOCK_WIDTH, num_stages=NUM_STAGES):
                k = split * SPLIT_WIDTH + done + tl.arange(0, BLOCK_WIDTH)
                is_k = (k < IN_FEATURES)[None, :]
                a = _load(rows + a_begin[:, None] + k[None, :], is_row[:, None] & is_k, UPCAST)
                x_at = token[:, None] * IN_FEATURES + k[None, :]
                taken = _load(x_tile + x_at, is_token[:, None] & is_k, UPCAST)
                if ROWS_FIRST:
                    dots = tl.dot(a, taken.T, dots, input_precision="ieee")
                else:
                    dots = tl.dot(taken, a.T, dots, input_precision="ieee")
            if ROWS_FIRST:
                dots = dots.T
            h_tile = h + split * num_h_values + tl.load(tile + H_BEGIN)
            h_at = token[:, None] * tl.load(tile + H_STRIDE) + row[None, :]
            tl.store(h_tile + h_at, dots, mask=is_token[:, None] & is_row[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_h_values", "num_sites", "first_site"])
def _expand_kernel(
    source,  # [NUM_SOURCES, num_tokens, SOURCE_WIDTH]
    h,  # [NUM_SPLITS, num_h_values] float32
    rows,  # flat
    vectors,  # flat float32
    base_bias,  # [width]
    out,  # [num_tokens, width]
    counters,  # [2]
    tiles,  # [at least counters[1], TILE_COLUMNS]
    first,  # [num_slots, num_sites], like count, out_scale and bias
    count,
    out_scale,
    bias,
    b_offset,  # [heap], like gain, c and activation
    gain,
    c,
    activation,
    num_tokens,
    num_h_values,
    num_sites,
    first_site,
    NUM_SITES: tl.constexpr,  # of the group
    WIDTH_0: tl.constexpr,
    WIDTH_1: tl.constexpr,
    WIDTH_2: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ROW_ALIGNMENT: tl.constexpr,  # elements
    NUM_SPLITS: tl.constexpr,
    NUM_SOURCES: tl.constexpr,
    SOURCE_WIDTH: tl.constexpr,
    IN_PLACE: tl.constexpr,
    HAS_BASE_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    WIDTH: tl.constexpr = WIDTH_0 + WIDTH_1 + WIDTH_2
    # The column tiles where the second and the third site begin. (tl.cdiv would be no constant in Triton 3.6.)
    SECOND: tl.constexpr = (WIDTH_0 + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    THIRD: tl.constexpr = SECOND + (WIDTH_1 + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    NUM_COLUMN_TILES: tl.constexpr = THIRD + (WIDTH_2 + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    num_items = tl.load(counters + 1) * NUM_COLUMN_TILES
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        tile = tiles + item // NUM_COLUMN_TILES * TILE_COLUMNS
        slot = tl.load(tile + SLOT)
        if (slot >= 0) | (not IN_PLACE):
            column_tile = item % NUM_COLUMN_TILES
            site = (column_tile >= SECOND).to(tl.int32) + (column_tile >= THIRD).to(tl.int32)
            site_tile = column_tile - _of_site(site, 0, SECOND, THIRD)
            group_line = slot.to(tl.int64) * num_sites + first_site
            line = group_line + site
            num_rows = tl.load(count + line, mask=slot >= 0, other=0)
            scale_begin = tl.load(out_scale + line, mask=slot >= 0, other=-1)
            bias_begin = tl.load(bias + line, mask=slot >= 0, other=-1)
            if (num_rows > 0) | (scale_begin >= 0) | (bias_begin >= 0) | (not IN_PLACE):
                heap = tl.load(first + line, mask=slot >= 0, other=0)
                group_heap = tl.load(first + group_line, mask=slot >= 0, other=0)
                token = tl.arange(0, BLOCK_TOKENS)
                is_token = token < tl.load(tile + NUM_TOKENS)
                in_site = site_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
                is_column = in_site < _of_site(site, WIDTH_0, WIDTH_1, WIDTH_2)
                first_column = _of_site(site, 0, WIDTH_0, WIDTH_0 + WIDTH_1)
                first_token = tl.load(tile + FIRST_TOKEN).to(tl.int64)
                is_value = is_token[:, None] & is_column[None, :]
                total = tl.zeros([BLOCK_TOKENS, BLOCK_COLUMNS], tl.float32)
                for part in tl.static_range(NUM_SOURCES):
                    source_tile = source + (part * num_tokens + first_token) * SOURCE_WIDTH + first_column
                    source_at = token[:, None] * SOURCE_WIDTH + in_site[None, :]
                    total += _load(source_tile + source_at, is_value, UPCAST).to(tl.float32)
                total = _change_base(
                    total, vectors, scale_begin, bias_begin, base_bias, first_column, in_site, is_column,
                    IN_PLACE, HAS_BASE_BIAS, UPCAST,
                )  # fmt: skip
                h_begin = tl.load(tile + H_BEGIN) + token * tl.load(tile + H_STRIDE) + (heap - group_heap)
                for done in tl.range(0, num_rows, BLOCK_ROWS, num_stages=1):
                    row = done + tl.arange(0, BLOCK_ROWS)
                    is_row = row < num_rows
                    entry = heap + row
                    h_at = h_begin[:, None] + row[None, :]
                    is_dot = is_token[:, None] & is_row[None, :]
                    dots = _sum_splits(h, h_at, is_dot, num_h_values, NUM_SPLITS)
                    dots += tl.load(c + entry, mask=is_row, other=0.0)[None, :]
                    dots = _activate(dots, tl.load(activation + entry, mask=is_row, other=0)[None, :])
                    dots *= tl.load(gain + entry, mask=is_row, other=0.0)[None, :]
                    # Read after the dot products: Triton then gives a tile of one token the layout of these rows.
                    b_begin = tl.multiple_of(tl.load(b_offset + entry, mask=is_row, other=0), ROW_ALIGNMENT)
                    b = _load(rows + b_begin[:, None] + in_site[None, :], is_row[:, None] & is_column[None, :], UPCAST)
                    total = _add_product(total, dots, b)
                out_tile = out + first_token * WIDTH + first_column
                tl.store(out_tile + token[:, None] * WIDTH + in_site[None, :], total, mask=is_value)


@triton.jit
def _change_base(
    total,  # [BLOCK_TOKENS, BLOCK_COLUMNS] float32: W x, or W x + b0 if IN_PLACE
    vectors,
    scale_begin,
    bias_begin,
    base_bias,
    first_column,  # of the site, in the group's output
    in_site,  # [BLOCK_COLUMNS], column in the site's output
    is_column,
    IN_PLACE: tl.constexpr,
    HAS_BASE_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out_scale · W x + b0 + bias, without a rounding step where a vector is absent."""
    if scale_begin >= 0:
        scale = tl.load(vectors + tl.multiple_of(scale_begin, 4) + in_site, mask=is_column, other=0.0)[None, :]
        if IN_PLACE and HAS_BASE_BIAS:
            b0 = _load(base_bias + first_column + in_site, is_column, UPCAST).to(tl.float32)[None, :]
            total = scale * (total - b0) + b0
        else:
            total = scale * total
    if HAS_BASE_BIAS and not IN_PLACE:
        total += _load(base_bias + first_column + in_site, is_column, UPCAST).to(tl.float32)[None, :]
    if bias_begin >= 0:
        total += tl.load(vectors + tl.multiple_of(bias_begin, 4) + in_site, mask=is_column, other=0.0)[None, :]
    return total


@triton.jit
def _sum_splits(h, at, mask, num_h_values, NUM_SPLITS: tl.constexpr):
    """The whole dot products from their parts: those `at` one part, and so many values further on those of the next."""
    if at.shape[0] == 1:
        # At once. Two even of one: what is less than a value per thread, Triton loads in every thread over again.
        split = tl.arange(0, max(2, triton.next_power_of_2(NUM_SPLITS)))[:, None, None]
        parts = h + (split * num_h_values + at[None, :, :])
        dots = tl.sum(tl.load(parts, mask=(split < NUM_SPLITS) & mask[None, :, :], other=0.0), axis=0)
    else:
        dots = tl.zeros(at.shape, tl.float32)
        for part in tl.static_range(NUM_SPLITS):
            dots += tl.load(h + part * num_h_values + at, mask=mask, other=0.0)
    return dots


@triton.jit
def _add_product(total, dots, b):
    """total + dots b, in float32.

    A single token is no work for tensor cores: each thread multiplies its own columns. For more, where b has 16 bits,
    dots goes in as the sum of two such numbers, so that its rounding does not show.
    """
    if dots.shape[0] == 1:
        total += tl.sum(dots.T * b.to(tl.float32), axis=0)[None, :]
    elif b.dtype == tl.float32:
        total = tl.dot(dots, b, total, input_precision="ieee")
    else:
        high = dots.to(b.dtype)
        low = (dots - high.to(tl.float32)).to(b.dtype)
        total = tl.dot(high, b, total)
        total = tl.dot(low, b, total)
    return total


@triton.jit
def _activate(dots, number):
    """Each row's activation of its dot products; GELU and SiLU are both a product with a sigmoid."""
    cubic = 1.5957691216057308 * (dots + 0.044715 * dots * dots * dots)  # 2 sqrt(2 / pi)
    gated = dots * tl.sigmoid(tl.where(number == GELU, cubic, dots))
    activated = tl.where((number == GELU) | (number == SILU), gated, dots)
    return tl.where(number == RELU, tl.maximum(dots, 0.0), activated)


@triton.jit
def _of_site(site, OF_0: tl.constexpr, OF_1: tl.constexpr, OF_2: tl.constexpr):
    """The number that belongs to the group's site 0, 1 or 2."""
    return tl.where(site == 0, OF_0, tl.where(site == 1, OF_1, OF_2))


@triton.jit
def _load(pointers, mask, UPCAST: tl.constexpr):
    """Masked elements are 0 and are not read."""
    values = tl.load(pointers, mask=mask, other=0.0)
    if UPCAST:
        values = values.to(tl.float32)
    return values


@triton.jit(do_not_specialize=["num_sites", "site"])
def _scale_input_kernel(
    x,  # [num_tokens, WIDTH]
    vectors,  # flat float32
    scaled,  # [num_tokens, WIDTH]
    counters,  # [2]
    tiles,  # [at least counters[1], TILE_COLUMNS]
    in_scale,  # [num_slots, num_sites]
    num_sites,
    site,
    WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    NUM_COLUMN_TILES: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    num_items = tl.load(counters + 1) * NUM_COLUMN_TILES
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        tile = tiles + item // NUM_COLUMN_TILES * TILE_COLUMNS
        slot = tl.load(tile + SLOT)
        column = item % NUM_COLUMN_TILES * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        is_column = column < WIDTH
        begin = tl.load(in_scale + slot.to(tl.int64) * num_sites + site, mask=slot >= 0, other=-1)
        is_scaled = is_column & (begin >= 0)
        factor = tl.load(vectors + tl.multiple_of(begin, 4) + column, mask=is_scaled, other=1.0)
        token = tl.arange(0, BLOCK_TOKENS)
        is_value = (token < tl.load(tile + NUM_TOKENS))[:, None] & is_column[None, :]
        begin_of_tile = tl.load(tile + FIRST_TOKEN).to(tl.int64) * WIDTH
        at = token[:, None] * WIDTH + column[None, :]
        values = _load(x + begin_of_tile + at, is_value, UPCAST).to(tl.float32) * factor[None, :]
        tl.store(scaled + begin_of_tile + at, values, mask=is_value)


def _grid(tensor: Tensor, num_items: int, num_warps: int) -> tuple[int]:
    """A persistent grid. Four warps a program are the usual; smaller programs are so many more."""
    return (min(num_items, num_programs(tensor.device) * max(1, 4 // num_warps)),)


def _split_width(in_features: int, shape: TileShape) -> int:
    max_splits = MAX_SPLITS_DECODE if shape == DECODE else MAX_SPLITS_PREFILL
    return SPLIT_GRAIN * -(-in_features // (SPLIT_GRAIN * max_splits))
