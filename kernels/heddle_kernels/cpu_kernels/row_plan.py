"""What one step's row operations share: the segments by length, and the row table as the kernels read it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from heddle_kernels.cpu_kernels.bits import Floats, Stored, as_stored
from heddle_kernels.cpu_kernels.rows import Bytes, Ints, Longs
from heddle_kernels.cpu_kernels.tiles import has_tiles
from heddle_kernels.row_table import ABSENT, RowTable
from heddle_kernels.segments import Segments
from heddle_kernels.site_group import SiteGroup

Segment = tuple[int, int, int]  # begin, end, slot

# From here on torch's product of widened rows is the faster for large ranks. At q/k/v and down of Qwen2.5-0.5B, on two
# threads of a Sapphire Rapids, 128 tokens of one adapter take 0.6 times as long compiled at rank 16, 1.15 times at 64.
LONG_SEGMENT_TOKENS = 128
# With matrix tiles these are the faster from here on: rank 16 at all linears of a layer, one thread, 8 tokens take 1.5
# times as long, 16 as long, 32 0.6 times, 512 0.4 times.
TILE_SEGMENT_TOKENS = 16


@dataclass(frozen=True)
class CpuRowPlan:
    """Valid until the row table changes. All arrays but the segments are views of the pool's and the table's memory."""

    segments: Longs  # [num_segments, 3] (begin, end, slot), of adapters only
    short_segments: Longs  # [num_short, 3], those of few tokens
    long_segments: Longs  # [num_long, 3], those of many
    on_tiles: bool  # whether the long ones are computed on matrix tiles
    most_long_rows: int  # that a long segment's adapter has at any site
    num_values_before: tuple[int, ...]  # [num_sites + 1], of h at all sites before
    num_short_before: tuple[int, ...]  # the same of the short segments alone
    scaled_sites: frozenset[int]  # whose input some segment scales
    rows: Stored  # flat
    vectors: Floats  # flat
    first: Ints  # [num_slots, num_sites], and so on as in RowTable
    count: Ints
    in_scale: Longs
    out_scale: Longs
    bias: Longs
    a_offset: Longs
    b_offset: Longs
    gain: Floats
    c: Floats
    activation: Bytes

    @classmethod
    def build(cls, rows: Tensor, vectors: Tensor, table: RowTable, segments: Segments) -> CpuRowPlan:
        used = np.array(list(segments.with_adapters()), np.int64).reshape(-1, 3)
        num_tokens, slots = used[:, 1] - used[:, 0], used[:, 2]
        on_tiles = rows.dtype == torch.bfloat16 and has_tiles()
        is_long = num_tokens >= (TILE_SEGMENT_TOKENS if on_tiles else LONG_SEGMENT_TOKENS)
        count, in_scale = table.count.numpy(), table.in_scale.numpy()
        num_rows = count[slots]  # [num_segments, num_sites]
        return cls(
            segments=used,
            short_segments=used[~is_long],
            long_segments=used[is_long],
            on_tiles=on_tiles,
            most_long_rows=int(num_rows[is_long].max(initial=0)),
            num_values_before=(0, *accumulate((num_tokens @ num_rows).tolist())),
            num_short_before=(0, *accumulate((num_tokens[~is_long] @ num_rows[~is_long]).tolist())),
            scaled_sites=frozenset(np.flatnonzero((in_scale[slots] >= 0).any(axis=0)).tolist()),
            rows=as_stored(rows),
            vectors=vectors.numpy(),
            first=table.first.numpy(),
            count=count,
            in_scale=in_scale,
            out_scale=table.out_scale.numpy(),
            bias=table.bias.numpy(),
            a_offset=table.a_offset.numpy(),
            b_offset=table.b_offset.numpy(),
            gain=table.gain.numpy(),
            c=table.c.numpy(),
            activation=table.activation.numpy(),
        )

    def num_values(self, group: SiteGroup) -> int:
        """Elements of the group's h: tokens times rows, of all segments."""
        return self.num_values_before[group.sites.stop] - self.num_values_before[group.first_site]

    def num_short_values(self, group: SiteGroup) -> int:
        """Those of short segments, which come first."""
        return self.num_short_before[group.sites.stop] - self.num_short_before[group.first_site]

    def num_rows(self, slot: int, group: SiteGroup) -> int:
        return int(self.count[slot, group.sites.start : group.sites.stop].sum())

    def heap(self, slot: int, group: SiteGroup) -> slice:
        """The heap entries of all rows that a slot has at the group's sites."""
        begin = int(self.first[slot, group.first_site])
        return slice(begin, begin + self.num_rows(slot, group))

    def vector(self, column: Longs, slot: int, site: int, width: int) -> Floats:
        """An adapter's vector [width], empty when it has none; `column` is one of this plan's."""
        begin = int(column[slot, site])
        return self.vectors[:0] if begin == ABSENT else self.vectors[begin : begin + width]
