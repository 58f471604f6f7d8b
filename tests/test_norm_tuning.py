"""Norm tuning, and norms saved beside another method's tensors: folded, they are what PEFT's norms compute."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from peft import IA3Config, LNTuningConfig

from base_samples import full_layout_of
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.canonical import Floats, SiteUpdate
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter
from peft_samples import ModelWeights
from peft_saves import MODELS, STORAGES, check_outputs, edit_config, edit_tensors, read, saved
from tiny_models import make_tiny_model


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def normalised(norm: Any, x: torch.Tensor, weight_offset: float = 0.0) -> Floats:
    """What a norm makes of x before its weight and bias."""
    plain = copy.deepcopy(norm)
    with torch.no_grad():
        plain.weight.fill_(1 - weight_offset)
        if getattr(plain, "bias", None) is not None:
            plain.bias.zero_()
        result: Floats = plain(x).numpy()
    return result


def check_norms(model: Any, peft_model: Any, updates: tuple[SiteUpdate, ...], weight_offset: float = 0.0) -> None:
    for update in updates:
        norm = model.get_submodule(update.site)
        x = torch.randn(5, len(norm.weight), generator=torch.Generator().manual_seed(1))
        assert update.out_scale is not None
        ours = update.out_scale * normalised(norm, x, weight_offset)
        for bias in (ModelWeights(model).bias(update.site), update.bias):
            ours = ours if bias is None else ours + bias
        with torch.no_grad():
            check_outputs(ours, peft_model.base_model.model.get_submodule(update.site)(x), norm(x))


def test_peft_saves_fold_to_what_peft_computes(model: Any, tmp_path: Path) -> None:
    peft_model = targeted(model, tmp_path)
    checkpoint = read(tmp_path, model)
    assert checkpoint.method == "LN tuning"
    assert checkpoint.combination == "alone"
    assert checkpoint.sites == tuple(full_layout_of(model).by_path("norm"))
    updates = checkpoint.compile(ModelWeights(model)).updates
    check_norms(model, peft_model, updates)
    assert checkpoint.num_vector_values == sum(
        vector.size for update in updates for vector in (update.out_scale, update.bias) if vector is not None
    )


def targeted(model: Any, folder: Path, **settings: Any) -> Any:
    names = sorted({path.rpartition(".")[2] for path in full_layout_of(model).by_path("norm")})
    return saved(model, LNTuningConfig(task_type="CAUSAL_LM", target_modules=names), folder, **settings)


def test_a_norm_that_adds_one_to_its_weight(tmp_path: Path) -> None:
    gemma = make_tiny_model("gemma2")
    peft_model = targeted(gemma, tmp_path)
    plain = full_layout_of(gemma)
    layout = replace(
        plain, sites=tuple(replace(site, weight_offset=1.0) if site.kind == "norm" else site for site in plain.sites)
    )
    updates = read(tmp_path, gemma, layout).compile(ModelWeights(gemma)).updates
    assert len(updates) == 13
    check_norms(gemma, peft_model, updates, weight_offset=1.0)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), storage=st.sampled_from(sorted(STORAGES)), seed=st.integers(0, 99))
def test_any_choice_of_norms_in_any_storage(model: Any, tmp_path: Path, data: Any, storage: str, seed: int) -> None:
    paths = data.draw(st.sets(st.sampled_from(sorted(full_layout_of(model).by_path("norm"))), min_size=1))
    config = LNTuningConfig(task_type="CAUSAL_LM", target_modules=sorted(paths))
    peft_model = saved(model, config, tmp_path, seed=seed, storage=STORAGES[storage])
    checkpoint = read(tmp_path, model)
    assert set(checkpoint.sites) == paths
    check_norms(model, peft_model, checkpoint.compile(ModelWeights(model)).updates)


@pytest.mark.parametrize("name", MODELS)
def test_ia3_with_saved_norms(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    down, norm = ("mlp.c_proj", "ln_2") if name == "gpt2" else ("down_proj", "norm")
    config = IA3Config(
        task_type="CAUSAL_LM",
        target_modules=[down],
        feedforward_modules=[down],
        fan_in_fan_out=name == "gpt2",
        modules_to_save=[norm],
    )
    peft_model = saved(model, config, tmp_path)
    checkpoint = read(tmp_path, model)
    assert checkpoint.combination == "alone"
    updates = checkpoint.compile(ModelWeights(model)).updates
    norms = tuple(update for update in updates if update.in_scale is None)
    assert {update.site for update in norms} == {
        path for path in full_layout_of(model).by_path("norm") if path.endswith(norm)
    }
    assert len(updates) == len(norms) + 2
    check_norms(model, peft_model, norms)


def test_ia3_alone_still_takes_part_in_products(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    saved(model, IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]), tmp_path)
    assert read(tmp_path, model).combination == "product"


def refused(folder: Path, model: Any, *words: str, layout: BaseLayout | None = None) -> InvalidAdapter:
    with pytest.raises(InvalidAdapter) as caught:
        read(folder, model, layout)
    for word in words:
        assert word in caught.value.message
    return caught.value


def test_half_a_norm_is_refused(tmp_path: Path) -> None:
    model = MODELS["gpt2"]()
    targeted(model, tmp_path)
    edit_tensors(
        tmp_path, lambda tensors: {name: t for name, t in tensors.items() if "ln_f" not in name or "bias" not in name}
    )
    refused(tmp_path, model, "transformer.ln_f", "no ln_tuning_layers.bias")


def test_a_bias_where_the_base_has_none_is_refused(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    targeted(model, tmp_path)
    edit_tensors(
        tmp_path, lambda tensors: tensors | {name.replace(".weight", ".bias"): t for name, t in tensors.items()}
    )
    refused(tmp_path, model, "norm of that name has no bias")


def test_other_refusals(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    targeted(model, tmp_path)
    assert isinstance(refused(tmp_path, MODELS["gpt2"](), "does not have"), AdapterIncompatible)
    edit_config(tmp_path, modules_to_save=["lm_head"])
    refused(tmp_path, model, "modules_to_save", "promises: lm_head")
    edit_config(tmp_path, modules_to_save=None, future_option=3)
    refused(tmp_path, model, "'future_option'")
    edit_config(tmp_path, future_option=None)
    edit_tensors(tmp_path, lambda tensors: {name: t for name, t in tensors.items() if "model.norm." not in name})
    refused(tmp_path, model, "target_modules", "model.norm")


def test_refusals_of_saved_norms(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    config = IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["norm"]
    )
    saved(model, config, tmp_path)
    edit_config(tmp_path, modules_to_save=["norm", "lm_head"])
    refused(tmp_path, model, "modules_to_save", "promises: lm_head")
    edit_config(tmp_path, modules_to_save=["norm", "score"])
    refused(tmp_path, model, "has nothing for 'score', which modules_to_save")
    edit_config(tmp_path, modules_to_save=None)
    refused(tmp_path, model, "not part of a IA3 adapter")
    edit_config(tmp_path, modules_to_save=["norm"])
    edit_tensors(tmp_path, lambda tensors: {name: t for name, t in tensors.items() if "model.norm." not in name})
    refused(tmp_path, model, "promises: model.norm")
    edit_tensors(tmp_path, lambda tensors: tensors | {"base_model.model.model.norm.weight": torch.ones(63)})
    refused(tmp_path, model, "must be [64] and is [63]")


def test_new_numbers_are_another_version(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    digests = set()
    for seed in range(3):
        targeted(model, tmp_path / str(seed), seed=seed)
        digests.add(read(tmp_path / str(seed), model).digest)
    assert len(digests) == 3
