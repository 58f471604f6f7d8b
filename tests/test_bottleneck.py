"""Bottleneck adapters: what is served computes what the adapters library computes, and the rest is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from base_samples import full_layout_of
from block_hooks import added, applied
from bottleneck_samples import (
    CONFIG,
    CONFIGS,
    FUNCTIONS,
    HOULSBY,
    NAME,
    WEIGHTS,
    bottleneck_config,
    bottleneck_tensors,
    computed_by_the_library,
    save_bottleneck,
)
from heddle_adapters.adapter_config import AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.checkpoint import Checkpoint, read_checkpoint
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter
from heddle_adapters.methods.bottleneck import Bottleneck
from heddle_adapters.tensor_file import TensorInfo
from peft_samples import ModelWeights, tiny_gpt2, tiny_llama, tiny_qwen2

MODELS = {"llama": tiny_llama, "qwen2": tiny_qwen2, "gpt2": tiny_gpt2}
LLAMA = tiny_llama()
BASE = full_layout_of(LLAMA)
PLUS = "adapter_plus"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read(folder: Path, base: BaseLayout = BASE) -> Checkpoint:
    return read_checkpoint(folder / CONFIG, folder / WEIGHTS, base)


# The library refuses original_ln_after=False for Qwen2.
PAIRS = [(model_type, case) for model_type in MODELS for case in CONFIGS if (model_type, case) != ("qwen2", PLUS)]


@pytest.mark.parametrize(("model_type", "case"), PAIRS)
def test_a_model_computes_what_it_computes_under_the_library(model_type: str, case: str, tmp_path: Path) -> None:
    model = MODELS[model_type]()
    base = full_layout_of(model)
    config = bottleneck_config(model_type, **CONFIGS[case])
    tensors = bottleneck_tensors(config, base)
    checkpoint = read(save_bottleneck(tmp_path, config, tensors), base)
    adapter = checkpoint.compile(ModelWeights(model))
    token_ids = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(token_ids).logits
        with computed_by_the_library(model, config, tensors, base):
            expected = model(token_ids).logits
        with applied(model, adapter):
            served = model(token_ids).logits
    limit = 1e-5 * max(1.0, float(expected.abs().max()))
    assert float((served - expected).abs().max()) <= limit
    assert float((plain - expected).abs().max()) >= 100 * limit
    assert checkpoint.num_rows == sum(update.num_rows for update in adapter.updates)
    assert checkpoint.num_row_values == sum(2 * 64 * update.num_rows for update in adapter.updates)
    assert checkpoint.num_vector_values == 64 * len(adapter.updates)
    assert (checkpoint.method, checkpoint.combination) == ("bottleneck adapter", "sum")
    assert checkpoint.positions.are_all


def test_each_way_to_read_has_its_sites() -> None:
    layer = BASE.layers[1]
    assert sites("seq_bn")[1] == layer.output
    assert sites("par_bn")[1] == layer.parallel_mlp
    assert sites("double_seq_bn")[2:] == (layer.attention, layer.mlp)
    assert sites("attention only") == (BASE.layers[0].attention,)


def sites(case: str) -> tuple[str, ...]:

    config = bottleneck_config(**CONFIGS[case])
    tensors = {
        name: TensorInfo(name, "F32", tuple(value.shape), 0, 0)
        for name, value in bottleneck_tensors(config, BASE).items()
    }
    method = Bottleneck.from_config(AdapterConfig(config))
    return tuple(source.site for source in method.sources(tensors, BASE))


@given(
    factor=st.floats(0.7, 90),
    is_parallel=st.booleans(),
    activation=st.sampled_from(sorted(FUNCTIONS)),
    scaling=st.one_of(st.floats(0.1, 5), st.sampled_from(["learned", "channel"])),
    left_out=st.sets(st.integers(0, 1), max_size=1),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_are_the_formula(
    tmp_path: Path,
    factor: float,
    is_parallel: bool,
    activation: str,
    scaling: float | str,
    left_out: set[int],
    dtype: str,
    seed: int,
) -> None:
    config = bottleneck_config(
        reduction_factor=factor,
        is_parallel=is_parallel,
        non_linearity=activation,
        scaling=scaling,
        leave_out=sorted(left_out),
    )
    stored = {name: value.to(DTYPES[dtype]) for name, value in bottleneck_tensors(config, BASE, seed).items()}
    adapter = read(save_bottleneck(tmp_path, config, stored)).compile(ModelWeights(LLAMA))
    assert len(adapter.updates) == 2 - len(left_out)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))
    numbers = [number for number in range(2) if number not in left_out]
    for number, update in zip(numbers, adapter.updates, strict=True):
        prefix = f"model.layers.{number}.output_adapters.adapters.{NAME}."
        tensors = {name.removeprefix(prefix): value.float() for name, value in stored.items()}
        down = x @ tensors["adapter_down.0.weight"].T + tensors["adapter_down.0.bias"]
        up = FUNCTIONS[activation](down) @ tensors["adapter_up.weight"].T + tensors["adapter_up.bias"]
        expected = (up * tensors.get("scaling", scaling)).numpy()
        limit = 1e-5 * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(added(update, x.numpy()), expected, atol=limit, rtol=0)
        assert np.abs(expected).max() >= 100 * limit


def test_identity_is_what_changes_the_computation(tmp_path: Path) -> None:
    def digest(name: str = "a", version: str = "adapters.1.3.0", **changes: Any) -> str:
        config = bottleneck_config(**changes) | {"version": version}
        return read(save_bottleneck(tmp_path / name, config, bottleneck_tensors(bottleneck_config(), BASE))).digest

    assert digest(dropout=0.5, init_weights="mam_adapter", phm_dim=8) == digest()
    assert digest(version="adapters.1.0.0") == digest()
    others = {
        digest(non_linearity="gelu_new"),
        digest(scaling=2.0),
        digest(is_parallel=True),
        digest(original_ln_before=False),
    }
    assert len(others | {digest()}) == 5


def test_gelu_meant_its_tanh_form_in_the_first_releases(tmp_path: Path) -> None:
    config = bottleneck_config(non_linearity="gelu")
    del config["version"]
    read(save_bottleneck(tmp_path, config, bottleneck_tensors(config, BASE)))


# Refusals: each changes an honest upload of seq_bn.

Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]
FIRST = f"model.layers.0.output_adapters.adapters.{NAME}."


def nested(**changes: Any) -> Change:
    return lambda config, _: config["config"].update(changes)


def outer(**changes: Any) -> Change:
    return lambda config, _: config.update(changes)


def tensor(name: str, *shape: int) -> Change:
    return lambda _, tensors: tensors.update({name: torch.ones(shape)})


def without(*names: str) -> Change:
    def change(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            del tensors[name]

    return change


def without_all(part: str) -> Change:
    def change(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


REFUSED: dict[str, tuple[Change, str, str]] = {
    "no object": (outer(config=[]), CONFIG, "config must be an object"),
    "architecture": (nested(architecture="lora"), CONFIG, "try `heddle adapters convert`"),
    "prefix tuning": (nested(architecture="prefix_tuning"), CONFIG, "architecture is set"),
    "model type": (outer(model_type="gemma2"), CONFIG, "model_type is 'gemma2'"),
    "no model type": (outer(model_type=None), CONFIG, "model_type is 'None'"),
    "no name": (outer(name=""), CONFIG, "name is missing"),
    "another name": (outer(name="other"), WEIGHTS, "no adapter in output_adapters of layer 0"),
    "unknown outer field": (outer(more="x"), CONFIG, "'more' is set"),
    "unknown field": (nested(new_thing=3), CONFIG, "'new_thing' is set"),
    "gating": (nested(use_gating=True), CONFIG, "use_gating is true"),
    "invertible": (nested(inv_adapter="nice"), CONFIG, "inv_adapter is set"),
    "Compacter": (nested(phm_layer=True), CONFIG, "phm_layer is true"),
    "layer norm before": (nested(ln_before=True), CONFIG, "ln_before is true"),
    "layer norm after": (nested(ln_after=True), CONFIG, "ln_after is true"),
    "cross attention": (nested(cross_adapter=True), CONFIG, "cross_adapter is true"),
    "exact gelu": (nested(non_linearity="gelu"), CONFIG, "non_linearity is 'gelu', and served are"),
    "leaky relu": (nested(non_linearity="leakyrelu"), CONFIG, "non_linearity is 'leakyrelu'"),
    "attention reads the stream": (nested(mh_adapter=True), CONFIG, "mh_adapter and original_ln_before are true"),
    "attention in parallel": (nested(mh_adapter=True, is_parallel=True), CONFIG, "mh_adapter and is_parallel are true"),
    "residual lost": (nested(original_ln_after=False), CONFIG, "original_ln_after is 'False'"),
    "residual twice": (nested(residual_before_ln=False), CONFIG, "residual_before_ln 'False'"),
    "residual after a norm": (nested(residual_before_ln="post_add"), CONFIG, "residual_before_ln 'post_add'"),
    "parallel residual lost": (nested(is_parallel=True, original_ln_after=False), CONFIG, "original_ln_after is"),
    "scaling": (nested(scaling="other"), CONFIG, "scaling must be a number"),
    "scaling huge": (nested(scaling=1e6), CONFIG, "scaling is 1e+06; at most 10000"),
    "scaling tensor missing": (nested(scaling="learned"), WEIGHTS, "but no output_adapters.adapters.sample.scaling"),
    "scaling tensor unexpected": (tensor(FIRST + "scaling", 1), WEIGHTS, "the config's scaling is a number"),
    "factor zero": (nested(reduction_factor=0), CONFIG, "reduction_factor must be a number above 0"),
    "factor negative": (nested(reduction_factor=-8), CONFIG, "reduction_factor must be a number above 0"),
    "factor missing": (nested(reduction_factor=None), CONFIG, "must be a number, not"),
    "factor without default": (nested(reduction_factor={"0": 8}), CONFIG, "neither layer 1 nor a default"),
    "factor of another file": (nested(reduction_factor=4), WEIGHTS, "makes the bottleneck 16 wide"),
    "factor bomb": (nested(reduction_factor=1e-300), WEIGHTS, "wide; upload the config"),
    "leave_out": (nested(leave_out=["0"]), CONFIG, "leave_out must hold whole numbers"),
    "leave_out a number": (nested(leave_out=3), CONFIG, "leave_out must be a list"),
    "layer left out": (nested(leave_out=[1]), WEIGHTS, "has an adapter in output_adapters of layer 1, although"),
    "layer missing": (without_all("layers.1."), WEIGHTS, "has no adapter in output_adapters of layer 1, which"),
    "place missing": (nested(**HOULSBY), WEIGHTS, "no adapter in attention_adapters of layer 0"),
    "part missing": (without(FIRST + "adapter_up.bias"), WEIGHTS, "adapter_up.bias; save the adapter again"),
    "a place too many": (
        tensor(f"model.layers.0.attention_adapters.adapters.{NAME}.adapter_up.bias", 64),
        WEIGHTS,
        "1 tensors that are not part of a bottleneck adapter",
    ),
    "at a block that is no layer": (
        tensor(f"model.layers.0.mlp.output_adapters.adapters.{NAME}.adapter_up.bias", 64),
        WEIGHTS,
        "which are no layers",
    ),
    "base weight": (tensor("model.layers.0.mlp.down_proj.weight", 64, 112), WEIGHTS, "not part of a bottleneck"),
    "invertible tensors": (tensor("model.invertible_adapters.sample.F.0.weight", 2, 2), WEIGHTS, "not part of"),
}
INCOMPATIBLE: dict[str, tuple[Change, str, str]] = {
    "a layer too many": (tensor(FIRST.replace("0", "7") + "adapter_up.bias", 64), WEIGHTS, "'model.layers.7'"),
    "too wide": (tensor(FIRST + "adapter_down.0.weight", 8, 65), WEIGHTS, "must be [8, 64] and is [8, 65]"),
    "up transposed": (tensor(FIRST + "adapter_up.weight", 8, 64), WEIGHTS, "must be [64, 8] and is [8, 64]"),
    "bias too long": (tensor(FIRST + "adapter_down.0.bias", 9), WEIGHTS, "must be [8] and is [9]"),
}


@pytest.mark.parametrize("case", [*REFUSED, *INCOMPATIBLE])
def test_refuses(case: str, tmp_path: Path) -> None:
    change, param, message = (REFUSED | INCOMPATIBLE)[case]
    config = bottleneck_config()
    tensors = bottleneck_tensors(config, BASE)
    change(config, tensors)
    with pytest.raises(InvalidAdapter) as caught:
        read(save_bottleneck(tmp_path, config, tensors))
    assert message in caught.value.message
    assert caught.value.param == param
    assert isinstance(caught.value, AdapterIncompatible) == (case in INCOMPATIBLE)


def test_needs_the_place_in_the_base(tmp_path: Path) -> None:

    config = bottleneck_config(is_parallel=True)
    folder = save_bottleneck(tmp_path, config, bottleneck_tensors(config, BASE))
    base = replace(BASE, layers=tuple(replace(layer, parallel_mlp=None) for layer in BASE.layers))
    with pytest.raises(AdapterIncompatible, match="has no such place"):
        read(folder, base)


def test_takes_no_config_without_a_method(tmp_path: Path) -> None:
    folder = save_bottleneck(tmp_path, bottleneck_config(), bottleneck_tensors(bottleneck_config(), BASE))
    (folder / CONFIG).write_text(json.dumps({"name": "x"}))
    with pytest.raises(InvalidAdapter, match="peft_type is missing"):
        read(folder)
