"""Prefix tuning: the keys and values are those that PEFT puts into the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from peft import CartridgeConfig, PrefixTuningConfig
from transformers import DynamicCache

from base_samples import full_layout_of
from heddle_adapters.canonical import PrefixKv
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter
from peft_samples import ModelWeights
from peft_saves import MODELS, STORAGES, check_outputs, edit_config, edit_tensors, read, saved

PROMPT = torch.tensor([[5, 9, 77, 3]])
LABELS = {"plain": "prefix tuning", "projected": "prefix tuning", "cartridge": "cartridge"}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def config_of(kind: str, num_tokens: int) -> Any:
    if kind == "cartridge":
        return CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_tokens, num_frozen_tokens=num_tokens // 2)
    return PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=num_tokens,
        prefix_projection=kind == "projected",
        encoder_hidden_size=24,
    )


def prefix_of(folder: Path, model: Any) -> PrefixKv:
    checkpoint = read(folder, model)
    adapter = checkpoint.compile(ModelWeights(model))
    assert not adapter.updates
    assert adapter.prefix is not None
    assert checkpoint.sites == ()
    assert checkpoint.num_virtual_tokens == adapter.prefix.num_tokens
    assert checkpoint.num_row_values == adapter.prefix.keys.size + adapter.prefix.values.size
    return adapter.prefix


def caches(peft_model: Any) -> list[tuple[Any, Any]]:
    """PEFT's keys and values, a layer each, as [num_tokens, num_heads, head_dim]."""
    with torch.no_grad():
        cache = peft_model.get_prompt(batch_size=1)
    return [(layer.keys[0].transpose(0, 1).numpy(), layer.values[0].transpose(0, 1).numpy()) for layer in cache.layers]


@pytest.mark.parametrize("kind", LABELS)
def test_peft_saves_are_what_peft_puts_into_the_cache(model: Any, kind: str, tmp_path: Path) -> None:
    peft_model = saved(model, config_of(kind, 5), tmp_path)
    checkpoint = read(tmp_path, model)
    assert (checkpoint.method, checkpoint.combination) == (LABELS[kind], "alone")
    prefix = prefix_of(tmp_path, model)
    for layer, (keys, values) in enumerate(caches(peft_model)):
        np.testing.assert_allclose(prefix.keys[layer], keys, rtol=0, atol=1e-6)
        np.testing.assert_allclose(prefix.values[layer], values, rtol=0, atol=1e-6)
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(*(torch.from_numpy(part).transpose(0, 1)[None] for part in (keys, values)), layer)
    with torch.no_grad():
        ours = model(PROMPT, past_key_values=cache).logits
        check_outputs(ours.numpy(), peft_model(PROMPT).logits, model(PROMPT).logits)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(LABELS)),
    num_tokens=st.integers(1, 40),
    storage=st.sampled_from(sorted(STORAGES)),
    seed=st.integers(0, 99),
)
def test_any_length_and_storage(
    model: Any, tmp_path: Path, kind: str, num_tokens: int, storage: str, seed: int
) -> None:
    peft_model = saved(model, config_of(kind, num_tokens), tmp_path, seed=seed)
    edit_tensors(tmp_path, lambda tensors: {name: tensor.to(STORAGES[storage]) for name, tensor in tensors.items()})
    prefix = prefix_of(tmp_path, model)
    for layer, (keys, values) in enumerate(caches(peft_model)):
        for ours, theirs in ((prefix.keys[layer], keys), (prefix.values[layer], values)):
            rounded = torch.from_numpy(theirs).to(STORAGES[storage]).float().numpy()
            np.testing.assert_allclose(ours, rounded, rtol=0.01 if kind == "projected" else 0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_virtual_tokens": 4}, r"says \[4, any\]"),
        ({"num_virtual_tokens": 10**8}, "at most 8192"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens must be"),
        ({"num_transformer_submodules": 2}, "encoder-decoder"),
        ({"num_layers": 3}, "num_layers is 3"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4"),
        ({"token_dim": 64}, "token_dim is 64"),
        ({"token_dim": 0}, "token_dim must be"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"key_scale": 2}, "'key_scale'"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    model = MODELS["llama"]()
    saved(model, config_of("plain", 5), tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(InvalidAdapter, match=word):
        read(tmp_path, model)


def test_sizes_may_be_missing_and_the_file_then_decides(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    saved(model, config_of("plain", 5), tmp_path)
    edit_config(tmp_path, num_layers=None, num_attention_heads=None, token_dim=None)
    assert prefix_of(tmp_path, model).keys.shape == (2, 5, 2, 16)
    edit_tensors(tmp_path, lambda tensors: {name: tensor[:, :-2] for name, tensor in tensors.items()})
    with pytest.raises(AdapterIncompatible, match="must be"):
        read(tmp_path, model)


def test_a_base_of_other_keys_and_values_or_of_none(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    saved(model, config_of("plain", 5), tmp_path)
    with pytest.raises(AdapterIncompatible, match="num_attention_heads is 2"):
        read(tmp_path, MODELS["gpt2"]())
    with pytest.raises(AdapterIncompatible, match="takes no prefixes"):
        read(tmp_path, model, replace(full_layout_of(model), kv=None))
