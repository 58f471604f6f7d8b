"""The compiled row operations of a CPU over groups of sites, against the formula in float64."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("numba")

from heddle_adapters.base_layout import Site
from heddle_adapters.canonical import SiteUpdate
from heddle_adapters.device_rows import DeviceRows
from heddle_kernels.cpu_kernels import row_plan
from heddle_kernels.cpu_kernels.bits import forget_older_kernels
from heddle_kernels.cpu_kernels.ops import CpuOps, why_not
from heddle_kernels.segments import BASE_SLOT, Segments
from heddle_kernels.site_group import SiteGroup
from row_samples import layout_of, make_rows, normal, pack, place, random_rows, relative_error, rounded
from tolerances import OPERATION

IN_FEATURES, WIDTHS = 40, (56, 8, 24)
OTHER = Site("other", "linear", 8, 8, has_bias=False)
SITES = tuple(Site(f"site{j}", "linear", IN_FEATURES, width, has_bias=True) for j, width in enumerate(WIDTHS))
LAYOUT = layout_of(OTHER, *SITES)
GROUP = SiteGroup(1, IN_FEATURES, WIDTHS)  # not from the first site on, so that a wrong number shows
ONE_OF_EACH_LENGTH = [3, 1, 37, 1, 140, 2]  # tokens of each run; 140 go through torch's matrix product

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
ACTIVATIONS = (
    lambda h: h,
    torch.relu,
    lambda h: functional.gelu(h, approximate="tanh"),
    functional.silu,
)


@dataclass
class World:
    """Adapters in a pool, and at each site of the group what each of them was made from."""

    rows: DeviceRows
    updates: dict[int, list[SiteUpdate]]  # by slot
    dtype: torch.dtype

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
            update = rounded(self.updates[slot][site - GROUP.first_site], self.dtype)
            a, b, gain, c = (torch.from_numpy(part).double() for part in (update.a, update.b, update.gain, update.c))
            if update.out_scale is not None:
                y = torch.from_numpy(update.out_scale).double() * (y - bias) + bias
            if update.bias is not None:
                y = y + torch.from_numpy(update.bias).double()
            h = x @ a.T + c
            for i, number in enumerate(self.activations(slot, site)):
                y = y + (gain[i] * ACTIVATIONS[number](h[:, i]))[:, None] * b[i]
            outputs.append(y)
        return torch.cat(outputs, dim=1)


def full_update(site: Site, rank: int, generator: np.random.Generator) -> SiteUpdate:
    return replace(random_rows(site, rank, generator, has_bias=True), out_scale=normal(generator, site.out_features))


def make_world(adapters: list[list[SiteUpdate]], dtype: torch.dtype) -> World:
    """Small pages, so that nearly every block of rows goes over page ends. Rows get all activations in turn."""
    rows, _ = make_rows(LAYOUT, dtype, num_pages=12000)
    updates = {place(rows, pack(LAYOUT, dtype, adapter)).slot: adapter for adapter in adapters}
    heap = rows.table.activation
    heap[:] = torch.arange(len(heap), dtype=torch.int8) % len(ACTIVATIONS)
    return World(rows, updates, dtype)


def random_world(ranks: list[int], dtype: torch.dtype) -> World:
    generator = np.random.default_rng(7)
    return make_world([[full_update(site, rank, generator) for site in SITES] for rank in ranks], dtype)


def run(world: World, x: Tensor, y: Tensor, b0: Tensor | None, segments: Segments, group: SiteGroup) -> Tensor:
    """y changed as a woven linear changes it; y itself stays."""
    ops, out = CpuOps(), y.clone()
    plan = ops.plan_rows(world.rows.rows, world.rows.vectors, world.rows.table, segments)
    ops.expand_add(out, ops.shrink(x, plan, group), plan, group, b0)
    return out


def error_of(world: World, runs: list[tuple[int, int]], group: SiteGroup) -> float:
    """Of a batch of (slot, num_tokens) against the formula."""
    torch.manual_seed(0)
    num_tokens, width = sum(n for _, n in runs), sum(group.out_features)
    x, y = torch.randn(num_tokens, IN_FEATURES).to(world.dtype), torch.randn(num_tokens, width).to(world.dtype)
    b0 = torch.randn(width).to(world.dtype)
    parts = zip(runs, *(states.double().split_with_sizes([n for _, n in runs]) for states in (x, y)), strict=True)
    truth = [world.truth(slot, x_part, y_part, b0.double(), group) for (slot, _), x_part, y_part in parts]
    actual = run(world, x, y, b0, Segments.from_runs(runs), group)
    return relative_error(actual, torch.cat([*truth, torch.empty(0, width)]))


@pytest.mark.parametrize("dtype", OPERATION, ids=str)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("popularity", POPULARITY)
def test_matches_the_formula(popularity: str, ranks: str, dtype: torch.dtype) -> None:
    world = random_world(RANKS[ranks], dtype)
    runs = sorted(
        (use if use == BASE_SLOT else world.slots[use], num_tokens)
        for use, num_tokens in zip(POPULARITY[popularity], ONE_OF_EACH_LENGTH, strict=False)
    )
    assert error_of(world, runs, GROUP) <= OPERATION[dtype]


@pytest.mark.parametrize("num_tokens", [1, 4, 7, 40])
@pytest.mark.parametrize("sites", [range(1, 2), range(1, 3), range(2, 4), range(1, 4), range(3, 4)], ids=str)
def test_groups_of_any_sites(sites: range, num_tokens: int) -> None:
    world = random_world([5, 17], torch.float32)
    group = SiteGroup(sites.start, IN_FEATURES, tuple(WIDTHS[site - GROUP.first_site] for site in sites))
    assert error_of(world, [(slot, num_tokens) for slot in world.slots], group) <= OPERATION[torch.float32]


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_absent_rows_and_vectors(num_tokens: int) -> None:
    """Each adapter changes each site in another way: not at all, by rows, by a bias, by a scale."""
    generator = np.random.default_rng(3)
    forms = [
        lambda site: random_rows(site, 0, generator),
        lambda site: random_rows(site, 3, generator),
        lambda site: replace(random_rows(site, 0, generator), bias=normal(generator, site.out_features)),
        lambda site: replace(random_rows(site, 0, generator), out_scale=normal(generator, site.out_features)),
    ]
    adapters = [[forms[(j + first) % 4](site) for j, site in enumerate(SITES)] for first in range(4)]
    world = make_world(adapters, torch.float32)
    assert error_of(world, [(slot, num_tokens) for slot in world.slots], GROUP) <= OPERATION[torch.float32]


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_a_scale_without_base_bias(num_tokens: int) -> None:
    world = random_world([2], torch.float32)
    slot = world.slots[0]
    x, y = torch.randn(num_tokens, IN_FEATURES), torch.randn(num_tokens, sum(WIDTHS))
    actual = run(world, x, y, None, Segments.from_runs([(slot, num_tokens)]), GROUP)
    truth = world.truth(slot, x.double(), y.double(), torch.zeros(sum(WIDTHS)).double(), GROUP)
    assert relative_error(actual, truth) <= OPERATION[torch.float32]


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_a_mix_of_adapters(num_tokens: int) -> None:
    generator = np.random.default_rng(4)
    adapters = [[random_rows(site, rank, generator, has_bias=True) for site in SITES] for rank in (3, 6)]
    rows, _ = make_rows(LAYOUT, torch.float32, num_pages=2000)
    placed = [place(rows, pack(LAYOUT, torch.float32, adapter)) for adapter in adapters]
    mix = rows.compose([(placed[0], 0.5), (placed[1], -2.0)])
    world = World(rows, {mix.slot: []}, torch.float32)
    x, y = torch.randn(num_tokens, IN_FEATURES), torch.randn(num_tokens, sum(WIDTHS))
    b0 = torch.zeros(sum(WIDTHS)).double()
    actual = run(world, x, y, None, Segments.from_runs([(mix.slot, num_tokens)]), GROUP)
    both = World(rows, {part.slot: adapter for part, adapter in zip(placed, adapters, strict=True)}, torch.float32)
    added = [both.truth(part.slot, x.double(), torch.zeros_like(y).double(), b0, GROUP) for part in placed]
    assert relative_error(actual, y.double() + 0.5 * added[0] - 2.0 * added[1]) <= OPERATION[torch.float32]


@pytest.mark.parametrize("dtype", OPERATION, ids=str)
def test_base_tokens_are_untouched_bit_for_bit(dtype: torch.dtype) -> None:
    world = random_world([8], dtype)
    x, y = torch.randn(6, IN_FEATURES).to(dtype), torch.randn(6, sum(WIDTHS)).to(dtype)
    y[0, 0], y[5, 3] = torch.nan, -0.0
    segments = Segments.from_runs([(BASE_SLOT, 2), (world.slots[0], 2), (BASE_SLOT, 2)])
    actual = run(world, x, y, None, segments, GROUP)
    same_bits = actual.view(torch.uint8).eq(y.view(torch.uint8)).view(6, -1).all(dim=1)
    assert same_bits.tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize("dtype", OPERATION, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 5, 40, 140])
def test_neighbours_change_no_bit(num_tokens: int, dtype: torch.dtype) -> None:
    world = random_world([5, 64, 17], dtype)
    slot = world.slots[0]
    x, y = torch.randn(num_tokens, IN_FEATURES).to(dtype), torch.randn(num_tokens, sum(WIDTHS)).to(dtype)
    alone = run(world, x, y, None, Segments.from_runs([(slot, num_tokens)]), GROUP)
    for before, after in [(1, 0), (2, 50), (50, 3)]:
        runs = [(world.slots[1], before), (slot, num_tokens), (world.slots[2], after)]
        padded_x, padded_y = (functional.pad(states, (0, 0, before, after), value=9.0) for states in (x, y))
        among = run(world, padded_x, padded_y, None, Segments.from_runs(runs), GROUP)
        assert torch.equal(among[before : before + num_tokens], alone)


@pytest.mark.parametrize("dtype", OPERATION, ids=str)
def test_threads_change_no_bit(dtype: torch.dtype, num_torch_threads: Callable[[int], None]) -> None:
    """More parts than threads, in every direction: tokens, rows and outputs."""
    generator, wide = np.random.default_rng(3), Site("wide", "linear", IN_FEATURES, 2500, has_bias=True)
    layout = layout_of(wide)
    rows, _ = make_rows(layout, dtype, num_pages=12000)
    slot = place(rows, pack(layout, dtype, [full_update(wide, 50, generator)])).slot
    group, segments = SiteGroup(0, IN_FEATURES, (2500,)), Segments.from_runs([(BASE_SLOT, 1), (slot, 1), (slot, 37)])
    x, y = torch.randn(39, IN_FEATURES).to(dtype), torch.randn(39, 2500).to(dtype)
    outputs, ops = list[Tensor](), CpuOps()
    for num_threads in (1, 2, 3):
        num_torch_threads(num_threads)
        plan = ops.plan_rows(rows.rows, rows.vectors, rows.table, segments)
        outputs.append(y.clone())
        ops.expand_add(outputs[-1], ops.shrink(x, plan, group), plan, group, None)
    assert not torch.equal(outputs[0], y)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_long_and_short_segments_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same segment through the compiled sums and through torch's matrix product."""
    world = random_world([17], torch.float32)
    x, y, segments = torch.randn(12, IN_FEATURES), torch.randn(12, sum(WIDTHS)), Segments.from_runs([(0, 12)])
    outputs = list[Tensor]()
    for threshold in (1, 100):
        monkeypatch.setattr(row_plan, "LONG_SEGMENT_TOKENS", threshold)
        outputs.append(run(world, x, y, None, segments, GROUP))
    assert relative_error(outputs[0], outputs[1].double()) <= OPERATION[torch.float32]


@pytest.mark.parametrize("dtype", OPERATION, ids=str)
def test_scales_the_input_of_those_who_ask(dtype: torch.dtype) -> None:
    generator = np.random.default_rng(5)
    scaling = [replace(random_rows(SITES[0], 0, generator), in_scale=normal(generator, IN_FEATURES))]
    world = make_world([scaling, [random_rows(SITES[0], 2, generator)]], dtype)
    x, ops = torch.randn(4, IN_FEATURES).to(dtype), CpuOps()
    segments = Segments.from_runs([(world.slots[0], 2), (world.slots[1], 1), (BASE_SLOT, 1)])
    plan = ops.plan_rows(world.rows.rows, world.rows.vectors, world.rows.table, segments)
    scaled = ops.scale_input(x, plan, GROUP.first_site)
    assert scaling[0].in_scale is not None
    assert torch.equal(scaled[:2], (x[:2].float() * torch.from_numpy(scaling[0].in_scale)).to(dtype))
    assert torch.equal(scaled[2:], x[2:])
    assert ops.scale_input(x, plan, GROUP.first_site + 1) is x


def test_infinite_and_undefined_numbers_stay_so() -> None:
    world = random_world([4], torch.bfloat16)
    world.rows.table.activation[:] = 0
    x, y = torch.ones(2, IN_FEATURES).bfloat16(), torch.ones(2, sum(WIDTHS)).bfloat16()
    x[0, 0], y[1, 0] = torch.nan, torch.inf
    actual = run(world, x, y, None, Segments.from_runs([(world.slots[0], 2)]), GROUP)
    assert actual[0].isnan().all()
    assert actual[1, 0].isinf()
    assert actual[1, 1:].isfinite().all()


def test_says_which_dtypes_it_computes_with() -> None:
    assert why_not(torch.bfloat16) is None
    assert "float64" in (why_not(torch.float64) or "")


@pytest.mark.parametrize("dtype", OPERATION, ids=str)
def test_preparing_compiles_all_that_a_batch_needs(dtype: torch.dtype) -> None:
    from heddle_kernels.cpu_kernels import attention, elementwise, rows

    CpuOps().prepare((), dtype)
    kernels = [
        rows.shrink_segments,
        rows.expand_segments,
        rows.scale_segments,
        rows.gather_rows,
        rows.finish,
        attention.attend_sequences,
        attention.write_pages,
        elementwise._norm_rows,
        elementwise._gate_rows,
    ]
    before = [len(kernel.signatures) for kernel in kernels]  # type: ignore[attr-defined]
    world = random_world([3], dtype)
    runs = [(world.slots[0], 3), (BASE_SLOT, 1), (world.slots[0], 50)]
    assert error_of(world, runs, GROUP) <= OPERATION[dtype]
    assert [len(kernel.signatures) for kernel in kernels] == before  # type: ignore[attr-defined]


def test_kernels_of_older_sources_are_compiled_anew(tmp_path: Path) -> None:
    cache = tmp_path / "__pycache__"
    cache.mkdir()
    for name, seconds in (("rows.py", 50), ("bits.py", 100)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (seconds, seconds))
    for name, seconds in (("rows.old.1.nbc", 99), ("rows.new.1.nbc", 101), ("rows.old.nbi", 60), ("rows.pyc", 10)):
        (cache / name).touch()
        os.utime(cache / name, (seconds, seconds))
    forget_older_kernels(tmp_path)
    assert {file.name for file in cache.iterdir()} == {"rows.new.1.nbc", "rows.pyc"}
