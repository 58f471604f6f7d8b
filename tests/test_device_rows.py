"""Adapters and mixes in a pool full of NaN: what they compute, what they take and what they give back."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from heddle_adapters.base_layout import KvLayout, Site
from heddle_adapters.canonical import Floats, Rows, SiteUpdate
from heddle_adapters.device_rows import DeviceRows, PlacedAdapter, PlacedMix
from heddle_adapters.packed_adapter import PackedAdapter
from heddle_adapters.page_pool import PagePool
from heddle_adapters.positions import Positions
from heddle_adapters.run_allocator import OutOfSpace
from heddle_kernels.row_table import COLUMNS
from heddle_kernels.segments import Segments
from row_samples import (
    PAGE_BYTES,
    apply,
    canonical,
    layout_of,
    make_rows,
    normal,
    pack,
    place,
    random_prefix,
    random_rows,
    random_scales,
    random_tokens,
    relative_error,
    rounded,
)
from tolerances import OPERATION

NUM_TOKENS = 3
NUM_CHURN = 1_000
POOL_PAGES = 96

SITES = (
    Site("q", "linear", 24, 40, has_bias=True),
    Site("v", "linear", 40, 12, has_bias=False),
    Site("odd", "linear", 13, 31, has_bias=True),
    Site("wide", "linear", 20, 300, has_bias=True),  # rows and vectors longer than a page
)
LAYOUT = layout_of(*SITES)
KV = KvLayout(num_layers=4, num_kv_heads=2, head_dim=4)
BASE_BIAS = {site.path: normal(np.random.default_rng(9), site.out_features) for site in SITES if site.has_bias}
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NO_CUDA])]

Updates = list[SiteUpdate]


@pytest.fixture(autouse=True)
def _same_inputs_every_time() -> None:
    torch.manual_seed(0)


def random_additive(generator: np.random.Generator, max_rank: int = 12) -> Updates:
    """Rows of mixed ranks, and here and there a bias, on a random choice of sites."""
    chosen = [site for site in SITES if generator.random() < 0.7] or [SITES[0]]
    return [
        random_rows(site, int(generator.integers(1, max_rank + 1)), generator, has_bias=generator.random() < 0.5)
        for site in chosen
    ]


def random_scaling(generator: np.random.Generator) -> Updates:
    chosen = [site for site in SITES if generator.random() < 0.7] or [SITES[0]]
    return [random_scales(site, generator, of_input=site.path == "v") for site in chosen]


def summed(parts: Sequence[tuple[Updates, float]], site: Site) -> SiteUpdate:
    """The mix as one adapter: what each part adds, times its scale."""
    found = [(update, scale) for updates, scale in parts for update in updates if update.site == site.path]
    biases = [np.float32(scale) * update.bias for update, scale in found if update.bias is not None]
    rows = [(update.rows, scale) for update, scale in found if update.rows is not None]
    listed = Rows.of(
        a=np.concatenate([np.zeros((0, site.in_features), np.float32), *(each.a for each, _ in rows)]),
        b=np.concatenate([np.zeros((0, site.out_features), np.float32), *(each.b for each, _ in rows)]),
        gain=np.concatenate([np.zeros(0, np.float32), *(np.float32(scale) * each.gain for each, scale in rows)]),
        c=np.concatenate([np.zeros(0, np.float32), *(each.c for each, _ in rows)]),
    )
    return SiteUpdate(site.path, listed, bias=sum(biases[1:], start=biases[0]) if biases else None)


def multiplied(parts: Sequence[tuple[Updates, float]], site: Site) -> SiteUpdate:
    """The mix as one adapter: the product of 1 + scale * (l - 1)."""
    found = [(update, scale) for updates, scale in parts for update in updates if update.site == site.path]

    def product(factors: list[tuple[Floats | None, float]]) -> Floats | None:
        present = [1 + scale * (factor - 1) for factor, scale in factors if factor is not None]
        return np.prod(present, axis=0).astype(np.float32) if present else None

    return replace(
        random_rows(site, 0, np.random.default_rng(0)),
        in_scale=product([(update.in_scale, scale) for update, scale in found]),
        out_scale=product([(update.out_scale, scale) for update, scale in found]),
        scales_base_bias=True,
    )


def assert_computes(rows: DeviceRows, slot: int, updates: Updates, sites: Sequence[int] = range(len(SITES))) -> None:
    """At these sites what the canonical formula says for these updates."""
    by_site = {update.site: update for update in updates}
    dtype = rows.rows.dtype
    for number, site in ((number, SITES[number]) for number in sites):
        x, weight = torch.randn(NUM_TOKENS, site.in_features), torch.randn(site.out_features, site.in_features)
        b0 = torch.from_numpy(BASE_BIAS[site.path]) if site.has_bias else None
        update = by_site.get(site.path)
        truth = canonical(rounded(update, dtype) if update else None, x, weight, b0)
        segments = Segments.from_runs([(slot, NUM_TOKENS)])
        on_device: list[Tensor | None] = [t if t is None else t.to(rows.rows.device) for t in (x, weight, b0)]
        x_there, weight_there, b0_there = on_device
        assert x_there is not None
        assert weight_there is not None
        error = relative_error(apply(rows, x_there, weight_there, b0_there, segments, number), truth)
        assert error <= OPERATION[torch.float32], f"{site.path}: relative error {error:.1e}"


def pack_here(updates: Updates, dtype: torch.dtype = torch.bfloat16) -> PackedAdapter:
    return pack(LAYOUT, dtype, updates, BASE_BIAS)


def make_here(dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> tuple[DeviceRows, PagePool]:
    return make_rows(LAYOUT, dtype, POOL_PAGES, BASE_BIAS, device)


def snapshot(rows: DeviceRows, pool: PagePool) -> list[object]:
    """All that a failed attempt must leave alone."""
    return [pool.num_free, *(getattr(rows.table, column).clone() for column in COLUMNS)]


def assert_unchanged(before: list[object], after: list[object]) -> None:
    for was, now in zip(before, after, strict=True):
        assert torch.equal(was, now) if isinstance(was, Tensor) and isinstance(now, Tensor) else was == now


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", OPERATION, ids=str)
def test_computes_the_formula_in_pages_of_nan(dtype: torch.dtype, device: str) -> None:
    generator = np.random.default_rng(1)
    rows, pool = make_here(dtype, device)
    for updates in (random_additive(generator), random_scaling(generator), random_additive(generator)):
        placed = place(rows, pack_here(updates, dtype))
        assert_computes(rows, placed.slot, updates)
        changed = {update.site for update in updates}
        assert rows.line_of(placed.slot).touched_sites == {i for i, site in enumerate(SITES) if site.path in changed}
        rows.remove(placed)
        pool.check_integrity()
    assert pool.num_free == POOL_PAGES
    assert rows.rows.isnan().any(), "pages are not wiped: whoever comes next writes or ignores every byte"


def test_copy_writes_every_byte_of_its_pages_and_no_other() -> None:
    rows, pool = make_here()
    packed = pack_here(random_additive(np.random.default_rng(2)))
    held = pool.allocate(7)
    for page in held[::2]:  # so that the adapter's pages do not lie in one piece
        pool.free(page)
    page_map = rows.reserve(packed)
    rows.copy(packed, page_map)
    pages = rows.rows.view(torch.uint8).view(POOL_PAGES, PAGE_BYTES)
    assert torch.equal(pages[torch.from_numpy(page_map.pages)], torch.from_numpy(packed.pages))
    others = sorted(set(range(POOL_PAGES)) - set(page_map.pages.tolist()))
    assert (pages[others] == 0xFF).all()


def test_nothing_is_published_before_publish_and_cancel_gives_back() -> None:
    rows, pool = make_here()
    packed = pack_here(random_additive(np.random.default_rng(3)))
    before = snapshot(rows, pool)
    page_map = rows.reserve(packed)
    assert pool.num_free == POOL_PAGES - packed.num_pages
    rows.copy(packed, page_map)
    rows.cancel(page_map)
    assert_unchanged(before, snapshot(rows, pool))
    pool.check_integrity()


def test_what_does_not_fit_takes_nothing() -> None:
    rows, pool = make_here()
    generator = np.random.default_rng(4)
    bias_only = [replace(random_rows(site, 0, generator), bias=normal(generator, site.out_features)) for site in SITES]
    placed = place(rows, pack_here(bias_only))
    held = pool.allocate(pool.num_free)
    for page in held[::2]:  # half of it is free, but no two pages side by side
        pool.free(page)
    before = snapshot(rows, pool)
    large = pack_here([random_rows(SITES[0], 200, generator)])
    wide = pack_here([random_rows(SITES[0], 4, generator), random_rows(SITES[3], 4, generator)])
    assert large.num_pages > pool.num_free > wide.num_pages
    for packed in (large, wide):
        with pytest.raises(OutOfSpace):
            rows.reserve(packed)
        assert_unchanged(before, snapshot(rows, pool))
    with pytest.raises(OutOfSpace):
        rows.compose([(placed, 0.5)])  # its bias of 300 numbers needs three pages side by side
    assert_unchanged(before, snapshot(rows, pool))
    pool.check_integrity()


def test_a_free_pool_takes_whatever_fits_however_it_was_used_before() -> None:
    """Long runs are placed first, so that short ones cannot cut the room they need in two."""
    generator = np.random.default_rng(5)
    update = random_rows(SITES[3], 2, generator)
    assert update.rows is not None
    wide = replace(update, rows=replace(update.rows, b=normal(generator, 2, 3 * PAGE_BYTES // 4)))
    packed = pack_here([random_rows(SITES[0], 4, generator), wide], torch.float32)
    rows, pool = make_rows(LAYOUT, torch.float32, packed.num_pages, BASE_BIAS)
    for first in range(1, packed.num_pages):
        for page in pool.allocate(first):
            pool.free(page)
        rows.remove(place(rows, packed))
        assert pool.num_free == packed.num_pages


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(5))
def test_a_mix_is_the_exact_sum(seed: int, device: str) -> None:
    generator = np.random.default_rng(seed)
    rows, pool = make_here(device=device)
    parts = [(random_additive(generator), float(scale)) for scale in generator.uniform(-2, 2, 4)]
    placed = [(place(rows, pack_here(updates)), scale) for updates, scale in parts]
    num_free = pool.num_free
    mix = rows.compose(placed)
    expected = [summed(parts, site) for site in SITES]
    assert mix.num_rows == sum(adapter.num_rows for adapter, _ in placed)
    bias_bytes = sum(update.bias.nbytes for update in expected if update.bias is not None)
    assert mix.num_pages <= -(-bias_bytes // PAGE_BYTES) + 2, "vectors only: no row is copied"
    assert_computes(rows, mix.slot, expected)
    touched = [number for number, update in enumerate(expected) if update.num_rows or update.bias is not None]
    assert rows.line_of(mix.slot).touched_sites == set(touched)
    rows.remove_mix(mix)
    assert pool.num_free == num_free
    for (adapter, _), (updates, _) in zip(placed, parts, strict=True):
        assert_computes(rows, adapter.slot, updates)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(5))
def test_a_mix_of_scales_is_their_product(seed: int, device: str) -> None:
    generator = np.random.default_rng(seed)
    rows, _ = make_here(device=device)
    parts = [(random_scaling(generator), float(scale)) for scale in generator.uniform(-1, 2, 3)]
    mix = rows.compose([(place(rows, pack_here(updates)), scale) for updates, scale in parts])
    assert mix.num_rows == 0
    assert_computes(rows, mix.slot, [multiplied(parts, site) for site in SITES])


def test_scale_zero_is_the_base_and_scale_one_the_adapter() -> None:
    generator = np.random.default_rng(6)
    rows, _ = make_here()
    for updates in (random_additive(generator), random_scaling(generator)):
        placed = place(rows, pack_here(updates))
        assert_computes(rows, rows.compose([(placed, 0.0)]).slot, [])
        assert_computes(rows, rows.compose([(placed, 1.0)]).slot, updates)
    rows_only = place(rows, pack_here([random_rows(SITES[0], 3, generator)]))
    assert rows.compose([(rows_only, 0.5)]).num_pages == 0


def test_what_scales_and_what_adds_never_meet_at_a_site() -> None:
    generator = np.random.default_rng(7)
    rows, _ = make_here()
    scales = place(rows, pack_here([random_scales(SITES[0], generator, of_input=False)]))
    adding = place(rows, pack_here([random_rows(SITES[0], 2, generator)]))
    bias = replace(random_rows(SITES[0], 0, generator), bias=normal(generator, 40))
    for other in (adding, place(rows, pack_here([bias]))):
        with pytest.raises(AssertionError, match="mixed with scales"):
            rows.compose([(scales, 1.0), (other, 1.0)])


def test_the_table_grows_as_it_must() -> None:
    generator = np.random.default_rng(8)
    rows, pool = make_rows(LAYOUT, torch.bfloat16, 4_000, BASE_BIAS)
    num_slots, heap_capacity = rows.table.num_slots, rows.table.heap_capacity
    updates = [[random_rows(SITES[0], 3, generator)] for _ in range(num_slots + 1)]
    placed = [place(rows, pack_here(one)) for one in updates]
    assert rows.table.num_slots == 2 * num_slots
    assert rows.table.heap_capacity == heap_capacity
    twenty = [random_rows(SITES[1], 20, generator)]
    resident = place(rows, pack_here(twenty))
    mixes = [rows.compose([(resident, 0.4)] * 5) for _ in range(heap_capacity // 100 + 1)]
    assert rows.table.heap_capacity > heap_capacity
    for adapter, one in zip(placed, updates, strict=True):
        assert_computes(rows, adapter.slot, one)
    listed = twenty[0].rows
    assert listed is not None
    for mix in mixes:
        assert_computes(rows, mix.slot, [replace(twenty[0], rows=replace(listed, gain=listed.gain * 2))])
        rows.remove_mix(mix)
    for adapter in [*placed, resident]:
        rows.remove(adapter)
    assert pool.num_free == 4_000


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", OPERATION, ids=str)
def test_deltas_tokens_and_prefixes_are_found_in_scattered_pages(dtype: torch.dtype, device: str) -> None:
    generator = np.random.default_rng(11)
    q, v, odd, wide = SITES
    updates = [
        random_rows(q, 3, generator, has_bias=True),
        replace(random_rows(odd, 2, generator), delta=normal(generator, odd.out_features, odd.in_features)),
        SiteUpdate(wide.path, delta=normal(generator, wide.out_features, wide.in_features)),
    ]
    tokens = random_tokens(generator, [2, 3, 40, 128, 129], v.in_features, reach_head=True)
    prefix, positions = random_prefix(generator, KV, 9), Positions(invocation=(4, 5))
    layout = msgspec.structs.replace(LAYOUT, kv=KV)
    packed = pack(layout, dtype, updates, BASE_BIAS, tokens, prefix, positions)
    rows, pool = make_rows(layout, dtype, 4 * packed.num_pages, BASE_BIAS, device)
    held = pool.allocate(2 * packed.num_pages)
    for page in held[::2]:  # so that pages lie apart
        pool.free(page)
    placed = place(rows, packed)
    assert (placed.num_prefix_tokens, placed.positions) == (9, positions)

    pages = rows.rows.view(4 * packed.num_pages, -1)
    stored = torch.from_numpy(packed.pages[: packed.num_prefix_pages]).view(dtype)
    assert len(placed.prefix_pages) == packed.num_prefix_pages > 1
    assert np.diff(placed.prefix_pages).max() > 1, "no two side by side"
    assert torch.equal(pages[placed.prefix_pages].cpu(), stored)

    line = rows.line_of(placed.slot)
    assert line.touched_sites == {0, 2, 3}
    assert line.deltas.keys() == {2, 3}
    for update, site in zip(updates[1:], (2, 3), strict=True):
        assert update.delta is not None
        assert len(line.deltas[site]) > 1
        delta = torch.cat([piece.cpu() for piece in line.deltas[site]])
        assert torch.equal(delta, torch.from_numpy(update.delta).to(dtype))
        address, end = rows.rows.data_ptr(), rows.rows.data_ptr() + rows.rows.nbytes
        assert all(address <= piece.data_ptr() < end for piece in line.deltas[site]), "views of the pool, not copies"
    assert line.tokens is not None
    assert line.tokens.reach_head
    found, offsets = line.tokens.find(np.array([0, 129, 1, 40, 130, 2, 40, 127, 2**40]))
    assert found.tolist() == [1, 3, 5, 6]
    for offset, token in zip(offsets.tolist(), (129, 40, 2, 40), strict=True):
        values = tokens.values[tokens.token_ids.tolist().index(token)]
        assert torch.equal(rows.rows[offset : offset + v.in_features].cpu(), torch.from_numpy(values).to(dtype))
    assert_computes(rows, placed.slot, [updates[0]], sites=[0, 1])
    rows.remove(placed)
    assert pool.num_free == 3 * packed.num_pages
    again = place(rows, pack(layout, dtype, [updates[0]], BASE_BIAS))
    assert again.slot == placed.slot
    assert (again.prefix_pages, again.positions.are_all) == ([], True)
    after = rows.line_of(again.slot)
    assert after.touched_sites == {0}
    assert not after.deltas
    assert after.tokens is None


def test_a_host_buffer_is_what_pages_are_read_into() -> None:
    rows, _ = make_here()
    buffer = rows.allocate_host(1_000)
    buffer[:] = 7
    assert (buffer == 7).all()
    assert buffer.shape == (1_000,)
    assert buffer.dtype == np.uint8
    assert buffer.flags.c_contiguous


def test_everything_resident_computes_right_through_churn() -> None:
    """Adapters and mixes come and go in a small pool, copied by another thread, until the seams would show."""
    generator = np.random.default_rng(10)
    rows, pool = make_here()
    resident: list[tuple[PlacedAdapter, Updates]] = []
    mixes: list[tuple[PlacedMix, list[int], Updates]] = []  # and the slots of its parts
    num_refused = num_composed = 0
    with ThreadPoolExecutor(1) as copier:
        for _ in range(NUM_CHURN):
            action = generator.integers(6)
            in_a_mix = {slot for _, slots, _ in mixes for slot in slots}
            free = [item for item in resident if item[0].slot not in in_a_mix]
            try:
                if action <= 2:
                    updates = random_additive(generator, max_rank=6)
                    page_map = rows.reserve(packed := pack_here(updates))
                    copier.submit(rows.copy, packed, page_map).result()
                    if generator.random() < 0.1:
                        rows.cancel(page_map)
                    else:
                        resident.append((rows.publish(packed, page_map), updates))
                elif action == 3 and resident:
                    chosen = [resident[i] for i in generator.integers(len(resident), size=2)]
                    scales = generator.uniform(-1, 1, 2).tolist()
                    mix = rows.compose([(placed, s) for (placed, _), s in zip(chosen, scales, strict=True)])
                    parts = [(updates, s) for (_, updates), s in zip(chosen, scales, strict=True)]
                    slots = [placed.slot for placed, _ in chosen]
                    mixes.append((mix, slots, [summed(parts, site) for site in SITES]))
                    num_composed += 1
                elif action == 4 and mixes:
                    rows.remove_mix(mixes.pop(int(generator.integers(len(mixes))))[0])
                elif action == 5 and free:
                    removed = free[generator.integers(len(free))]
                    resident.remove(removed)
                    rows.remove(removed[0])
            except OutOfSpace:
                num_refused += 1
                if mixes:
                    rows.remove_mix(mixes.pop(0)[0])
            pool.check_integrity()
            known = [(placed.slot, updates) for placed, updates in resident] + [(m.slot, u) for m, _, u in mixes]
            if known:
                assert_computes(rows, *known[int(generator.integers(len(known)))])
    for slot, updates in known:
        assert_computes(rows, slot, updates)
    assert num_refused > 10, "the pool was never short"
    assert num_composed > 50
    for mix, _, _ in mixes:
        rows.remove_mix(mix)
    for placed, _ in resident:
        rows.remove(placed)
    assert pool.num_free == POOL_PAGES
    assert not rows.table.count.any()
