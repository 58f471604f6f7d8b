"""Any change of a saved config or of its tensors is served or refused: never another error, never a wrong shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    CartridgeConfig,
    CPTConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
)
from safetensors.numpy import load_file, save_file

from base_samples import full_layout_of
from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.canonical import CompiledAdapter
from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.combine import combine
from heddle_adapters.errors import InvalidAdapter
from heddle_adapters.tensor_file import WEIGHTS_FILE
from peft_samples import ModelWeights, tiny_gpt2
from peft_saves import saved

TASK = "CAUSAL_LM"
CONFIGS: dict[str, Any] = {
    "cartridge": CartridgeConfig(task_type=TASK, num_virtual_tokens=3),
    "context": CPTConfig(task_type=TASK, cpt_token_ids=[3, 4, 5]),
    "ia3": IA3Config(
        task_type=TASK, target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True, modules_to_save=["ln_f"]
    ),
    "norms": LNTuningConfig(task_type=TASK, target_modules=["ln_1", "ln_f"]),
    "prefix": PrefixTuningConfig(task_type=TASK, num_virtual_tokens=3),
    "prompt": PromptTuningConfig(task_type=TASK, num_virtual_tokens=3),
    "task": MultitaskPromptTuningConfig(task_type=TASK, num_virtual_tokens=3, num_tasks=1, num_ranks=2),
    "tokens": TrainableTokensConfig(task_type=TASK, token_indices=[7, 3]),
}
LORA = LoraConfig(task_type=TASK, r=2, target_modules=["c_attn"], fan_in_fan_out=True)
MODEL = tiny_gpt2()
LAYOUT = full_layout_of(MODEL)

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["ln_f", "lm_head", "c_attn", "transformer.wte", "LORA", "PREFIX_TUNING", "HEDDLE_COMBINED"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saves")
    for name, config in CONFIGS.items():
        saved(MODEL, config, root / name)
    saved(MODEL, LORA, root / "lora")
    combine([("lora", 0.5, root / "lora"), ("prefix", 1.0, root / "prefix")], root / "combined")
    return root


KINDS = sorted({*CONFIGS, "combined"})


def served_or_refused(config: dict[str, Any], weights: Path) -> None:
    try:
        checkpoint = read_checkpoint(json.dumps(config).encode(), weights, LAYOUT)
        adapter = checkpoint.compile(ModelWeights(MODEL))
    except InvalidAdapter:
        return
    check_shapes(adapter)


def check_shapes(adapter: CompiledAdapter) -> None:
    for update in adapter.updates:
        site = LAYOUT.site(update.site)
        for vector, width in (
            (update.in_scale, site.in_features),
            (update.out_scale, site.out_features),
            (update.bias, site.out_features),
        ):
            assert vector is None or vector.shape == (width,)
        if update.rows is not None:
            assert update.rows.a.shape == (update.num_rows, site.in_features)
            assert update.rows.b.shape == (update.num_rows, site.out_features)
    if adapter.tokens is not None:
        assert (np.diff(adapter.tokens.token_ids) > 0).all()
        assert adapter.tokens.values.shape == (len(adapter.tokens.token_ids), 64)
    if adapter.prefix is not None:
        assert adapter.prefix.keys.shape == adapter.prefix.values.shape == (2, adapter.prefix.num_tokens, 4, 16)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_any_config(saves: Path, kind: str, data: Any) -> None:
    config = json.loads((saves / kind / CONFIG_FILE).read_text())
    fields = st.sampled_from(sorted(config)) | st.sampled_from(["heddle_task", "modules_to_save", "num_virtual_tokens"])
    config |= data.draw(st.dictionaries(fields, VALUES, min_size=1, max_size=3))
    served_or_refused(config, saves / kind / WEIGHTS_FILE)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_part(saves: Path, data: Any) -> None:
    config = json.loads((saves / "combined" / CONFIG_FILE).read_text())
    part = config["parts"][data.draw(st.integers(0, 1))]
    part |= data.draw(st.dictionaries(st.sampled_from(["name", "gate", "config", "more"]), VALUES, max_size=2))
    if isinstance(part["config"], dict) and part["config"]:
        part["config"][data.draw(st.sampled_from(sorted(part["config"])))] = data.draw(VALUES)
    served_or_refused(config, saves / "combined" / WEIGHTS_FILE)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_any_tensor(saves: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, data: Any) -> None:
    tensors = load_file(saves / kind / WEIGHTS_FILE)
    names = st.sampled_from(sorted(tensors))
    name = data.draw(names)
    change = data.draw(st.sampled_from(["drop", "rename", "reshape", "cut", "retype", "swap", "copy"]))
    tensor = tensors.pop(name)
    if change == "rename":
        tensors[data.draw(names) + data.draw(st.sampled_from(["", ".x", "_", ".weight"]))] = tensor
    elif change == "reshape":
        tensors[name] = tensor.reshape(data.draw(st.sampled_from([(-1,), (1, -1), (-1, 1), (1, *tensor.shape)])))
    elif change == "cut":
        tensors[name] = tensor[: data.draw(st.integers(1, len(tensor)))]
    elif change == "retype":
        tensors[name] = tensor.astype(data.draw(st.sampled_from(["int64", "float16", "uint8", "float64"])))
    elif change == "swap":
        tensors[name] = np.ascontiguousarray(tensor.T)
    elif change == "copy":
        tensors |= {name: tensor, data.draw(st.text("abc./", min_size=1, max_size=6)) + name: tensor.copy()}
    if tensors:
        path = tmp_path_factory.mktemp("changed") / WEIGHTS_FILE
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)
        served_or_refused(json.loads((saves / kind / CONFIG_FILE).read_text()), path)
