"""Combined adapters: one upload of several parts does what the parts do together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import (
    BeftConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
)
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file
from transformers import LlamaConfig, LlamaForCausalLM

from base_samples import full_layout_of
from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.canonical import CompiledAdapter, Floats, SiteUpdate
from heddle_adapters.checkpoint import Checkpoint
from heddle_adapters.combine import combine
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter
from heddle_adapters.tensor_file import WEIGHTS_FILE
from peft_samples import SIZES, ModelWeights, tiny_llama, tiny_qwen2
from peft_saves import STORAGES, check_outputs, edit_config, edit_tensors, read, saved

TASK = "CAUSAL_LM"
KINDS: dict[str, Any] = {
    "lora": LoraConfig(task_type=TASK, r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"]),
    "wide": LoraConfig(task_type=TASK, r=5, use_rslora=True, target_modules=["q_proj", "o_proj"]),
    "beft": BeftConfig(task_type=TASK, target_modules=["q_proj", "v_proj"]),
    "ia3": IA3Config(task_type=TASK, target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "norms": LNTuningConfig(task_type=TASK, target_modules=["input_layernorm"]),
    "prompt": PromptTuningConfig(task_type=TASK, num_virtual_tokens=4),
    "prefix": PrefixTuningConfig(task_type=TASK, num_virtual_tokens=3),
}
ADDING = ("beft", "lora", "wide")
LABELS = {
    "lora": "LoRA",
    "wide": "rsLoRA",
    "beft": "BEFT",
    "ia3": "IA3",
    "norms": "LN tuning",
    "prompt": "prompt tuning",
    "prefix": "prefix tuning",
}


@pytest.fixture(scope="module")
def qwen2() -> Any:
    return tiny_qwen2()


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of every kind by its name."""
    return tmp_path_factory.mktemp("saves")


@pytest.fixture(scope="module", autouse=True)
def peft_models(qwen2: Any, saves: Path) -> dict[str, Any]:
    """What PEFT computes with them; making these also fills the folders."""
    return {kind: saved(qwen2, config, saves / kind, seed=len(kind)) for kind, config in KINDS.items()}


def apply(update: SiteUpdate, layer: Any, x: Floats) -> Floats:
    """The canonical form's formula over one linear layer of the base, for rows without activation."""
    weight = layer.weight.detach().numpy()
    b0 = np.float32(0) if layer.bias is None else layer.bias.detach().numpy()
    out_scale = np.float32(1) if update.out_scale is None else update.out_scale
    y = out_scale * ((x if update.in_scale is None else update.in_scale * x) @ weight.T)
    y = y + (out_scale if update.scales_base_bias else 1) * b0 + (0 if update.bias is None else update.bias)
    if update.rows is not None:
        y = y + (update.rows.gain * (x @ update.rows.a.T + update.rows.c)) @ update.rows.b
    return np.asarray(y, np.float32)


def combined(saves: Path, parts: dict[str, float], folder: Path) -> None:
    combine([(kind, gate, saves / kind) for kind, gate in parts.items()], folder)


def compiled(folder: Path, model: Any) -> tuple[Checkpoint, CompiledAdapter]:
    checkpoint = read(folder, model)
    return checkpoint, checkpoint.compile(ModelWeights(model))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_parts_together_do_what_each_does_alone(
    qwen2: Any,
    saves: Path,
    peft_models: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    data: Any,
) -> None:
    kinds = data.draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, unique=True))
    if "prompt" in kinds and "prefix" in kinds:
        kinds.remove("prompt")
    gates = {
        kind: data.draw(st.floats(-3, 3).filter(lambda gate: abs(gate) > 0.1)) if kind in ADDING else 1.0
        for kind in kinds
    }
    folder = tmp_path_factory.mktemp("combined")
    combined(saves, gates, folder)
    checkpoint, adapter = compiled(folder, qwen2)
    assert checkpoint.method == " + ".join(LABELS[kind] for kind in kinds)
    alone = {kind: compiled(saves / kind, qwen2)[1] for kind in kinds}
    assert {update.site for update in adapter.updates} == {u.site for each in alone.values() for u in each.updates}
    for update in adapter.updates:
        if update.site.endswith("layernorm"):
            continue
        layer = qwen2.get_submodule(update.site)
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            base = layer(x)
            changed = [
                gates[kind] * (peft_models[kind].base_model.model.get_submodule(update.site)(x) - base)
                for kind in kinds
                if kind not in ("prompt", "prefix")
            ]
        check_outputs(apply(update, layer, x.numpy()), base + sum(changed), base)
    for kind in kinds:
        for norm in (update for update in alone[kind].updates if update.site.endswith("layernorm")):
            ours = next(update for update in adapter.updates if update.site == norm.site)
            np.testing.assert_array_equal(ours.out_scale, norm.out_scale)
    check_beside(adapter, alone)


def check_beside(adapter: CompiledAdapter, alone: dict[str, CompiledAdapter]) -> None:
    """Tokens and prefixes are those of the one part that has them."""
    assert (adapter.tokens is None) == ("prompt" not in alone)
    assert (adapter.prefix is None) == ("prefix" not in alone)
    if adapter.tokens is not None:
        expected = alone["prompt"].tokens
        assert expected is not None
        np.testing.assert_array_equal(adapter.tokens.values, expected.values)
        np.testing.assert_array_equal(adapter.tokens.token_ids, expected.token_ids)
    if adapter.prefix is not None:
        prefix = alone["prefix"].prefix
        assert prefix is not None
        np.testing.assert_array_equal(adapter.prefix.keys, prefix.keys)
        np.testing.assert_array_equal(adapter.prefix.values, prefix.values)


def parallel_bottleneck(folder: Path, model: Any, width: int = 8) -> Path:
    """A parallel bottleneck in the form of the adapters library (par_bn), random."""
    hidden = model.config.hidden_size
    settings: dict[str, Any] = {
        "mh_adapter": False,
        "output_adapter": True,
        "is_parallel": True,
        "original_ln_before": False,
    }
    settings |= {"original_ln_after": True, "non_linearity": "relu", "reduction_factor": hidden / width, "scaling": 4.0}
    shapes = {
        "adapter_down.0.weight": (width, hidden),
        "adapter_down.0.bias": (width,),
        "adapter_up.weight": (hidden, width),
        "adapter_up.bias": (hidden,),
    }
    generator = np.random.default_rng(0)
    tensors = {
        f"{layer.output}.output_adapters.adapters.mam.{part}": generator.normal(size=shape).astype(np.float32)
        for layer in full_layout_of(model).layers
        for part, shape in shapes.items()
    }
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(json.dumps({"config": settings, "model_type": "qwen2", "name": "mam"}))
    save_file(tensors, folder / WEIGHTS_FILE)
    return folder


def test_a_prefix_with_a_parallel_bottleneck(qwen2: Any, saves: Path, tmp_path: Path) -> None:
    bottleneck = parallel_bottleneck(tmp_path / "bottleneck", qwen2)
    combine([("prefix", 1.0, saves / "prefix"), ("parallel", 0.5, bottleneck)], tmp_path / "mam")
    checkpoint, adapter = compiled(tmp_path / "mam", qwen2)
    alone = compiled(bottleneck, qwen2)[1]
    assert checkpoint.method == "prefix tuning + bottleneck adapter"
    assert adapter.prefix is not None
    assert len(adapter.updates) == len(alone.updates) == 2
    for ours, theirs in zip(adapter.updates, alone.updates, strict=True):
        assert ours.site == theirs.site
        assert ours.rows is not None
        assert theirs.rows is not None
        assert ours.bias is not None
        for name in ("a", "b", "c", "activation"):
            np.testing.assert_array_equal(getattr(ours.rows, name), getattr(theirs.rows, name))
        np.testing.assert_array_equal(ours.rows.gain, 0.5 * theirs.rows.gain)
        np.testing.assert_array_equal(ours.bias, 0.5 * np.asarray(theirs.bias))


def edit_of_layer(folder: Path, layer: int, first: int, hidden: int = 64) -> Path:
    """A LoReFT of one layer, random."""
    generator = np.random.default_rng(layer)
    basis = np.linalg.qr(generator.normal(size=(hidden, 3)))[0].T
    tensors = {
        "projection.weight": basis,
        "source.weight": generator.normal(size=(3, hidden)),
        "source.bias": np.ones(3),
    }
    config = {"peft_type": "HEDDLE_REFT", "intervention": "loreft", "first": first, "last": 0, "layers": [layer]}
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    save_file(
        {f"layers.{layer}.{name}": np.ascontiguousarray(value, np.float32) for name, value in tensors.items()},
        folder / WEIGHTS_FILE,
    )
    return folder


def test_parts_change_the_same_tokens(qwen2: Any, saves: Path, tmp_path: Path) -> None:
    one, two = edit_of_layer(tmp_path / "one", 0, first=2), edit_of_layer(tmp_path / "two", 1, first=2)
    combine([("one", 1.0, one), ("two", 1.0, two)], tmp_path / "both")
    checkpoint = read(tmp_path / "both", qwen2)
    assert checkpoint.positions.num_first == 2
    assert checkpoint.combination == "alone"
    with pytest.raises(InvalidAdapter, match="change different tokens"):
        combine([("one", 1.0, one), ("lora", 1.0, saves / "lora")], tmp_path / "mixed")
    with pytest.raises(InvalidAdapter, match="change different tokens"):
        combine([("one", 1.0, one), ("prefix", 1.0, saves / "prefix")], tmp_path / "prefixed")
    three = edit_of_layer(tmp_path / "three", 1, first=3)
    with pytest.raises(InvalidAdapter, match="change different tokens"):
        combine([("one", 1.0, one), ("three", 1.0, three)], tmp_path / "others")


def test_what_only_the_numbers_show_is_said_of_the_part(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tied = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    saved(tied, TrainableTokensConfig(task_type=TASK, token_indices=[3, 4]), tmp_path / "tokens")
    combine([("rows", 1.0, tmp_path / "tokens")], tmp_path / "out")
    assert read(tmp_path / "out", tied).compile(ModelWeights(tied)).tokens is not None
    edit_tensors(tmp_path / "out", lambda tensors: {name: t + ("lm_head" in name) for name, t in tensors.items()})
    with pytest.raises(InvalidAdapter, match=r"In part 'rows': .*differs from"):
        read(tmp_path / "out", tied).compile(ModelWeights(tied))


def test_sizes_and_how_it_is_mixed(qwen2: Any, saves: Path, tmp_path: Path) -> None:
    combined(saves, {"lora": 0.5, "wide": 1.0, "beft": 2.0}, tmp_path / "sum")
    combined(saves, {"lora": 1.0, "prefix": 1.0}, tmp_path / "alone")
    total, adapter = compiled(tmp_path / "sum", qwen2)
    parts = [read(saves / kind, qwen2) for kind in ("lora", "wide", "beft")]
    assert total.combination == "sum"
    assert read(tmp_path / "alone", qwen2).combination == "alone"
    assert read(tmp_path / "alone", qwen2).num_virtual_tokens == 3
    layout = full_layout_of(qwen2)
    assert [update.site for update in adapter.updates] == [path for path in layout.index() if path in total.sites]
    for name in ("num_rows", "num_row_values", "num_vector_values"):
        assert getattr(total, name) == sum(getattr(part, name) for part in parts)
    assert total.num_rows == sum(update.num_rows for update in adapter.updates)


def test_an_adapter_may_be_combined_with_itself_under_two_names(saves: Path, qwen2: Any, tmp_path: Path) -> None:
    combine([("first", 1.0, saves / "lora"), ("second", -1.0, saves / "lora")], tmp_path)
    layer_path = next(update.site for update in compiled(saves / "lora", qwen2)[1].updates)
    update = next(u for u in compiled(tmp_path, qwen2)[1].updates if u.site == layer_path)
    layer = qwen2.get_submodule(layer_path)
    x = np.random.default_rng(0).standard_normal((5, layer.in_features)).astype(np.float32)
    with torch.no_grad():
        np.testing.assert_allclose(apply(update, layer, x), layer(torch.from_numpy(x)).numpy(), atol=1e-5)


@pytest.mark.parametrize("storage", STORAGES)
def test_combine_copies_every_byte(qwen2: Any, saves: Path, tmp_path: Path, storage: str) -> None:
    saved(qwen2, KINDS["lora"], tmp_path / "lora", storage=STORAGES[storage])
    combine([("one", 1.0, tmp_path / "lora"), ("two", 0.5, saves / "beft")], tmp_path / "out")
    ours = load_torch_file(tmp_path / "out" / WEIGHTS_FILE)
    theirs = {
        "one": load_torch_file(tmp_path / "lora" / WEIGHTS_FILE),
        "two": load_torch_file(saves / "beft" / WEIGHTS_FILE),
    }
    assert ours.keys() == {f"{part}/{name}" for part, tensors in theirs.items() for name in tensors}
    for part, tensors in theirs.items():
        for name, tensor in tensors.items():
            assert ours[f"{part}/{name}"].dtype == tensor.dtype
            assert torch.equal(ours[f"{part}/{name}"], tensor)


def test_combine_never_overwrites_and_refuses_before_it_writes(saves: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InvalidAdapter, match="2 parts named 'x'"):
        combine([("x", 1.0, saves / "lora"), ("x", 1.0, saves / "beft")], out)
    with pytest.raises(InvalidAdapter, match=r"In part 'prefix': .*gate is 0\.5"):
        combine([("prefix", 0.5, saves / "prefix")], out)
    assert not out.exists()
    combine([("lora", 1.0, saves / "lora")], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(FileExistsError):
        combine([("beft", 1.0, saves / "beft")], out)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    assert all(name.startswith("lora/") for name in load_file(out / WEIGHTS_FILE))


def test_the_base_that_parts_name_is_said_once(saves: Path, qwen2: Any, tmp_path: Path) -> None:
    fingerprint = full_layout_of(qwen2).fingerprint
    for name, named in (("one", fingerprint), ("two", "sha256:" + "1" * 64)):
        saved(qwen2, KINDS["lora"], tmp_path / name)
        edit_config(tmp_path / name, heddle_base_fingerprint=named)
    combine([("one", 1.0, tmp_path / "one"), ("beft", 1.0, saves / "beft")], tmp_path / "fits")
    assert json.loads((tmp_path / "fits" / CONFIG_FILE).read_text())["heddle_base_fingerprint"] == fingerprint
    assert read(tmp_path / "fits", qwen2).num_rows
    combine([("two", 1.0, tmp_path / "two")], tmp_path / "other")
    with pytest.raises(AdapterIncompatible, match="heddle_base_fingerprint"):
        read(tmp_path / "other", qwen2)
    with pytest.raises(InvalidAdapter, match="differs among the parts"):
        combine([("one", 1.0, tmp_path / "one"), ("two", 1.0, tmp_path / "two")], tmp_path / "both")


def test_gates_and_names_are_part_of_the_identity(saves: Path, qwen2: Any, tmp_path: Path) -> None:
    combined(saves, {"lora": 1.0, "beft": 1.0}, tmp_path)
    digests = {read(tmp_path, qwen2).digest}
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    first, second = config["parts"]
    for parts in (
        [{**first, "gate": 0.5}, second],
        [{**first, "config": {**first["config"], "lora_alpha": 7}}, second],
        [second, first],
    ):
        edit_config(tmp_path, parts=parts)
        digests.add(read(tmp_path, qwen2).digest)
    assert len(digests) == 4
    edit_config(tmp_path, parts=[{"name": "lora", "config": {**first["config"], "lora_dropout": 0.7}}, second])
    assert read(tmp_path, qwen2).digest in digests


# Refusals


def entry(**changes: Any) -> dict[str, Any]:
    lora = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return {"name": "lora", "gate": 1.0, "config": lora, **changes}


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        (None, "must be a list of 1 to 16 objects"),
        ([], "must be a list of 1 to 16 objects"),
        ({"lora": {}}, "must be a list of 1 to 16 objects"),
        ([entry()] * 17, "must be a list of 1 to 16 objects"),
        (["lora"], "must hold objects"),
        ([{"name": "lora"}], "must hold objects"),
        ([entry(scale=2)], "must hold objects"),
        ([entry(name="a/b")], "has the name 'a/b'"),
        ([entry(name="")], "has the name ''"),
        ([entry(name="x" * 33)], "has the name"),
        ([entry(name=3)], "has the name"),
        ([entry(name="../x")], "has the name"),
        ([entry(gate="1")], "gate must be a number"),
        ([entry(gate=True)], "gate must be a number"),
        ([entry(gate=1e5)], "at most 10000"),
        ([entry(config="LORA")], "In part 'lora': .*config must be an object"),
        ([entry(config={})], "In part 'lora': .*peft_type is missing"),
        ([entry(config={"peft_type": "UNHEARD"})], "In part 'lora': .*'UNHEARD'"),
        ([entry(config={"peft_type": "HEDDLE_COMBINED", "parts": [entry()]})], "do not nest"),
        ([entry(config={"peft_type": "LORA", "heddle_base_fingerprint": "sha256:0"})], "set it once"),
        ([entry(config={"peft_type": "LORA", "r": 10**7})], "In part 'lora'"),
        ([entry(config={"peft_type": "IA3"}, gate=2)], "gate is 2, but IA3 does more than add"),
        ([entry(), entry(name="empty")], "In part 'empty': .*no tensors"),
        ([entry(), entry()], "2 parts named 'lora'"),
        ([entry(name="other")], "In part 'other': .*no tensors"),
        ([entry(config={**entry()["config"], "target_modules": ["q_proj", "up_proj"]})], "up_proj"),
    ],
)
def test_configs_that_are_refused(qwen2: Any, saves: Path, tmp_path: Path, parts: Any, word: str) -> None:
    combined(saves, {"lora": 1.0}, tmp_path)
    edit_config(tmp_path, parts=parts)
    with pytest.raises(InvalidAdapter, match=word):
        read(tmp_path, qwen2)


def test_fields_beside_the_parts_are_refused(qwen2: Any, saves: Path, tmp_path: Path) -> None:
    combined(saves, {"lora": 1.0}, tmp_path)
    edit_config(tmp_path, r=3)
    with pytest.raises(InvalidAdapter, match="'r'"):
        read(tmp_path, qwen2)


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        ("prompt", "prefix", "each put tokens before the prompt"),
        ("prefix", "prefix", "each put tokens before the prompt"),
        ("ia3", "ia3", "each do more than add at"),
        ("norms", "norms", "each do more than add at"),
    ],
)
def test_parts_that_cannot_act_together(
    qwen2: Any, saves: Path, tmp_path: Path, first: str, second: str, word: str
) -> None:
    combine([("one", 1.0, saves / first), ("two", 1.0, saves / second)], tmp_path)
    with pytest.raises(InvalidAdapter, match=word):
        read(tmp_path, qwen2)


def test_tensors_that_are_refused(qwen2: Any, saves: Path, tmp_path: Path) -> None:
    combined(saves, {"lora": 1.0, "beft": 1.0}, tmp_path)
    name = next(name for name in load_file(tmp_path / WEIGHTS_FILE) if name.startswith("beft/"))

    def refused(word: str, edit: Any, kind: type[InvalidAdapter] = InvalidAdapter) -> None:
        before = (tmp_path / WEIGHTS_FILE).read_bytes()
        edit_tensors(tmp_path, edit)
        with pytest.raises(kind, match=word):
            read(tmp_path, qwen2)
        (tmp_path / WEIGHTS_FILE).write_bytes(before)

    refused("not part of a LoRA . BEFT adapter", lambda tensors: tensors | {"loose": torch.ones(1)})
    refused("not part of a LoRA . BEFT adapter", lambda tensors: tensors | {"lora/loose": torch.ones(1)})
    refused("not part of", lambda tensors: tensors | {name.removeprefix("beft/"): torch.ones(1, 64)})
    refused("must be", lambda tensors: tensors | {name: torch.ones(1, 63)}, AdapterIncompatible)
    refused("In part 'beft': .*target_modules", lambda tensors: {key: t for key, t in tensors.items() if key != name})
    refused("wrong type", lambda tensors: tensors | {name: torch.ones(1, 64, dtype=torch.int32)})
    refused("NaN", lambda tensors: tensors | {name: torch.full((1, 64), torch.inf)})
    with pytest.raises(AdapterIncompatible, match="must be"):
        read(tmp_path, tiny_llama_of_another_width())


def tiny_llama_of_another_width() -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 32}))


def test_it_is_served_on_other_bases_too(saves: Path, tmp_path: Path) -> None:
    llama = tiny_llama()
    combined(saves, {"lora": 1.0, "prefix": 1.0}, tmp_path)
    checkpoint, adapter = compiled(tmp_path, llama)
    assert checkpoint.method == "LoRA + prefix tuning"
    assert adapter.prefix is not None
    assert len(adapter.updates) == 6
