"""What is told of an adapter before it is compiled: its sites, and what it takes of the page pool to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    TrainableTokensConfig,
)

import scripted_engine
from base_samples import full_layout_of
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.checkpoint import PREFIX_SITE, Checkpoint
from heddle_adapters.combine import combine
from heddle_adapters.packed_adapter import PackedAdapter
from heddle_adapters.packer import Packer
from heddle_demo.parity.peft_sample import PeftSample
from heddle_demo.parity.peft_samples import PEFT_SAMPLES
from heddle_server.api.pool_room import PoolRoom
from peft_samples import ModelWeights, tiny_qwen2
from peft_saves import read, saved

PAGE_TOKENS = 16
TASK = "CAUSAL_LM"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
ATTENTION, MLP = "model.layers.*.self_attn", "model.layers.*.mlp"

CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=5, target_modules=LINEARS, task_type=TASK),
    "dora": LoraConfig(r=3, use_dora=True, target_modules=["k_proj"], task_type=TASK),
    "values": IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type=TASK),
    "norms": LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"], task_type=TASK),
    "tokens": TrainableTokensConfig(token_indices=[3, 17], target_modules=["embed_tokens"], task_type=TASK),
    "prefix": PrefixTuningConfig(num_virtual_tokens=20, task_type=TASK),
}
SITES = {
    "lora": {f"{ATTENTION}.{name}": 2 for name in LINEARS[:4]} | {f"{MLP}.{name}": 2 for name in LINEARS[4:]},
    "dora": {f"{ATTENTION}.k_proj": 2},
    "values": {f"{ATTENTION}.v_proj": 2},
    "tokens": {"model.embed_tokens": 1},
    "norms": {"model.layers.*.input_layernorm": 2, "model.layers.*.post_attention_layernorm": 2, "model.norm": 1},
    "prefix": {PREFIX_SITE: 1},
}


@pytest.fixture(scope="module")
def base() -> Any:
    """With biases at some of its linear layers."""
    return tiny_qwen2()


@pytest.fixture(scope="module")
def layout(base: Any) -> BaseLayout:
    return msgspec.structs.replace(full_layout_of(base), allows_dense=True)


def packed_as(checkpoint: Checkpoint, base: Any, layout: BaseLayout, dtype: str, page_bytes: int) -> PackedAdapter:
    weights = ModelWeights(base)
    biases = {
        site.path: bias for site in layout.sites if site.has_bias and (bias := weights.bias(site.path)) is not None
    }
    return Packer(layout, dtype, page_bytes, biases).pack(checkpoint.compile(weights))


def check_cost(checkpoint: Checkpoint, base: Any, layout: BaseLayout) -> None:
    """The bytes that are told are those that lie in the pages; the pages are as many, but for packing waste."""
    assert layout.kv is not None
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        page_bytes = layout.kv.page_bytes(PAGE_TOKENS, size)
        card = scripted_engine.model_card()
        room = PoolRoom(msgspec.structs.replace(card, dtype=dtype, page_bytes=page_bytes, page_tokens=PAGE_TOKENS))
        packed = packed_as(checkpoint, base, layout, dtype, page_bytes)
        assert room.bytes_of(checkpoint) == packed.used_bytes
        assert packed.num_prefix_pages <= room.pages_of(checkpoint) <= packed.num_pages
        if not checkpoint.num_rows and not checkpoint.num_vector_values:
            assert room.pages_of(checkpoint) == packed.num_pages


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_sites_are_told_by_pattern(base: Any, layout: BaseLayout, tmp_path: Path, kind: str) -> None:
    saved(base, CONFIGS[kind], tmp_path)
    assert dict(read(tmp_path, base, layout).sites_by_pattern) == SITES[kind]


@pytest.mark.parametrize("sample", PEFT_SAMPLES, ids=lambda sample: sample.name)
def test_the_cost_of_every_method_is_told_to_the_byte(
    base: Any, layout: BaseLayout, tmp_path: Path, sample: PeftSample
) -> None:
    sample.save(base, tmp_path, seed=0)
    check_cost(read(tmp_path, base, layout), base, layout)


def test_several_methods_together(base: Any, layout: BaseLayout, tmp_path: Path) -> None:
    parts = ("dora", "values", "prefix")
    for kind in parts:
        saved(base, CONFIGS[kind], tmp_path / kind)
    combine([(kind, 1.0, tmp_path / kind) for kind in parts], tmp_path / "all")
    checkpoint = read(tmp_path / "all", base, layout)
    assert dict(checkpoint.sites_by_pattern) == {
        f"{ATTENTION}.k_proj": 2,
        f"{ATTENTION}.v_proj": 2,
        PREFIX_SITE: 1,
    }
    assert (checkpoint.num_virtual_tokens, checkpoint.num_prefix_tokens) == (20, 20)
    check_cost(checkpoint, base, layout)
