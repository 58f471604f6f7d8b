"""Adapters with rows, vectors and activations at the sites of one group, and the formula in float64 beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from heddle_adapters.base_layout import Site
from heddle_adapters.canonical import Rows, SiteUpdate
from heddle_adapters.device_rows import DeviceRows
from heddle_kernels.ops import Ops
from heddle_kernels.segments import BASE_SLOT, Segments
from heddle_kernels.site_group import SiteGroup
from row_samples import layout_of, make_rows, normal, pack, place, random_rows, relative_error, rounded

OTHER = Site("other", "linear", 8, 8, has_bias=False)
ACTIVATIONS = (
    lambda h: h,
    torch.relu,
    lambda h: functional.gelu(h, approximate="tanh"),
    functional.silu,
)


@dataclass
class RowWorld:
    """Adapters in a pool, and at each site of the group what each of them was made from."""

    rows: DeviceRows
    updates: dict[int, list[SiteUpdate]]  # by slot
    dtype: torch.dtype
    group: SiteGroup  # of all sites but the first

    @classmethod
    def of(cls, sites: Sequence[Site], adapters: list[list[SiteUpdate]], dtype: torch.dtype) -> RowWorld:
        """Small pages, so that nearly every block of rows goes over page ends. Rows get all activations in turn."""
        layout = layout_of(OTHER, *sites)  # the group is not the first: a wrong number shows
        rows, _ = make_rows(layout, dtype, num_pages=12000)
        updates = {place(rows, pack(layout, dtype, adapter)).slot: adapter for adapter in adapters}
        heap = rows.table.activation
        heap[:] = torch.arange(len(heap), dtype=torch.int8) % len(ACTIVATIONS)
        return cls(rows, updates, dtype, group_of(sites))

    @classmethod
    def random(cls, sites: Sequence[Site], ranks: Sequence[int], dtype: torch.dtype) -> RowWorld:
        """An adapter of each rank, with a scale and a bias at every site."""
        generator = np.random.default_rng(7)
        return cls.of(sites, [[full_update(site, rank, generator) for site in sites] for rank in ranks], dtype)

    @property
    def slots(self) -> list[int]:
        return list(self.updates)

    def activations(self, slot: int, site: int) -> list[int]:
        table = self.rows.table
        begin = int(table.first[slot, site])
        numbers: list[int] = table.activation[begin : begin + int(table.count[slot, site])].tolist()
        return numbers

    def truth(self, slot: int, x: Tensor, base: Tensor, b0: Tensor, group: SiteGroup) -> Tensor:
        """x [tokens, in_features], the base's output and bias side by side -> the same with the adapter, float64."""
        if slot == BASE_SLOT:
            return base
        outputs = list[Tensor]()
        widths = list(group.out_features)
        columns = zip(base.split_with_sizes(widths, dim=1), b0.split_with_sizes(widths), strict=True)
        for site, (y, bias) in zip(group.sites, columns, strict=True):
            update = rounded(self.updates[slot][site - self.group.first_site], self.dtype)
            if update.out_scale is not None:
                y = torch.from_numpy(update.out_scale).double() * (y - bias) + bias
            if update.bias is not None:
                y = y + torch.from_numpy(update.bias).double()
            outputs.append(
                y if update.rows is None else y + self._of_rows(update.rows, self.activations(slot, site), x)
            )
        return torch.cat(outputs, dim=1)

    @staticmethod
    def _of_rows(rows: Rows, activations: list[int], x: Tensor) -> Tensor:
        a, b, gain, c = (torch.from_numpy(part).double() for part in (rows.a, rows.b, rows.gain, rows.c))
        h = x @ a.T + c
        y = torch.zeros(len(x), b.shape[1]).double()
        for i, number in enumerate(activations):
            y = y + (gain[i] * ACTIVATIONS[number](h[:, i]))[:, None] * b[i]
        return y

    def run(self, ops: Ops, x: Tensor, y: Tensor, b0: Tensor | None, segments: Segments, group: SiteGroup) -> Tensor:
        """y changed as a woven linear changes it; y itself stays."""
        out = y.clone()
        plan = ops.plan_rows(self.rows.rows, self.rows.vectors, self.rows.table, segments)
        ops.expand_add(out, ops.shrink(x, plan, group), plan, group, b0)
        return out

    def error_of(self, ops: Ops, runs: list[tuple[int, int]], group: SiteGroup) -> float:
        """Of a batch of (slot, num_tokens) against the formula."""
        torch.manual_seed(0)
        lengths, width = [n for _, n in runs], sum(group.out_features)
        x = torch.randn(sum(lengths), group.in_features).to(self.dtype)
        y, b0 = torch.randn(len(x), width).to(self.dtype), torch.randn(width).to(self.dtype)
        parts = zip(runs, *(states.double().split_with_sizes(lengths) for states in (x, y)), strict=True)
        truth = [self.truth(slot, x_part, y_part, b0.double(), group) for (slot, _), x_part, y_part in parts]
        actual = self.run(ops, x, y, b0, Segments.from_runs(runs), group)
        return relative_error(actual, torch.cat([*truth, torch.empty(0, width)]))


def group_of(sites: Sequence[Site]) -> SiteGroup:
    return SiteGroup(1, sites[0].in_features, tuple(site.out_features for site in sites))


def full_update(site: Site, rank: int, generator: np.random.Generator) -> SiteUpdate:
    return replace(random_rows(site, rank, generator, has_bias=True), out_scale=normal(generator, site.out_features))
