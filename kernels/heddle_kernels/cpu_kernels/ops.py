"""The operations of a CPU, for `dispatch`: compiled kernels, and torch where the work is a matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heddle_kernels.cpu_kernels import elementwise
from heddle_kernels.cpu_kernels.attention import attend_sequences, write_pages
from heddle_kernels.cpu_kernels.bits import SUPPORTED, Floats, Stored, as_stored
from heddle_kernels.cpu_kernels.instructions import has_features
from heddle_kernels.cpu_kernels.long_segments import expand_long, shrink_long
from heddle_kernels.cpu_kernels.nf4_linear import CpuNf4Linear
from heddle_kernels.cpu_kernels.nf4_panels import Nf4Panels
from heddle_kernels.cpu_kernels.prompt_attention import attend_prompt
from heddle_kernels.cpu_kernels.row_plan import CpuRowPlan
from heddle_kernels.cpu_kernels.rows import (
    OUTPUTS_OF_PART,
    TOKENS_OF_PART,
    expand_segments,
    scale_segments,
    shrink_segments,
)
from heddle_kernels.cpu_kernels.team import new_tasks, team_size
from heddle_kernels.cpu_kernels.vectors import has_bfloat16_products
from heddle_kernels.cpu_kernels.warm_up import warm_up
from heddle_kernels.dense_buffer import DenseBuffer
from heddle_kernels.nf4_weight import UnsupportedWeight
from heddle_kernels.paged_batch import PagedBatch
from heddle_kernels.row_table import RowTable
from heddle_kernels.segments import Segments
from heddle_kernels.site_group import SiteGroup

# Of a sequence whose attention is compiled. With more, torch's is faster over long contexts: at 14 heads of 64 on one
# thread of a Sapphire Rapids, 16 new tokens of 100 take 0.8 times as long compiled, of 300 1.3 times.
MOST_NEW_TOKENS = 16

EVERYTHING = 2**31 - 1  # a window that hides nothing


def why_not(dtype: torch.dtype) -> str | None:
    """Why these operations cannot compute with this dtype on this processor; None when they can."""
    if dtype not in SUPPORTED:
        return f"{dtype} is none of {', '.join(map(str, SUPPORTED))}"
    if dtype == torch.float16 and not any(map(has_features, ("f16c", "fullfp16", "neon"))):
        return "this processor does not convert float16"
    return None


class CpuOps:
    """The operations as `reference.ReferenceOps` defines them. All tensors lie in host memory, contiguous."""

    name = "compiled"
    elementwise: Any = elementwise

    def __init__(self) -> None:
        self._dense = DenseBuffer()

    def prepare(self, groups: Sequence[SiteGroup], dtype: torch.dtype) -> None:
        """Compile, or load from numba's cache, all that will run with this dtype. Takes a while the first time."""
        warm_up(self, dtype)

    def nf4_linear(self, packed: Tensor, quant_state: Any, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
        """A linear over bitsandbytes' 4-bit weight, repacked, for inputs of `dtype`. Raises UnsupportedWeight."""
        if dtype != torch.bfloat16:
            raise UnsupportedWeight(f"on a CPU our product computes in bfloat16, not in {dtype}")
        if not has_bfloat16_products():
            raise UnsupportedWeight("this processor does not multiply bfloat16 (AVX512-BF16)")
        return CpuNf4Linear(Nf4Panels.from_bitsandbytes(packed, quant_state), bias, self._dense)

    def plan_rows(self, rows: Tensor, vectors: Tensor, table: RowTable, segments: Segments) -> CpuRowPlan:
        return CpuRowPlan.build(rows, vectors, table, segments)

    def shrink(self, x: Tensor, plan: CpuRowPlan, group: SiteGroup) -> Floats:
        """x [num_tokens, in_features] -> h flat float32: short segments, then long ones, each [tokens, rows]."""
        h = np.empty(plan.num_values(group), np.float32)
        if len(plan.short_segments):
            num_threads = team_size()
            shrink_segments(
                num_threads,
                new_tasks(),
                as_stored(x.contiguous()),
                plan.short_segments,
                plan.rows,
                plan.first,
                plan.count,
                plan.a_offset,
                plan.gain,
                plan.c,
                plan.activation,
                group.first_site,
                len(group.out_features),
                np.empty((num_threads, 4, group.in_features), np.float32),
                h,
            )
        if len(plan.long_segments):
            shrink_long(x, h[plan.num_short_values(group) :], plan, group)
        return h

    def expand_add(self, y: Tensor, h: Floats, plan: CpuRowPlan, group: SiteGroup, base_bias: Tensor | None) -> None:
        """y [num_tokens, sum of out_features], in place; h as `shrink` returned it; base_bias as y's columns."""
        assert y.is_contiguous(), "y is changed in place"
        changed = as_stored(y)
        b0 = np.empty(0, changed.dtype) if base_bias is None else as_stored(base_bias)
        if len(plan.short_segments):
            num_threads = team_size()
            expand_segments(
                num_threads,
                new_tasks(),
                changed,
                h,
                plan.short_segments,
                plan.rows,
                plan.vectors,
                plan.first,
                plan.count,
                plan.b_offset,
                plan.out_scale,
                plan.bias,
                group.first_site,
                np.array(group.out_features),
                b0,
                np.empty((num_threads, TOKENS_OF_PART * OUTPUTS_OF_PART), np.float32),
            )
        if len(plan.long_segments):
            expand_long(changed, h[plan.num_short_values(group) :], plan, group, b0)

    def scale_input(self, x: Tensor, plan: CpuRowPlan, site: int) -> Tensor:
        """x [num_tokens, in_features] -> a new tensor where some segment's adapter scales this input, else x itself."""
        if site not in plan.scaled_sites:
            return x
        scaled = x.clone()
        scale_segments(as_stored(scaled), plan.segments, plan.vectors, plan.in_scale, site)
        return scaled

    def write_kv(self, key: Tensor, value: Tensor, kv: Tensor, batch: PagedBatch) -> None:
        """key, value [num_tokens, num_kv_heads, head_dim];
        kv one layer [num_pages, 2, page_tokens, num_kv_heads, head_dim], whose pages may lie apart."""
        num_tokens, page_tokens = key.shape[0], kv.shape[2]
        keys, values = (states.reshape(num_tokens, -1).contiguous() for states in (key, value))
        write_pages(as_stored(keys), as_stored(values), _flat(kv), kv.stride(0), page_tokens, batch.write_slot.numpy())

    def paged_attention(
        self,
        query: Tensor,
        kv: Tensor,
        batch: PagedBatch,
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """query [num_tokens, num_heads, head_dim]; kv as in `write_kv`; sinks [num_heads] -> like query."""
        query = query.contiguous()
        out = torch.empty_like(query)
        num_threads = team_size()
        num_here, group = min(batch.max_query_tokens, MOST_NEW_TOKENS), query.shape[1] // kv.shape[3]
        attend_sequences(
            num_threads,
            new_tasks(),
            as_stored(query),
            _flat(kv),
            kv.stride(0),
            kv.shape[2],
            kv.shape[3],
            batch.page_table.numpy(),
            batch.query_start.numpy(),
            batch.length.numpy(),
            MOST_NEW_TOKENS,
            scaling,
            EVERYTHING if sliding_window is None else sliding_window,
            0.0 if softcap is None else softcap,
            np.empty(0, np.float32) if sinks is None else sinks.detach().float().numpy(),
            np.empty((num_threads, num_here, 2), np.int64),
            np.empty((num_threads, 2, num_here, group, query.shape[2]), np.float32),
            np.empty((num_threads, kv.shape[2], query.shape[2]), np.float32),
            np.empty((num_threads, num_here, group, batch.max_length), np.float32),
            as_stored(out),
        )
        if batch.max_query_tokens > MOST_NEW_TOKENS:
            for sequence, (begin, end) in enumerate(pairwise(batch.query_bounds)):
                if end - begin > MOST_NEW_TOKENS:
                    pages, length = batch.page_table[sequence], batch.lengths[sequence]
                    out[begin:end] = attend_prompt(
                        query[begin:end], kv, pages, length, scaling, sliding_window, softcap, sinks
                    )
        return out


def _flat(kv: Tensor) -> Stored:
    """One layer's pages as one flat array that spans them all, and what lies between them."""
    page_elements = kv[0].numel()
    assert kv[0].is_contiguous(), "a page of one layer lies in one piece"
    return as_stored(kv.as_strided(((kv.shape[0] - 1) * kv.stride(0) + page_elements,), (1,)))
