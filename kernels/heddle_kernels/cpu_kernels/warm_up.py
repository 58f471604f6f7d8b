"""Compiles every kernel for a dtype by running a tiny batch through all operations, so that no request waits for it."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle_kernels.cpu_kernels import elementwise
from heddle_kernels.cpu_kernels.nf4_linear import TILES_FROM_TOKENS, CpuNf4Linear
from heddle_kernels.cpu_kernels.nf4_panels import Nf4Panels
from heddle_kernels.cpu_kernels.row_plan import LONG_SEGMENT_TOKENS
from heddle_kernels.cpu_kernels.vectors import has_bfloat16_products
from heddle_kernels.dense_buffer import DenseBuffer
from heddle_kernels.nf4_weight import BLOCK_WEIGHTS
from heddle_kernels.ops import Ops
from heddle_kernels.paged_batch import PagedBatch
from heddle_kernels.row_table import RowTable
from heddle_kernels.segments import Segments
from heddle_kernels.site_group import SiteGroup

WIDTH = 32  # a multiple of what a product of tiles takes
ODD_WIDTH = 8  # and none
SLOT = 0
MANY_TOKENS = LONG_SEGMENT_TOKENS  # of a segment, so that it takes the way of long ones


def warm_up(ops: Ops, dtype: torch.dtype) -> None:
    _run_rows(ops, dtype)
    _run_attention(ops, dtype)
    _run_elementwise(dtype)
    if dtype == torch.bfloat16 and has_bfloat16_products():
        _run_product()


def _run_rows(ops: Ops, dtype: torch.dtype) -> None:
    """One adapter of one row, that lies at the pool's beginning, at each of two sites."""
    table = RowTable(num_slots=1, num_sites=2, heap_capacity=2)
    table.count[:] = 1
    table.first[0, 1] = 1
    table.in_scale[:] = 0
    for num_tokens, in_features in ((1, WIDTH), (MANY_TOKENS, WIDTH), (MANY_TOKENS, ODD_WIDTH)):
        segments, group = Segments.from_runs([(SLOT, num_tokens)]), SiteGroup(0, in_features, (WIDTH, WIDTH))
        plan = ops.plan_rows(_zeros(dtype, WIDTH), torch.zeros(WIDTH), table, segments)
        x, y = _zeros(dtype, num_tokens, in_features), _zeros(dtype, num_tokens, 2 * WIDTH)
        h = ops.shrink(ops.scale_input(x, plan, group.first_site), plan, group)
        ops.expand_add(y, h, plan, group, _zeros(dtype, 2 * WIDTH))


def _run_attention(ops: Ops, dtype: torch.dtype) -> None:
    """A sequence of one token, the first of the only page."""
    batch = PagedBatch(
        query_start=torch.tensor([0, 1], dtype=torch.int32),
        length=torch.tensor([1], dtype=torch.int32),
        page_table=torch.zeros(1, 1, dtype=torch.int32),
        write_slot=torch.zeros(1, dtype=torch.int64),
        query_bounds=(0, 1),
        lengths=(1,),
    )
    states, kv = _zeros(dtype, 1, 1, WIDTH), _zeros(dtype, 1, 2, 1, 1, WIDTH)
    ops.write_kv(states, states, kv, batch)
    ops.paged_attention(states, kv, batch, scaling=1.0)


def _run_elementwise(dtype: torch.dtype) -> None:
    states, angles = _zeros(dtype, 1, 1, 1, WIDTH), _zeros(dtype, 1, 1, WIDTH)
    elementwise.rms_norm(angles, angles[0, 0], eps=1e-6)
    elementwise.rotary(states, states, angles, angles)
    elementwise.gelu_tanh_mul(angles, angles)


def _run_product() -> None:
    linear = CpuNf4Linear(Nf4Panels.zeros(BLOCK_WEIGHTS, WIDTH), None, DenseBuffer())
    for num_tokens in (1, TILES_FROM_TOKENS):
        linear(_zeros(torch.bfloat16, num_tokens, BLOCK_WEIGHTS))
    linear.write_out()


def _zeros(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype)
