"""Shrink, expand and vectors over row tables, against the formula in float64, for every popularity and rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from heddle_adapters.base_layout import Site
from heddle_adapters.canonical import SiteUpdate
from heddle_adapters.device_rows import DeviceRows
from heddle_kernels.segments import BASE_SLOT, Segments
from row_samples import (
    POPULARITY,
    RANKS,
    apply,
    canonical,
    layout_of,
    make_rows,
    normal,
    pack,
    place,
    random_rows,
    relative_error,
    rounded,
)
from tolerances import OPERATION

IN_FEATURES, OUT_FEATURES = 40, 56
SITE = Site("site", "linear", IN_FEATURES, OUT_FEATURES, has_bias=True)
OTHER = Site("other", "linear", 8, 8, has_bias=False)
LAYOUT = layout_of(OTHER, SITE)
SITE_ID = 1  # not the first, so that a wrong site number shows


@dataclass
class Placed:
    """Adapters in a pool, and the canonical form each was made from."""

    rows: DeviceRows
    updates: list[SiteUpdate]
    slots: list[int]


def random_update(rank: int, generator: np.random.Generator) -> SiteUpdate:
    """Everything that a site can have at once."""
    return replace(
        random_rows(SITE, rank, generator, has_bias=True),
        in_scale=normal(generator, IN_FEATURES),
        out_scale=normal(generator, OUT_FEATURES),
    )


def place_all(updates: list[SiteUpdate], dtype: torch.dtype) -> Placed:
    rows, _ = make_rows(LAYOUT, dtype, num_pages=4000)
    return Placed(rows, updates, [place(rows, pack(LAYOUT, dtype, [update])).slot for update in updates])


@pytest.mark.parametrize("dtype", OPERATION, ids=str)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("popularity", POPULARITY)
def test_matches_the_formula(popularity: str, ranks: str, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(7)
    placed = place_all([random_update(rank, generator) for rank in RANKS[ranks]], dtype)
    lengths = [3, 1, 4, 1, 5, 2]
    runs = sorted(
        (use if use == BASE_SLOT else placed.slots[use], n)
        for use, n in zip(POPULARITY[popularity], lengths, strict=False)
    )
    segments = Segments.from_runs(runs)
    torch.manual_seed(0)
    x = torch.randn(segments.num_tokens, IN_FEATURES, dtype=dtype)
    weight, bias = torch.randn(OUT_FEATURES, IN_FEATURES, dtype=dtype), torch.randn(OUT_FEATURES, dtype=dtype)
    by_slot = {slot: rounded(update, dtype) for slot, update in zip(placed.slots, placed.updates, strict=True)}
    parts = x.split_with_sizes([num_tokens for _, num_tokens in runs])
    truth = [canonical(by_slot.get(slot), part, weight, bias) for (slot, _), part in zip(runs, parts, strict=False)]
    error = relative_error(
        apply(placed.rows, x, weight, bias, segments, SITE_ID), torch.cat([*truth, torch.empty(0, OUT_FEATURES)])
    )
    # rank 256 sums 256 rows after 40-wide dots: rounding of the inputs' own dtype dominates, not the rank
    assert error <= OPERATION[dtype], f"relative error {error:.1e}"


def test_base_rows_are_untouched_bit_for_bit() -> None:
    placed = place_all([random_update(8, np.random.default_rng(1))], torch.float32)
    x, weight = torch.randn(6, IN_FEATURES), torch.randn(OUT_FEATURES, IN_FEATURES)
    segments = Segments.from_runs([(BASE_SLOT, 2), (placed.slots[0], 2), (BASE_SLOT, 2)])
    base = torch.nn.functional.linear(x, weight)
    actual = apply(placed.rows, x, weight, None, segments, SITE_ID)
    assert torch.equal(actual[:2], base[:2])
    assert torch.equal(actual[4:], base[4:])
    assert not torch.allclose(actual[2:4], base[2:4])


def test_absent_vectors_and_rows_change_nothing() -> None:
    nothing = random_rows(SITE, 0, np.random.default_rng(2))
    placed = place_all([replace(nothing, bias=np.full(OUT_FEATURES, 2.0, np.float32))], torch.float32)
    x, weight = torch.randn(3, IN_FEATURES), torch.randn(OUT_FEATURES, IN_FEATURES)
    actual = apply(placed.rows, x, weight, None, Segments.from_runs([(placed.slots[0], 3)]), SITE_ID)
    assert torch.allclose(actual, torch.nn.functional.linear(x, weight) + 2.0, atol=1e-6)
