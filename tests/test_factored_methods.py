"""Factored methods: real PEFT saves fold to the rows that PEFT computes with, at any rank and in any storage type."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from base_samples import full_layout_of
from factored_samples import CONFIGS, TRANSPOSABLE, config_of, read_folder, save_adapter, worst_error
from heddle_adapters.methods.torch_uniform import kaiming_uniform
from peft_samples import ModelWeights, tiny_gpt2, tiny_llama, tiny_qwen2

MODELS = {"llama": cache(tiny_llama), "qwen2": cache(tiny_qwen2), "gpt2": cache(tiny_gpt2)}
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {"llama": LLAMA_TARGETS, "qwen2": LLAMA_TARGETS, "gpt2": ("c_attn", "c_proj", "c_fc")}
CASES = [(name, kind) for name in MODELS for kind in CONFIGS if name != "gpt2" or kind in TRANSPOSABLE]


def check(name: str, kind: str, folder: Path, *, rank: int, targets: tuple[str, ...], **options: Any) -> None:
    model = MODELS[name]()
    config = config_of(kind, rank, targets)
    peft_model = save_adapter(model, config, folder, **options)
    checkpoint = read_folder(folder, full_layout_of(model))
    compiled = checkpoint.compile(ModelWeights(model))
    assert {update.site.rpartition(".")[2] for update in compiled.updates} == set(targets)
    error, effect = worst_error(compiled, peft_model, model)
    assert error <= 1
    assert effect >= 100
    deltas = [update.delta for update in compiled.updates if update.delta is not None]
    rows = [update.rows for update in compiled.updates if update.rows is not None]
    assert all(len(each) <= min(each.a.shape[1], each.b.shape[1]) for each in rows)
    assert checkpoint.num_rows == sum(len(each) for each in rows)
    assert checkpoint.num_row_values == sum(each.a.size + each.b.size for each in rows) + sum(map(np.size, deltas))
    assert checkpoint.num_vector_values == 0
    assert checkpoint.combination == ("alone" if deltas else "sum")


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_peft_saves_fold_to_what_peft_computes(name: str, kind: str, tmp_path: Path) -> None:
    check(name, kind, tmp_path, rank=4, targets=TARGETS[name])


@pytest.mark.parametrize("kind", sorted(set(CONFIGS) - {"miss_bat", "lokr_whole"}))
def test_ranks_above_the_layers_own_take_no_more_rows_than_it_has(kind: str, tmp_path: Path) -> None:
    """The key's and the value's projections have 32 outputs."""
    check("llama", kind, tmp_path, rank=40, targets=("q_proj", "v_proj"))


@pytest.mark.parametrize("kind", CONFIGS)
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rank=st.integers(1, 9),
    targets=st.sets(st.sampled_from(LLAMA_TARGETS), min_size=1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_any_rank_module_and_type(
    kind: str, rank: int, targets: set[str], dtype: torch.dtype, seed: int, tmp_path: Path
) -> None:
    check("qwen2", kind, tmp_path, rank=rank, targets=tuple(sorted(targets)), dtype=dtype, seed=seed)


@pytest.mark.parametrize("kind", ["delora", "loha", "lokr_both"])
def test_patterns_give_each_module_its_rank_and_scale(kind: str, tmp_path: Path) -> None:
    """A module may match several keys of a map; PEFT takes the first in the file, which is sorted."""
    first, second = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    patterns: dict[str, Any] = {"rank_pattern": {f"^{first}": 1, "q_proj": 3, "self_attn.q_proj": 2, "v_proj": 2}}
    if kind != "delora":
        patterns["alpha_pattern"] = {f"^{second}$": 7, "k_proj": 11, "q_proj": 5}
    config = config_of(kind, 2, ("q_proj", "k_proj", "v_proj"))
    for name, pattern in patterns.items():
        setattr(config, name, pattern)
    model = tiny_llama()
    peft_model = save_adapter(model, config, tmp_path)
    compiled = read_folder(tmp_path, full_layout_of(model)).compile(ModelWeights(model))
    error, effect = worst_error(compiled, peft_model, model)
    assert error <= 1
    assert effect >= 100
    assert len({update.num_rows for update in compiled.updates}) > 1


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1, 2**40 + 7])
def test_uniform_numbers_are_torchs(seed: int) -> None:
    shapes = [(6, 112), (64, 6), (1, 3), (70, 641)]
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for shape, drawn in zip(shapes, kaiming_uniform(seed, *shapes), strict=True):
        expected = torch.nn.init.kaiming_uniform_(torch.empty(shape), generator=generator)
        np.testing.assert_allclose(drawn, expected.numpy(), rtol=0, atol=2**-23)
