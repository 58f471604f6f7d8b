"""Rows of many adapters in a pool, as the engine keeps them, for measuring and checking the row operations alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heddle_kernels.row_table import RowTable
from heddle_kernels.segments import Segments
from heddle_kernels.site_group import SiteGroup

GAIN = 1.0


@dataclass(frozen=True)
class RandomRows:
    """Adapters with rows at every site of several layers, each layer's sites one group."""

    rows: Tensor  # flat
    vectors: Tensor  # flat float32, of no use here: no adapter has any
    table: RowTable
    groups: list[SiteGroup]  # of each layer
    ranks: list[int]  # of each adapter, by slot

    @classmethod
    def of(
        cls,
        in_features: int,
        out_features: tuple[int, ...],
        ranks: list[int],
        num_layers: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> RandomRows:
        """Normal numbers; an adapter's rows of one site lie one after another, `a` before `b`."""
        groups = [SiteGroup(layer * len(out_features), in_features, out_features) for layer in range(num_layers)]
        table = RowTable(len(ranks), num_layers * len(out_features), sum(ranks) * num_layers * len(out_features))
        heap = offset = 0
        for slot, rank in enumerate(ranks):
            for group in groups:
                for site, width in zip(group.sites, out_features, strict=True):
                    here = slice(heap, heap + rank)
                    table.first[slot, site], table.count[slot, site] = heap, rank
                    table.a_offset[here] = offset + torch.arange(rank) * in_features
                    table.b_offset[here] = offset + rank * in_features + torch.arange(rank) * width
                    table.gain[here] = GAIN
                    heap, offset = heap + rank, offset + rank * (in_features + width)
        rows = torch.empty(offset, dtype=dtype, device=device).normal_(0.0, in_features**-0.5)
        return cls(rows, torch.zeros(1, device=device), table, groups, ranks)

    def a(self, slot: int, site: int, in_features: int) -> Tensor:
        """[rank, in_features]"""
        return self._matrix(self.table.a_offset, slot, site, in_features)

    def b(self, slot: int, site: int, out_features: int) -> Tensor:
        """[rank, out_features]"""
        return self._matrix(self.table.b_offset, slot, site, out_features)

    def _matrix(self, offsets: Tensor, slot: int, site: int, width: int) -> Tensor:
        begin = int(offsets[self.table.first[slot, site]])
        return self.rows[begin : begin + self.ranks[slot] * width].view(-1, width)


def one_token_each(slots: list[int]) -> Segments:
    """A decode step's segments, of a batch sorted by slot."""
    return Segments.from_runs((slot, 1) for slot in slots)


def row_bytes(in_features: int, out_features: tuple[int, ...], rank: int, dtype: torch.dtype) -> int:
    """Of one adapter at one layer."""
    return rank * sum(in_features + width for width in out_features) * dtype.itemsize
