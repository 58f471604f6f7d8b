"""The compiled row operations of a CPU over groups of sites, against the formula in float64."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("numba")

from heddle_adapters.base_layout import Site
from heddle_kernels.cpu_kernels import row_plan
from heddle_kernels.cpu_kernels.ops import CpuOps, why_not
from heddle_kernels.segments import BASE_SLOT, Segments
from heddle_kernels.site_group import SiteGroup
from row_samples import POPULARITY, RANKS, layout_of, make_rows, normal, pack, place, random_rows, relative_error
from row_world import OTHER, RowWorld, full_update, group_of
from tolerances import OPERATION

IN_FEATURES, WIDTHS = 40, (56, 8, 24)
SITES = tuple(Site(f"site{j}", "linear", IN_FEATURES, width, has_bias=True) for j, width in enumerate(WIDTHS))
LAYOUT = layout_of(OTHER, *SITES)
GROUP = group_of(SITES)
OPS = CpuOps()
ONE_OF_EACH_LENGTH = [3, 1, 37, 1, 140, 2]  # tokens of each run; 140 go through torch's matrix product


@pytest.mark.parametrize("dtype", OPERATION, ids=str)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("popularity", POPULARITY)
def test_matches_the_formula(popularity: str, ranks: str, dtype: torch.dtype) -> None:
    world = RowWorld.random(SITES, RANKS[ranks], dtype)
    runs = sorted(
        (use if use == BASE_SLOT else world.slots[use], num_tokens)
        for use, num_tokens in zip(POPULARITY[popularity], ONE_OF_EACH_LENGTH, strict=False)
    )
    assert world.error_of(OPS, runs, GROUP) <= OPERATION[dtype]


@pytest.mark.parametrize("num_tokens", [1, 4, 7, 40])
@pytest.mark.parametrize("sites", [range(1, 2), range(1, 3), range(2, 4), range(1, 4), range(3, 4)], ids=str)
def test_groups_of_any_sites(sites: range, num_tokens: int) -> None:
    world = RowWorld.random(SITES, [5, 17], torch.float32)
    group = SiteGroup(sites.start, IN_FEATURES, tuple(WIDTHS[site - GROUP.first_site] for site in sites))
    assert world.error_of(OPS, [(slot, num_tokens) for slot in world.slots], group) <= OPERATION[torch.float32]


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
    world = RowWorld.of(SITES, adapters, torch.float32)
    assert world.error_of(OPS, [(slot, num_tokens) for slot in world.slots], GROUP) <= OPERATION[torch.float32]


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_a_scale_without_base_bias(num_tokens: int) -> None:
    world = RowWorld.random(SITES, [2], torch.float32)
    slot = world.slots[0]
    x, y = torch.randn(num_tokens, IN_FEATURES), torch.randn(num_tokens, sum(WIDTHS))
    actual = world.run(OPS, x, y, None, Segments.from_runs([(slot, num_tokens)]), GROUP)
    truth = world.truth(slot, x.double(), y.double(), torch.zeros(sum(WIDTHS)).double(), GROUP)
    assert relative_error(actual, truth) <= OPERATION[torch.float32]


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_a_mix_of_adapters(num_tokens: int) -> None:
    generator = np.random.default_rng(4)
    adapters = [[random_rows(site, rank, generator, has_bias=True) for site in SITES] for rank in (3, 6)]
    rows, _ = make_rows(LAYOUT, torch.float32, num_pages=2000)
    placed = [place(rows, pack(LAYOUT, torch.float32, adapter)) for adapter in adapters]
    mix = rows.compose([(placed[0], 0.5), (placed[1], -2.0)])
    world = RowWorld(rows, {mix.slot: []}, torch.float32, GROUP)
    x, y = torch.randn(num_tokens, IN_FEATURES), torch.randn(num_tokens, sum(WIDTHS))
    b0 = torch.zeros(sum(WIDTHS)).double()
    actual = world.run(OPS, x, y, None, Segments.from_runs([(mix.slot, num_tokens)]), GROUP)
    updates = {part.slot: adapter for part, adapter in zip(placed, adapters, strict=True)}
    both = RowWorld(rows, updates, torch.float32, GROUP)
    added = [both.truth(part.slot, x.double(), torch.zeros_like(y).double(), b0, GROUP) for part in placed]
    assert relative_error(actual, y.double() + 0.5 * added[0] - 2.0 * added[1]) <= OPERATION[torch.float32]


@pytest.mark.parametrize("dtype", OPERATION, ids=str)
def test_base_tokens_are_untouched_bit_for_bit(dtype: torch.dtype) -> None:
    world = RowWorld.random(SITES, [8], dtype)
    x, y = torch.randn(6, IN_FEATURES).to(dtype), torch.randn(6, sum(WIDTHS)).to(dtype)
    y[0, 0], y[5, 3] = torch.nan, -0.0
    segments = Segments.from_runs([(BASE_SLOT, 2), (world.slots[0], 2), (BASE_SLOT, 2)])
    actual = world.run(OPS, x, y, None, segments, GROUP)
    same_bits = actual.view(torch.uint8).eq(y.view(torch.uint8)).view(6, -1).all(dim=1)
    assert same_bits.tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize("dtype", OPERATION, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 5, 40, 140])
def test_neighbours_change_no_bit(num_tokens: int, dtype: torch.dtype) -> None:
    world = RowWorld.random(SITES, [5, 64, 17], dtype)
    slot = world.slots[0]
    x, y = torch.randn(num_tokens, IN_FEATURES).to(dtype), torch.randn(num_tokens, sum(WIDTHS)).to(dtype)
    alone = world.run(OPS, x, y, None, Segments.from_runs([(slot, num_tokens)]), GROUP)
    for before, after in [(1, 0), (2, 50), (50, 3)]:
        runs = [(world.slots[1], before), (slot, num_tokens), (world.slots[2], after)]
        padded_x, padded_y = (functional.pad(states, (0, 0, before, after), value=9.0) for states in (x, y))
        among = world.run(OPS, padded_x, padded_y, None, Segments.from_runs(runs), GROUP)
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
    world = RowWorld.random(SITES, [17], torch.float32)
    x, y, segments = torch.randn(12, IN_FEATURES), torch.randn(12, sum(WIDTHS)), Segments.from_runs([(0, 12)])
    outputs = list[Tensor]()
    for threshold in (1, 100):
        monkeypatch.setattr(row_plan, "LONG_SEGMENT_TOKENS", threshold)
        outputs.append(world.run(OPS, x, y, None, segments, GROUP))
    assert relative_error(outputs[0], outputs[1].double()) <= OPERATION[torch.float32]


@pytest.mark.parametrize("dtype", OPERATION, ids=str)
def test_scales_the_input_of_those_who_ask(dtype: torch.dtype) -> None:
    generator = np.random.default_rng(5)
    scaling = [replace(random_rows(SITES[0], 0, generator), in_scale=normal(generator, IN_FEATURES))]
    world = RowWorld.of(SITES, [scaling, [random_rows(SITES[0], 2, generator)]], dtype)
    x, ops = torch.randn(4, IN_FEATURES).to(dtype), CpuOps()
    segments = Segments.from_runs([(world.slots[0], 2), (world.slots[1], 1), (BASE_SLOT, 1)])
    plan = ops.plan_rows(world.rows.rows, world.rows.vectors, world.rows.table, segments)
    scaled = ops.scale_input(x, plan, GROUP.first_site)
    assert scaling[0].in_scale is not None
    assert torch.equal(scaled[:2], (x[:2].float() * torch.from_numpy(scaling[0].in_scale)).to(dtype))
    assert torch.equal(scaled[2:], x[2:])
    assert ops.scale_input(x, plan, GROUP.first_site + 1) is x


def test_infinite_and_undefined_numbers_stay_so() -> None:
    world = RowWorld.random(SITES, [4], torch.bfloat16)
    world.rows.table.activation[:] = 0
    x, y = torch.ones(2, IN_FEATURES).bfloat16(), torch.ones(2, sum(WIDTHS)).bfloat16()
    x[0, 0], y[1, 0] = torch.nan, torch.inf
    actual = world.run(OPS, x, y, None, Segments.from_runs([(world.slots[0], 2)]), GROUP)
    assert actual[0].isnan().all()
    assert actual[1, 0].isinf()
    assert actual[1, 1:].isfinite().all()


def test_says_which_dtypes_it_computes_with() -> None:
    assert why_not(torch.bfloat16) is None
    assert "float64" in (why_not(torch.float64) or "")


AFTER_PREPARING = """
import sys
import torch
from numba.core.dispatcher import Dispatcher
from heddle_adapters.base_layout import Site
from heddle_kernels.cpu_kernels.ops import CpuOps
from heddle_kernels.segments import BASE_SLOT
from row_world import RowWorld, group_of

def compiled():
    modules = [module for name, module in sys.modules.items() if name.startswith("heddle_kernels.cpu_kernels")]
    kernels = {id(each): each for module in modules for each in vars(module).values() if isinstance(each, Dispatcher)}
    return sum(len(kernel.signatures) for kernel in kernels.values())

dtype, ops = getattr(torch, sys.argv[1]), CpuOps()
ops.prepare((), dtype)
before = compiled()
assert before > 10
for in_features in (40, 64):
    sites = [Site(name, "linear", in_features, 24, has_bias=True) for name in ("one", "other")]
    world = RowWorld.random(sites, [3], dtype)
    world.error_of(ops, [(world.slots[0], 3), (BASE_SLOT, 1), (world.slots[0], 200)], group_of(sites))
assert compiled() == before, "something was compiled for the batch"
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_preparing_compiles_all_that_a_batch_needs(dtype: str) -> None:
    """In a process of its own, which no other test has compiled anything for."""
    python_path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", AFTER_PREPARING, dtype],
        env={**os.environ, "PYTHONPATH": python_path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


SUM_OF_ONES = """
import numpy as np
from heddle_kernels.cpu_kernels.bits import compiled
from heddle_kernels.cpu_kernels.inner_loops import dot
from heddle_kernels.cpu_kernels.attention import _dots

ones, sums = np.ones(64, np.float32), np.zeros(1, np.float32)
_dots(ones, ones[None], sums)
print(int(sums[0]))
"""


@pytest.mark.parametrize("cache", ["beside the sources", "elsewhere"])
def test_kernels_of_older_sources_are_compiled_anew(cache: str, tmp_path: Path) -> None:
    """Also when the file that has changed is not the kernel's own."""
    package = Path(row_plan.__file__).parents[1]
    shutil.copytree(package, tmp_path / "heddle_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    if cache == "elsewhere":
        environment["NUMBA_CACHE_DIR"] = str(tmp_path / "cache")

    def printed() -> str:
        return subprocess.check_output([sys.executable, "-c", SUM_OF_ONES], env=environment, text=True).strip()

    assert printed() == "64"
    changed = tmp_path / "heddle_kernels/cpu_kernels/inner_loops.py"
    source = changed.read_text()
    changed.write_text(source.replace("total += widen(one[k]) * widen(other[k])", "total += 2 * widen(one[k])"))
    assert changed.read_text() != source
    assert printed() == "128"
