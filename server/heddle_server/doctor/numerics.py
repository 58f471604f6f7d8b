"""Do the kernels of this machine compute what plain torch computes? Small shapes, random numbers, some seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import accumulate

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor
from torch.nn import functional

from heddle_adapters.base_layout import BaseLayout, Site
from heddle_adapters.canonical import CompiledAdapter, Rows, SiteUpdate
from heddle_adapters.device_rows import DeviceRows
from heddle_adapters.eviction import EvictionOrder
from heddle_adapters.packer import Packer
from heddle_adapters.page_pool import PagePool
from heddle_kernels.nf4_weight import UnsupportedWeight
from heddle_kernels.ops import Ops
from heddle_kernels.paged_batch import PagedBatch
from heddle_kernels.reference import ReferenceOps
from heddle_kernels.segments import BASE_SLOT, Segments
from heddle_kernels.site_group import SiteGroup
from heddle_server.config import PAGE_TOKENS
from heddle_server.doctor.check import Check

# Of the largest value: two roundings of an operation's result, or of a sum in float32.
LIMITS = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
WIDTHS = (256, (256, 128))  # in and out features of two linears that are computed together
RANKS = (16, 5)
NUM_PAGES, PAGE_BYTES = 64, 4096
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 64


def check_operations(ops: Ops, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Each operation that a base and its adapters are made of."""
    group = SiteGroup(0, *WIDTHS)
    started = time.perf_counter()
    ops.prepare([group], dtype)
    yield Check("self-test", "ok", f"{ops.name} operations compiled or loaded in {time.perf_counter() - started:.1f} s")
    tests: dict[str, Callable[[], float]] = {
        "adapter rows": lambda: _rows_error(ops, group, device, dtype),
        "attention": lambda: _attention_error(ops, device, dtype),
        "4-bit product": lambda: _product_error(ops, device, dtype),
    }
    for name, measure in tests.items():
        try:
            error = measure()
        except UnsupportedWeight as reason:
            yield Check(name, "ok", f"bitsandbytes computes it: {reason}")
            continue
        except Exception as crash:  # whatever a broken driver, compiler or package comes up with
            yield Check(name, "FAIL", f"{type(crash).__name__}: {crash}", _REMEDY)
            continue
        found = f"{error:.1e} off plain torch, {LIMITS[dtype]:.1e} is allowed"
        yield Check(name, "ok", found) if error <= LIMITS[dtype] else Check(name, "FAIL", found, _REMEDY)


_REMEDY = "Serve with --kernels reference, and tell us what this machine is."


def _rows_error(ops: Ops, group: SiteGroup, device: torch.device, dtype: torch.dtype) -> float:
    """Tokens of two adapters and of none, in one batch."""
    rows, slots = _placed_adapters(group, device, dtype)
    runs = [(slots[0], 20), (BASE_SLOT, 3), (slots[1], 2)]
    x, y = _random(device, dtype, 25, group.in_features), _random(device, dtype, 25, sum(group.out_features))

    def compute(by: Ops) -> Tensor:
        changed = y.clone()
        plan = by.plan_rows(rows.rows, rows.vectors, rows.table, Segments.from_runs(runs))
        by.expand_add(changed, by.shrink(x, plan, group), plan, group, None)
        return changed

    return _error(compute(ops), compute(ReferenceOps()))


def _placed_adapters(group: SiteGroup, device: torch.device, dtype: torch.dtype) -> tuple[DeviceRows, list[int]]:
    """A random adapter of each rank in a pool of its own, and their slots."""
    generator = np.random.default_rng(0)
    sites = tuple(
        Site(f"site{number}", "linear", group.in_features, width, has_bias=False)
        for number, width in enumerate(group.out_features)
    )
    layout = BaseLayout("self-test", "sha256:" + "0" * 64, "none", sites)
    pool = PagePool(NUM_PAGES, PAGE_BYTES, EvictionOrder("lru"))
    memory = torch.zeros(NUM_PAGES * PAGE_BYTES, dtype=torch.uint8, device=device)
    rows, slots = DeviceRows(memory, pool, dtype, layout, {}), list[int]()
    packer = Packer(layout, str(dtype).removeprefix("torch."), PAGE_BYTES, {})
    for number, rank in enumerate(RANKS):
        updates = tuple(
            SiteUpdate(
                site.path,
                Rows.of(
                    a=generator.standard_normal((rank, site.in_features), np.float32),
                    b=generator.standard_normal((rank, site.out_features), np.float32),
                    gain=1 / rank,
                ),
            )
            for site in sites
        )
        packed = packer.pack(CompiledAdapter(f"sha256:{number:064}", updates))
        page_map = rows.reserve(packed)
        rows.copy(packed, page_map)
        slots.append(rows.publish(packed, page_map).slot)
    return rows, slots


def _attention_error(ops: Ops, device: torch.device, dtype: torch.dtype) -> float:
    """A sequence that decodes its 41st token, and one of 20 new ones."""
    new, lengths = (1, 20), (41, 20)
    bounds = tuple(accumulate(new, initial=0))
    pages = torch.tensor([[0, 1, 2], [3, 4, 0]], dtype=torch.int32, device=device)
    slots = [40 % PAGE_TOKENS + 2 * PAGE_TOKENS, *range(3 * PAGE_TOKENS, 3 * PAGE_TOKENS + 20)]
    batch = PagedBatch(
        query_start=torch.tensor(bounds, dtype=torch.int32, device=device),
        length=torch.tensor(lengths, dtype=torch.int32, device=device),
        page_table=pages,
        write_slot=torch.tensor(slots, device=device),
        query_bounds=bounds,
        lengths=lengths,
    )
    pool = _random(device, dtype, 5, 2, PAGE_TOKENS, NUM_KV_HEADS, HEAD_DIM)
    query = _random(device, dtype, sum(new), NUM_HEADS, HEAD_DIM)
    key, value = (_random(device, dtype, sum(new), NUM_KV_HEADS, HEAD_DIM) for _ in range(2))

    def compute(by: Ops) -> Tensor:
        kv = pool.clone()
        by.write_kv(key, value, kv, batch)
        return by.paged_attention(query, kv, batch, HEAD_DIM**-0.5)

    return _error(compute(ops), compute(ReferenceOps()))


def _product_error(ops: Ops, device: torch.device, dtype: torch.dtype) -> float:
    """Few tokens against an NF4 weight, beside the same weight written out."""
    make = getattr(ops, "nf4_linear", None)
    if make is None:
        raise UnsupportedWeight(f"{ops.name} operations have none of their own")
    packed, state = quantize_4bit(_random(device, dtype, 256, 256), blocksize=64, quant_type="nf4")
    x = _random(device, dtype, 3, 256)
    linear = make(packed, state, None, dtype)
    return _error(linear(x), functional.linear(x.float(), dequantize_4bit(packed, state).float()))


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def _error(actual: Tensor, expected: Tensor) -> float:
    """Of the largest deviation to the largest value; what is no number is infinitely far off."""
    deviation = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
    return float(deviation.nan_to_num(torch.inf))
