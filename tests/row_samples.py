"""Random updates for a small base, the canonical formula in float64, and adapters put into a pool in one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from heddle_adapters.base_layout import BaseLayout, KvLayout, Site
from heddle_adapters.canonical import CompiledAdapter, Floats, PrefixKv, Rows, SiteUpdate, TokenRows
from heddle_adapters.device_rows import DeviceRows, PlacedAdapter
from heddle_adapters.eviction import EvictionOrder
from heddle_adapters.packed_adapter import PackedAdapter
from heddle_adapters.packer import Packer
from heddle_adapters.page_pool import PagePool
from heddle_adapters.positions import Positions
from heddle_kernels.reference import ReferenceOps
from heddle_kernels.segments import BASE_SLOT, Segments
from heddle_kernels.site_group import SiteGroup

PAGE_BYTES = 512
DIGEST = "sha256:" + "7" * 64
ALL_TOKENS = Positions()

POPULARITY: dict[str, list[int]] = {  # which of the placed adapters each run of tokens uses
    "distinct": [0, 1, 2, 3, 4, 5],
    "uniform": [0, 0, 1, 1, 2, 2],
    "zipf": [0, 0, 0, 1, 1, 2],
    "identical": [0, 0, 0, 0, 0, 0],
    "skewed": [0, 0, 0, 0, 0, 5],
    "with_base": [BASE_SLOT, 0, BASE_SLOT, 1, BASE_SLOT, 2],
    "empty": [],
}
RANKS: dict[str, list[int]] = {
    "1": [1] * 6,
    "8": [8] * 6,
    "17": [17] * 6,
    "256": [256] * 6,
    "mixed": [1, 8, 3, 64, 17, 2],
}


def layout_of(*sites: Site) -> BaseLayout:
    return BaseLayout("random", "sha256:" + "0" * 64, "none", sites)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def normal(generator: np.random.Generator, *shape: int) -> Floats:
    return generator.standard_normal(shape, dtype=np.float32)


def random_rows(site: Site, rank: int, generator: np.random.Generator, has_bias: bool = False) -> SiteUpdate:
    a, b = normal(generator, rank, site.in_features), normal(generator, rank, site.out_features)
    gain, c = normal(generator, rank), normal(generator, rank)
    return SiteUpdate(
        site=site.path,
        rows=Rows.of(a, b, gain, c) if rank else None,
        bias=normal(generator, site.out_features) if has_bias else None,
    )


def random_scales(site: Site, generator: np.random.Generator, of_input: bool) -> SiteUpdate:
    """One that scales the site's input, or its whole output with the base's bias."""
    scale = normal(generator, site.in_features if of_input else site.out_features)
    return replace(
        random_rows(site, 0, generator),
        in_scale=scale if of_input else None,
        out_scale=None if of_input else scale,
        scales_base_bias=not of_input,
    )


def random_tokens(generator: np.random.Generator, token_ids: list[int], width: int, reach_head: bool) -> TokenRows:
    return TokenRows(np.array(token_ids, np.int64), normal(generator, len(token_ids), width), reach_head)


def random_prefix(generator: np.random.Generator, kv: KvLayout, num_tokens: int) -> PrefixKv:
    shape = (kv.num_layers, num_tokens, kv.num_kv_heads, kv.head_dim)
    return PrefixKv(normal(generator, *shape), normal(generator, *shape))


def rounded(update: SiteUpdate, dtype: torch.dtype) -> SiteUpdate:
    """The update with its rows as the pool holds them."""

    def as_stored(values: Floats) -> Floats:
        stored: Floats = torch.from_numpy(values).to(dtype).float().numpy()
        return stored

    rows = update.rows
    if rows is None:
        return update
    return replace(update, rows=replace(rows, a=as_stored(rows.a), b=as_stored(rows.b)))


def canonical(update: SiteUpdate | None, x: Tensor, weight: Tensor, b0: Tensor | None) -> Tensor:
    """The formula of `heddle_adapters.canonical` for one site, in float64; None is the base alone."""

    def exact(values: Floats | None, absent: float) -> Tensor:
        return torch.tensor(absent).double() if values is None else torch.from_numpy(values).double()

    x, weight, b0 = x.double(), weight.double(), torch.zeros(len(weight)).double() if b0 is None else b0.double()
    if update is None:
        return x @ weight.T + b0
    x, out_scale = x * exact(update.in_scale, 1), exact(update.out_scale, 1)
    y = out_scale * (x @ weight.T) + (out_scale if update.scales_base_bias else 1) * b0 + exact(update.bias, 0)
    if update.rows is None:
        return y
    parts = (exact(part, 0) for part in (update.rows.a, update.rows.b, update.rows.gain, update.rows.c))
    for a, b, gain, c in zip(*parts, strict=True):
        y = y + gain * (x @ a + c)[:, None] * b
    return y


def make_rows(
    layout: BaseLayout,
    dtype: torch.dtype,
    num_pages: int,
    base_bias: Mapping[str, Floats] | None = None,
    device: str = "cpu",
) -> tuple[DeviceRows, PagePool]:
    """An empty pool whose every byte is 0xFF, which is NaN in all dtypes."""
    pool = PagePool(num_pages, PAGE_BYTES, EvictionOrder("lru"))
    memory = torch.full((num_pages * PAGE_BYTES,), 0xFF, dtype=torch.uint8, device=device)
    return DeviceRows(memory, pool, dtype, layout, base_bias or {}), pool


def pack(
    layout: BaseLayout,
    dtype: torch.dtype,
    updates: list[SiteUpdate],
    base_bias: Mapping[str, Floats] | None = None,
    tokens: TokenRows | None = None,
    prefix: PrefixKv | None = None,
    positions: Positions = ALL_TOKENS,
) -> PackedAdapter:
    packer = Packer(layout, dtype_name(dtype), PAGE_BYTES, base_bias or {})
    return packer.pack(CompiledAdapter(DIGEST, tuple(updates), tokens, prefix, positions))


def place(rows: DeviceRows, packed: PackedAdapter) -> PlacedAdapter:
    page_map = rows.reserve(packed)
    rows.copy(packed, page_map)
    return rows.publish(packed, page_map)


def apply(rows: DeviceRows, x: Tensor, weight: Tensor, b0: Tensor | None, segments: Segments, site: int) -> Tensor:
    """One site of the batch through the reference operations, as a woven linear does it."""
    ops, group = ReferenceOps(), SiteGroup(site, x.shape[1], (weight.shape[0],))
    plan = ops.plan_rows(rows.rows, rows.vectors, rows.table, segments)
    scaled = ops.scale_input(x, plan, site)
    y = torch.nn.functional.linear(scaled, weight, b0)
    ops.expand_add(y, ops.shrink(scaled, plan, group), plan, group, b0)
    return y


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Of the largest deviation to the largest value; NaN counts as infinite."""
    if truth.numel() == 0:
        return 0.0
    error = (actual.cpu().double() - truth).abs().max() / truth.abs().max()
    return error.nan_to_num(torch.inf).item()
