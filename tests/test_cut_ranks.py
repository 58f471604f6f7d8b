"""An adapter at a lower rank: the first rows of every site, as they are, alone and in mixes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_driver import make_request, run
from heddle_adapters.base_layout import Site
from heddle_adapters.canonical import Rows, SiteUpdate
from heddle_adapters.mix import AdapterPart
from heddle_kernels.segments import Segments
from parity_bench import VOCABULARY, assert_equals, make_bench, prompt_of
from peft_samples import tiny_llama
from row_samples import apply, canonical, layout_of, make_rows, pack, place, random_rows, relative_error, rounded
from tolerances import OPERATION

SITES = (Site("q", "linear", 24, 40, has_bias=True), Site("v", "linear", 40, 12, has_bias=False))
LAYOUT = layout_of(*SITES)


def cut(update: SiteUpdate, rank: int | None, scale: float) -> SiteUpdate:
    """What is left of an update."""
    assert update.rows is not None
    kept = slice(rank)
    rows = Rows(
        update.rows.a[kept],
        update.rows.b[kept],
        np.float32(scale) * update.rows.gain[kept],
        update.rows.c[kept],
        update.rows.activation[kept],
    )
    bias = None if update.bias is None else np.float32(scale) * update.bias
    return replace(update, rows=rows, bias=bias)


@pytest.mark.parametrize("dtype", OPERATION, ids=str)
@given(
    num_rows=st.lists(st.integers(1, 9), min_size=2, max_size=2),
    rank=st.integers(1, 10),
    scale=st.sampled_from([1.0, 0.5, -2.0]),
    seed=st.integers(0, 100),
)
def test_it_is_the_adapter_of_its_first_rows(
    dtype: torch.dtype, num_rows: list[int], rank: int, scale: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    updates = [random_rows(site, n, generator, has_bias=n > 4) for site, n in zip(SITES, num_rows, strict=True)]
    rows, _ = make_rows(LAYOUT, dtype, num_pages=64)
    placed = place(rows, pack(LAYOUT, dtype, updates))
    mix = rows.compose([(placed, scale)], [rank])
    assert mix.num_rows == sum(min(n, rank) for n in num_rows)
    torch.manual_seed(seed)
    for number, (site, update) in enumerate(zip(SITES, updates, strict=True)):
        x, weight = torch.randn(3, site.in_features), torch.randn(site.out_features, site.in_features)
        truth = canonical(cut(rounded(update, dtype), rank, scale), x, weight, None)
        actual = apply(rows, x, weight, None, Segments.from_runs([(mix.slot, 3)]), number)
        assert relative_error(actual, truth) <= OPERATION[torch.float32]
    rows.remove_mix(mix)
    rows.remove(placed)


def test_a_mix_cuts_each_part_by_itself() -> None:
    generator = np.random.default_rng(1)
    parts = [[random_rows(site, 6, generator) for site in SITES] for _ in range(2)]
    rows, _ = make_rows(LAYOUT, torch.float32, num_pages=64)
    placed = [place(rows, pack(LAYOUT, torch.float32, part)) for part in parts]
    mix = rows.compose([(placed[0], 1.0), (placed[1], 0.5)], [2, None])
    site = SITES[0]
    x, weight = torch.randn(3, site.in_features), torch.randn(site.out_features, site.in_features)
    base = canonical(None, x, weight, None)
    changes = [
        canonical(cut(part[0], rank, scale), x, weight, None) - base
        for part, rank, scale in zip(parts, (2, None), (1.0, 0.5), strict=True)
    ]
    actual = apply(rows, x, weight, None, Segments.from_runs([(mix.slot, 3)]), 0)
    assert relative_error(actual, base + sum(changes)) <= OPERATION[torch.float32]


def cut_by_hand(model: Any, rank: int) -> Any:
    """PEFT's model with all but the first ranks of every A left out, at the scale of the whole adapter."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter[rank:] = 0
    return model


def test_a_request_at_a_lower_rank_is_answered_as_peft_would(tmp_path: Path) -> None:
    bench = make_bench(tiny_llama, tmp_path)
    for kind, rank in (("lora", 3), ("rslora", 1), ("patterns", 4), ("lora", 8)):
        digest = bench.digests[kind]
        assert digest is not None
        part = AdapterPart(digest, rank=rank)
        (answer,) = run(bench.engine, [make_request(prompt_of(20), (part,), max_tokens=5, num_logprobs=VOCABULARY)])
        assert_equals(answer, cut_by_hand(bench.peft[kind], rank), bench.base)
    bench.engine.close()
