"""Rows on matrix tiles: segments of many tokens in bfloat16, against the formula and against the sums one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("numba")

from heddle_adapters.base_layout import Site
from heddle_kernels.cpu_kernels import row_plan, tile_rows
from heddle_kernels.cpu_kernels.ops import CpuOps
from heddle_kernels.cpu_kernels.tiles import has_tiles
from heddle_kernels.segments import BASE_SLOT, Segments
from row_samples import normal, random_rows
from row_world import RowWorld, group_of
from tolerances import OPERATION

pytestmark = pytest.mark.skipif(not has_tiles(), reason="this processor has no bfloat16 tiles")

IN_FEATURES, WIDTHS = 224, (300, 40, 8)  # 7 chunks of inputs; outputs of two parts, of no whole panel, of half a one
SITES = tuple(Site(f"site{j}", "linear", IN_FEATURES, width, has_bias=True) for j, width in enumerate(WIDTHS))
GROUP = group_of(SITES)
TOKENS = (16, 17, 23, 40, 130, 300)
OPS, DTYPE = CpuOps(), torch.bfloat16


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the two operations went by tiles."""
    made = list[str]()
    for name in ("shrink_by_tiles", "expand_by_tiles"):
        monkeypatch.setattr(f"heddle_kernels.cpu_kernels.long_segments.{name}", noting(made, getattr(tile_rows, name)))
    return made


def noting(made: list[str], kernel: Callable[..., None]) -> Callable[..., None]:
    def call(*arguments: object) -> None:
        made.append(kernel.__name__)
        kernel(*arguments)

    return call


def inputs(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(num_tokens)
    width = sum(WIDTHS)
    states = torch.randn(num_tokens, IN_FEATURES), torch.randn(num_tokens, width), torch.randn(width)
    x, y, b0 = (each.to(DTYPE) for each in states)
    return x, y, b0


@pytest.mark.parametrize("rank", [1, 15, 16, 17, 64])
def test_matches_the_formula(rank: int, calls: list[str]) -> None:
    world = RowWorld.random(SITES, [rank, 5], DTYPE)
    for num_tokens in TOKENS:
        runs = [(BASE_SLOT, 3), (world.slots[0], num_tokens), (world.slots[1], 2), (world.slots[1], 20)]
        assert world.error_of(OPS, runs, GROUP) <= OPERATION[DTYPE]
    assert calls == ["shrink_by_tiles", "expand_by_tiles"] * len(TOKENS)


@pytest.mark.parametrize("rank", [3, 16, 40])
def test_is_as_exact_as_the_sums_one_by_one(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both keep float32 between shrink and expand: they differ by the last place of what they round to."""
    world = RowWorld.random(SITES, [rank], DTYPE)
    for num_tokens in TOKENS:
        x, y, b0 = inputs(num_tokens)
        segments = Segments.from_runs([(world.slots[0], num_tokens)])
        by_tiles = world.run(OPS, x, y, b0, segments, GROUP)
        with monkeypatch.context() as patch:
            patch.setattr(row_plan, "has_tiles", lambda: False)
            patch.setattr(row_plan, "LONG_SEGMENT_TOKENS", 10**6)
            one_by_one = world.run(OPS, x, y, b0, segments, GROUP)
        scale = one_by_one.float().abs().amax()
        difference = (by_tiles.float() - one_by_one.float()).abs()
        assert (difference <= 2**-7 * one_by_one.float().abs() + 2**-14 * scale).all()


def test_absent_rows_and_vectors() -> None:
    """Each adapter changes each site in another way: not at all, by rows, by a bias, by a scale."""
    generator = np.random.default_rng(3)
    forms = [
        lambda site: random_rows(site, 0, generator),
        lambda site: random_rows(site, 3, generator),
        lambda site: replace(random_rows(site, 0, generator), bias=normal(generator, site.out_features)),
        lambda site: replace(random_rows(site, 0, generator), out_scale=normal(generator, site.out_features)),
    ]
    adapters = [[forms[(j + first) % 4](site) for j, site in enumerate(SITES)] for first in range(4)]
    world = RowWorld.of(SITES, adapters, DTYPE)
    assert world.error_of(OPS, [(slot, 20) for slot in world.slots], GROUP) <= OPERATION[DTYPE]


@pytest.mark.parametrize("num_tokens", [17, 140])
def test_neighbours_and_threads_change_no_bit(num_tokens: int, num_torch_threads: Callable[[int], None]) -> None:
    world = RowWorld.random(SITES, [5, 64, 17], DTYPE)
    slot, (x, y, _) = world.slots[0], inputs(num_tokens)
    alone = world.run(OPS, x, y, None, Segments.from_runs([(slot, num_tokens)]), GROUP)
    for num_threads in (1, 2, 3):
        num_torch_threads(num_threads)
        for before, after in [(0, 0), (1, 0), (9, 200), (50, 3)]:
            runs = [(world.slots[1], before), (slot, num_tokens), (world.slots[2], after)]
            padded_x, padded_y = (functional.pad(states, (0, 0, before, after), value=9.0) for states in (x, y))
            segments = Segments.from_runs(run for run in runs if run[1])
            among = world.run(OPS, padded_x, padded_y, None, segments, GROUP)
            assert torch.equal(among[before : before + num_tokens], alone)


def test_a_large_scale_of_what_is_the_bias_alone_leaves_the_bias() -> None:
    generator = np.random.default_rng(3)
    large = [replace(random_rows(s, 0, generator), out_scale=1e6 * normal(generator, s.out_features)) for s in SITES]
    world = RowWorld.of(SITES, [large], DTYPE)
    x, _, b0 = inputs(20)
    y = b0.expand(20, -1).contiguous()
    assert torch.equal(world.run(OPS, x, y, b0, Segments.from_runs([(world.slots[0], 20)]), GROUP), y)


def test_an_input_that_no_tile_takes_goes_another_way(calls: list[str]) -> None:
    sites = tuple(Site(f"site{j}", "linear", 40, width, has_bias=True) for j, width in enumerate(WIDTHS))
    world = RowWorld.random(sites, [7], DTYPE)
    assert world.error_of(OPS, [(world.slots[0], 30)], group_of(sites)) <= OPERATION[DTYPE]
    assert calls == ["expand_by_tiles"]


def test_infinite_and_undefined_numbers_stay_with_their_token() -> None:
    world = RowWorld.random(SITES, [4], DTYPE)
    world.rows.table.activation[:] = 0
    x, y, _ = inputs(20)
    x[3, 5], x[7, 0], y[9, 1] = torch.nan, torch.inf, torch.inf
    actual = world.run(OPS, x, y, None, Segments.from_runs([(world.slots[0], 20)]), GROUP)
    assert actual[3].isnan().all()
    assert not actual[7].isfinite().any()
    assert actual[9, 1].isinf()
    others = torch.ones_like(actual, dtype=torch.bool)
    others[3], others[7], others[9, 1] = False, False, False
    assert actual[others].isfinite().all()
