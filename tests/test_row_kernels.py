"""Shrink, expand and vectors over row tables, against a float64 loop over tokens, for every popularity and rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from heddle_adapters.canonical import CompiledAdapter, SiteUpdate
from heddle_adapters.device_rows import DeviceRows, PackedAdapter, Packer, PlacedAdapter
from heddle_adapters.page_pool import PagePool
from heddle_kernels import reference
from heddle_kernels.segments import BASE_SLOT, Segments
from tolerances import OPERATION

IN_FEATURES, OUT_FEATURES, PAGE_BYTES = 40, 56, 512
SITE = 1  # not the first, so that a wrong site number shows

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


@dataclass
class Placed:
    """Adapters in a pool, and the canonical form each was made from."""

    rows: DeviceRows
    updates: list[SiteUpdate]
    slots: list[int]


def random_update(rank: int, generator: np.random.Generator, vectors: bool = True) -> SiteUpdate:
    def values(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    return SiteUpdate(
        site="site",
        a=values(rank, IN_FEATURES),
        b=values(rank, OUT_FEATURES),
        gain=values(rank),
        c=values(rank),
        in_scale=values(IN_FEATURES) if vectors else None,
        out_scale=values(OUT_FEATURES) if vectors else None,
        bias=values(OUT_FEATURES) if vectors else None,
    )


def place(updates: list[SiteUpdate], dtype: torch.dtype, num_pages: int = 4000) -> Placed:
    pool = PagePool(num_pages, PAGE_BYTES)
    rows = DeviceRows(torch.zeros(num_pages * PAGE_BYTES, dtype=torch.uint8), pool, dtype, num_sites=3)
    slots = []
    for update in updates:
        packed = Packer(PAGE_BYTES, dtype).pack(CompiledAdapter("d", (update,)), {"site": SITE}, lambda path: None)
        slots.append(rows.place(packed).slot)
    pool.check_integrity()
    return Placed(rows, updates, slots)


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, token_updates: list[SiteUpdate | None]) -> Tensor:
    """The canonical formula, one token at a time, in float64."""
    outputs = []
    for token, update in zip(x.double(), token_updates, strict=True):
        b0 = torch.zeros(OUT_FEATURES, dtype=torch.float64) if bias is None else bias.double()
        if update is None:
            outputs.append(weight.double() @ token + b0)
            continue
        scaled = token if update.in_scale is None else token * torch.from_numpy(update.in_scale).double()
        y = weight.double() @ scaled
        y = y if update.out_scale is None else y * torch.from_numpy(update.out_scale).double()
        y = y + b0 + (0 if update.bias is None else torch.from_numpy(update.bias).double())
        for a, b, gain, c in zip(update.a, update.b, update.gain, update.c, strict=True):
            y = y + gain * (torch.from_numpy(a).double() @ scaled + c) * torch.from_numpy(b).double()
        outputs.append(y)
    return torch.stack(outputs) if outputs else torch.zeros(0, OUT_FEATURES, dtype=torch.float64)


def apply(placed: Placed, x: Tensor, weight: Tensor, bias: Tensor | None, segments: Segments) -> Tensor:
    rows = placed.rows
    scaled = reference.scale_input(x, rows.vectors, rows.table, segments, SITE)
    y = torch.nn.functional.linear(scaled, weight, bias)
    h = reference.shrink(scaled, rows.rows, rows.table, segments, SITE)
    reference.expand_add(y, h, rows.rows, rows.vectors, rows.table, segments, SITE, bias)
    return y


def rounded(update: SiteUpdate, dtype: torch.dtype) -> SiteUpdate:
    """The update with its rows as the pool holds them."""

    def as_stored(values: np.ndarray) -> np.ndarray:
        return torch.from_numpy(values).to(dtype).float().numpy()

    return SiteUpdate(**{**vars(update), "a": as_stored(update.a), "b": as_stored(update.b)})


@pytest.mark.parametrize("dtype", OPERATION, ids=str)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("popularity", POPULARITY)
def test_matches_the_formula(popularity: str, ranks: str, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(7)
    placed = place([random_update(rank, generator) for rank in RANKS[ranks]], dtype)
    lengths = [3, 1, 4, 1, 5, 2]
    runs = [
        (use if use == BASE_SLOT else placed.slots[use], n)
        for use, n in zip(POPULARITY[popularity], lengths, strict=False)
    ]
    segments = Segments.from_runs(sorted(runs))
    torch.manual_seed(0)
    x = torch.randn(segments.num_tokens, IN_FEATURES, dtype=dtype)
    weight, bias = torch.randn(OUT_FEATURES, IN_FEATURES, dtype=dtype), torch.randn(OUT_FEATURES, dtype=dtype)
    by_slot = dict(zip(placed.slots, placed.updates, strict=True))
    updates = [rounded(by_slot[s], dtype) if s != BASE_SLOT else None for s, n in sorted(runs) for _ in range(n)]
    truth = expected(x, weight, bias, updates)
    actual = apply(placed, x, weight, bias, segments).double()
    scale = truth.abs().max().item() if truth.numel() else 1.0
    error = (actual - truth).abs().max().item() / scale if truth.numel() else 0.0
    # rank 256 sums 256 rows after 40-wide dots: rounding of the inputs' own dtype dominates, not the rank
    assert error <= OPERATION[dtype], f"relative error {error:.1e}"


def test_base_rows_are_untouched_bit_for_bit() -> None:
    placed = place([random_update(8, np.random.default_rng(1))], torch.float32)
    x, weight = torch.randn(6, IN_FEATURES), torch.randn(OUT_FEATURES, IN_FEATURES)
    segments = Segments.from_runs([(BASE_SLOT, 2), (placed.slots[0], 2), (BASE_SLOT, 2)])
    base = torch.nn.functional.linear(x, weight)
    actual = apply(placed, x, weight, None, segments)
    assert torch.equal(actual[:2], base[:2])
    assert torch.equal(actual[4:], base[4:])
    assert not torch.allclose(actual[2:4], base[2:4])


def test_absent_vectors_and_rows_change_nothing() -> None:
    empty = np.zeros((0, IN_FEATURES), np.float32), np.zeros((0, OUT_FEATURES), np.float32), np.zeros(0, np.float32)
    bias_only = SiteUpdate("site", *empty, c=empty[2], bias=np.full(OUT_FEATURES, 2.0, np.float32))
    placed = place([bias_only], torch.float32)
    x, weight = torch.randn(3, IN_FEATURES), torch.randn(OUT_FEATURES, IN_FEATURES)
    actual = apply(placed, x, weight, None, Segments.from_runs([(placed.slots[0], 3)]))
    assert torch.allclose(actual, torch.nn.functional.linear(x, weight) + 2.0, atol=1e-6)
    assert placed.rows.sites_of(placed.slots[0]) == {SITE}


def test_slots_heap_and_pages_are_reused_after_removal() -> None:
    generator = np.random.default_rng(3)
    pool = PagePool(400, PAGE_BYTES)
    rows = DeviceRows(torch.zeros(400 * PAGE_BYTES, dtype=torch.uint8), pool, torch.float32, num_sites=3)
    placed = dict[int, PlacedAdapter]()
    for number in range(300):
        if len(placed) == 6:
            rows.remove(placed.pop(min(placed)))
        update = random_update(1 + number % 13, generator)
        packed = Packer(PAGE_BYTES, torch.float32).pack(CompiledAdapter("d", (update,)), {"site": SITE}, lambda p: None)
        placed[number] = rows.place(packed)
        pool.check_integrity()
    assert rows.table.num_slots == 8, "six adapters at a time need no more slots than the table starts with"
    for adapter in placed.values():
        rows.remove(adapter)
    assert pool.num_free == 400
    assert not rows.rows.any(), "freed pages are wiped"


def test_rows_never_straddle_pages_and_long_rows_take_adjacent_ones() -> None:
    generator = np.random.default_rng(4)
    wide = SiteUpdate(  # 1,000 float32 = 4,000 bytes a row, eight pages
        "site",
        a=generator.standard_normal((3, 1000)).astype(np.float32),
        b=generator.standard_normal((3, 20)).astype(np.float32),
        gain=np.ones(3, np.float32),
        c=np.zeros(3, np.float32),
    )
    pool = PagePool(64, PAGE_BYTES)
    rows = DeviceRows(torch.zeros(64 * PAGE_BYTES, dtype=torch.uint8), pool, torch.float32, num_sites=3)
    packed = Packer(PAGE_BYTES, torch.float32).pack(CompiledAdapter("d", (wide,)), {"site": SITE}, lambda path: None)
    rows.place(packed)
    elements = PAGE_BYTES // 4
    for row in range(3):
        begin = int(rows.table.a_offset[row])
        assert torch.equal(rows.rows[begin : begin + 1000], torch.from_numpy(wide.a[row]))
    for row in range(3):
        begin = int(rows.table.b_offset[row])
        assert begin // elements == (begin + 19) // elements, "a short row lies in one page"
        assert torch.equal(rows.rows[begin : begin + 20], torch.from_numpy(wide.b[row]))


def test_a_free_pool_takes_whatever_fits_however_it_was_used_before() -> None:
    """Long runs are placed first, so that short ones cannot cut the room they need in two."""
    generator = np.random.default_rng(5)

    def packed(width: int, num_rows: int) -> PackedAdapter:
        update = SiteUpdate(
            "site",
            a=generator.standard_normal((num_rows, 8)).astype(np.float32),
            b=generator.standard_normal((num_rows, width)).astype(np.float32),
            gain=np.ones(num_rows, np.float32),
            c=np.zeros(num_rows, np.float32),
        )
        return Packer(PAGE_BYTES, torch.float32).pack(
            CompiledAdapter("d", (update,)), {"site": SITE}, lambda path: None
        )

    pool = PagePool(8, PAGE_BYTES)
    rows = DeviceRows(torch.zeros(8 * PAGE_BYTES, dtype=torch.uint8), pool, torch.float32, num_sites=3)
    for first in range(1, 8):
        held = [pool.allocate(1)[0] for _ in range(first)]
        for page in held:
            pool.free(page)
        wide = packed(width=3 * PAGE_BYTES // 4, num_rows=2)
        assert wide.num_pages in (7, 8)
        rows.remove(rows.place(wide))
        assert pool.num_free == 8
