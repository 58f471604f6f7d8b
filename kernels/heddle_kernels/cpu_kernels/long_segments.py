"""Segments of many tokens, a prompt's: on matrix tiles, or as float32 matrices that torch multiplies."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from heddle_kernels.cpu_kernels.bits import Floats, Stored, as_stored
from heddle_kernels.cpu_kernels.row_plan import CpuRowPlan, Segment
from heddle_kernels.cpu_kernels.rows import Longs, activate, finish, gather_rows
from heddle_kernels.cpu_kernels.team import new_tasks, team_size
from heddle_kernels.cpu_kernels.tile_rows import (
    NUM_SUMS,
    TOKENS_OF_PART,
    expand_by_tiles,
    shrink_by_tiles,
)
from heddle_kernels.cpu_kernels.tiles import TILE_ROWS
from heddle_kernels.cpu_kernels.vectors import CHUNK, PANEL
from heddle_kernels.site_group import SiteGroup


def shrink_long(x: Tensor, h: Floats, plan: CpuRowPlan, group: SiteGroup) -> None:
    """As `rows.shrink_segments` for the long ones: one product for all of the group's sites.

    x [num_tokens, in_features] -> h, flat."""
    if not plan.on_tiles or group.in_features % CHUNK:
        written = 0
        for segment in plan.long_segments.tolist():
            written += _shrink_by_torch(x, h[written:], plan, segment, group)
        return
    num_threads = team_size()
    shrink_by_tiles(
        num_threads,
        new_tasks(),
        as_stored(x.contiguous()),
        plan.long_segments,
        plan.rows,
        plan.first,
        plan.count,
        plan.a_offset,
        plan.gain,
        plan.c,
        plan.activation,
        group.first_site,
        len(group.out_features),
        _room(num_threads, group.in_features // CHUNK, CHUNK // 2, PANEL, 2),
        torch.empty(num_threads, NUM_SUMS, TILE_ROWS, PANEL).numpy(),
        h,
    )


def expand_long(y: Stored, h: Floats, plan: CpuRowPlan, group: SiteGroup, base_bias: Stored) -> None:
    """As `rows.expand_segments` for the long ones; h as `shrink_long` wrote it."""
    if not plan.on_tiles:
        read = 0
        for segment in plan.long_segments.tolist():
            read += _expand_by_torch(y, h[read:], plan, segment, group, base_bias)
        return
    num_threads, num_chunks = team_size(), -(-plan.most_long_rows // PANEL)
    expand_by_tiles(
        num_threads,
        new_tasks(),
        y,
        h,
        plan.long_segments,
        plan.rows,
        plan.vectors,
        plan.first,
        plan.count,
        plan.b_offset,
        plan.out_scale,
        plan.bias,
        group.first_site,
        np.array(group.out_features),
        base_bias,
        _room(num_threads, num_chunks, TOKENS_OF_PART, CHUNK),
        _room(num_threads, num_chunks, CHUNK // 2, PANEL, 2),
        torch.empty(num_threads, 3, TILE_ROWS, PANEL).numpy(),
    )


def _room(*shape: int) -> Stored:
    """To work in, of bfloat16, on a cache line: a tile's row that lies in two lines costs twice."""
    return as_stored(torch.empty(shape, dtype=torch.bfloat16))


def _shrink_by_torch(x: Tensor, h: Floats, plan: CpuRowPlan, segment: Segment, group: SiteGroup) -> int:
    """One segment; returns how much of h was written."""
    begin, end, slot = segment
    heap = plan.heap(slot, group)
    num_rows = heap.stop - heap.start
    if num_rows == 0:
        return 0
    a = _matrix(plan.rows, plan.a_offset[heap], group.in_features)
    products = h[: (end - begin) * num_rows].reshape(end - begin, num_rows)
    torch.mm(x[begin:end].float(), a.T, out=torch.from_numpy(products))
    activate(products, plan.gain[heap], plan.c[heap], plan.activation[heap])
    return products.size


def _expand_by_torch(
    y: Stored, h: Floats, plan: CpuRowPlan, segment: Segment, group: SiteGroup, base_bias: Stored
) -> int:
    """One segment; returns how much of h was read."""
    begin, end, slot = segment
    num_rows = plan.num_rows(slot, group)
    products = torch.from_numpy(h[: (end - begin) * num_rows]).view(end - begin, num_rows)
    read = 0
    for site, column, width in zip(group.sites, group.column_start, group.out_features, strict=True):
        heap = plan.heap(slot, group.alone(site))
        scale, bias = plan.vector(plan.out_scale, slot, site, width), plan.vector(plan.bias, slot, site, width)
        num_here = heap.stop - heap.start
        if num_here or scale.size or bias.size:
            b = _matrix(plan.rows, plan.b_offset[heap], width)
            total = products[:, read : read + num_here] @ b  # [tokens, width]
            finish(y[begin:end], column, total.numpy(), base_bias[column : column + width], scale, bias)
        read += num_here
    return (end - begin) * num_rows


def _matrix(rows: Stored, offsets: Longs, width: int) -> Tensor:
    """Rows of the pool -> float32 [num_rows, width]."""
    wide = np.empty((len(offsets), width), np.float32)
    gather_rows(rows, offsets, wide)
    return torch.from_numpy(wide)
