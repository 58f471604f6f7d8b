"""BEFT: folded, its biases are what PEFT's layers add."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import BeftConfig

from base_samples import full_layout_of
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter
from peft_samples import ModelWeights
from peft_saves import MODELS, STORAGES, check_outputs, edit_config, edit_tensors, read, saved

# All but the head, of which PEFT would save a full copy too.
LINEAR_PATHS = [path for path in full_layout_of(MODELS["llama"]()).by_path("linear") if path != "lm_head"]
LINEAR_MODELS = ("llama", "qwen2")  # PEFT's BEFT knows no Conv1D, so no GPT-2


@pytest.fixture(scope="module", params=LINEAR_MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def check_biases(model: Any, folder: Path, targets: list[str], seed: int, storage: str) -> None:
    config = BeftConfig(task_type="CAUSAL_LM", target_modules=targets)
    peft_model = saved(model, config, folder, seed=seed, storage=STORAGES[storage])
    checkpoint = read(folder, model)
    assert (checkpoint.method, checkpoint.combination) == ("BEFT", "sum")
    updates = checkpoint.compile(ModelWeights(model)).updates
    assert checkpoint.num_vector_values == sum(update.bias.size for update in updates if update.bias is not None)
    for update in updates:
        layer = model.get_submodule(update.site)
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            base = layer(x)
            check_outputs(base.numpy() + update.bias, peft_model.base_model.model.get_submodule(update.site)(x), base)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), storage=st.sampled_from(sorted(STORAGES)), seed=st.integers(0, 99))
def test_peft_saves_fold_to_what_peft_computes(model: Any, tmp_path: Path, data: Any, storage: str, seed: int) -> None:
    paths = data.draw(st.sets(st.sampled_from(LINEAR_PATHS), min_size=1))
    check_biases(model, tmp_path, sorted(paths), seed, storage)


def test_refusals(tmp_path: Path) -> None:
    llama, qwen2 = MODELS["llama"](), MODELS["qwen2"]()
    saved(llama, BeftConfig(task_type="CAUSAL_LM", target_modules=["v_proj"]), tmp_path)

    def refused(*words: str, model: Any = llama) -> InvalidAdapter:
        with pytest.raises(InvalidAdapter) as caught:
            read(tmp_path, model)
        assert all(word in caught.value.message for word in words)
        return caught.value

    edit_config(tmp_path, modules_to_save=["norm"])
    refused("modules_to_save", "promises: model.layers.0.input_layernorm")
    edit_config(tmp_path, modules_to_save=None, scale=2.0)
    refused("'scale'")
    edit_config(tmp_path, scale=None)
    assert read(tmp_path, qwen2).sites
    assert isinstance(refused("does not have", model=MODELS["gpt2"]()), AdapterIncompatible)
    edit_tensors(tmp_path, lambda tensors: {name: tensor.reshape(-1) for name, tensor in tensors.items()})
    refused("must be [1, 32] and is [32]")
    edit_tensors(tmp_path, lambda tensors: dict(list(tensors.items())[:1]))
    refused("target_modules", "v_proj")
