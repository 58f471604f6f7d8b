"""Segments of many tokens, a prompt's: an adapter's rows become one float32 matrix, and torch multiplies."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from heddle_kernels.cpu_kernels.bits import Floats, Stored
from heddle_kernels.cpu_kernels.row_plan import CpuRowPlan, Segment
from heddle_kernels.cpu_kernels.rows import Longs, activate, finish, gather_rows
from heddle_kernels.site_group import SiteGroup


def shrink_long(x: Tensor, h: Floats, plan: CpuRowPlan, segment: Segment, group: SiteGroup) -> int:
    """As `rows.shrink_segments` for one segment: one product for all of the group's sites.

    x [num_tokens, in_features] -> the start of h, flat; returns how much of h was written.
    """
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


def expand_long(y: Stored, h: Floats, plan: CpuRowPlan, segment: Segment, group: SiteGroup, base_bias: Stored) -> int:
    """As `rows.expand_segments` for one segment; returns how much of h was read."""
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
