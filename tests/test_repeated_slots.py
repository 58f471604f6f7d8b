"""An adapter that changes some tokens only has several segments in a batch: every backend computes each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from heddle_adapters.base_layout import Site
from heddle_kernels.ops import Ops
from heddle_kernels.reference import ReferenceOps
from heddle_kernels.segments import BASE_SLOT, Segments
from heddle_kernels.site_group import SiteGroup
from row_samples import normal
from row_world import OTHER, RowWorld, full_update
from tolerances import OPERATION

# In Triton's interpreter numpy warns where an activation of large numbers saturates.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

IN_FEATURES, WIDTHS = 32, (56, 8, 24)
SITES = tuple(Site(f"site{j}", "linear", IN_FEATURES, width, has_bias=True) for j, width in enumerate(WIDTHS))
RANKS = [5, 17]
BASE, ONE, TWO = BASE_SLOT, 0, 1  # the base, and numbers of adapters
BATCHES: dict[str, list[tuple[int, int]]] = {  # (adapter, tokens)
    "first and last tokens": [(ONE, 2), (BASE, 5), (ONE, 3)],
    "two prompts": [(BASE, 3), (ONE, 4), (BASE, 2), (ONE, 1), (TWO, 1)],
    "in turns": [(ONE, 1), (TWO, 1), (ONE, 1), (TWO, 1)],
    "long and short": [(ONE, 140), (BASE, 20), (ONE, 1), (TWO, 37), (ONE, 16), (TWO, 1)],
    "the base alone": [(BASE, 4)],
}


def reference(world: RowWorld) -> Ops:
    return ReferenceOps()


def cpu(world: RowWorld) -> Ops:
    pytest.importorskip("numba")
    from heddle_kernels.cpu_kernels.ops import CpuOps

    return CpuOps()


def triton(world: RowWorld) -> Ops:
    pytest.importorskip("triton")
    from heddle_kernels.triton_kernels.ops import TritonOps
    from heddle_kernels.triton_kernels.target import INTERPRETED

    if not INTERPRETED:
        pytest.skip("the pool of this test lies in host memory")
    ops = TritonOps(torch.device("cpu"))
    ops.prepare([SiteGroup(0, OTHER.in_features, (OTHER.out_features,)), world.group], world.dtype)
    return ops


BACKENDS = pytest.mark.parametrize("make_ops", [reference, cpu, triton], ids=lambda make: make.__name__)


@BACKENDS
@pytest.mark.parametrize("dtype", OPERATION, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_rows_and_vectors_match_the_formula(
    batch: str, dtype: torch.dtype, make_ops: Callable[[RowWorld], Ops]
) -> None:
    world = RowWorld.random(SITES, RANKS, dtype)
    runs = [
        (adapter if adapter == BASE else world.slots[adapter], num_tokens) for adapter, num_tokens in BATCHES[batch]
    ]
    assert world.error_of(make_ops(world), runs, world.group) <= OPERATION[dtype]


@BACKENDS
def test_inputs_are_scaled_in_every_segment(make_ops: Callable[[RowWorld], Ops]) -> None:
    generator = np.random.default_rng(3)
    scale = normal(generator, IN_FEATURES)
    scaling = [replace(full_update(site, 4, generator), in_scale=scale) for site in SITES]
    world = RowWorld.of(SITES, [scaling, [full_update(site, 4, generator) for site in SITES]], torch.float32)
    one, two = world.slots
    segments = Segments.from_runs([(one, 2), (two, 1), (one, 3), (BASE_SLOT, 2), (one, 1)])
    ops, table = make_ops(world), world.rows
    x = torch.randn(segments.num_tokens, IN_FEATURES)
    scaled = ops.scale_input(x, ops.plan_rows(table.rows, table.vectors, table.table, segments), site=1)
    is_scaled = torch.tensor([True] * 2 + [False] + [True] * 3 + [False] * 2 + [True])
    assert torch.equal(scaled, torch.where(is_scaled[:, None], x * torch.from_numpy(scale), x))
