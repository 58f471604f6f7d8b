"""`heddle adapters convert` of what the adapters library saved: bottlenecks, ReFT, LoRA and IA3."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bottleneck_samples import NAME, bottleneck_config, bottleneck_tensors
from heddle_adapters.methods.representation import P, W
from heddle_adapters.positions import Positions
from heddle_server.convert.choices import Choices
from heddle_server.convert.conversion import convert_folder
from heddle_server.convert.source_folder import CannotConvert
from peft_samples import ModelWeights
from reft_samples import HIDDEN, orthogonal_parameters
from test_convert import BASE, CONFIG, LLAMA, WEIGHTS, assert_same, config_of, random_layers, read


def save_library(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], pickle: bool = False
) -> Path:
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config))
    if pickle:
        torch.save(dict(tensors), folder / "pytorch_adapter.bin")
    else:
        save_file(dict(tensors), folder / "adapter.safetensors")
    return folder


def library_config(architecture: str, **settings: Any) -> dict[str, Any]:
    return {**bottleneck_config(), "config": {"architecture": architecture, **settings}}


@pytest.mark.parametrize("pickle", [False, True])
def test_bottlenecks_keep_everything(pickle: bool, tmp_path: Path) -> None:
    config = bottleneck_config()
    tensors = bottleneck_tensors(config, BASE)
    source = save_library(tmp_path / "seq", config, tensors, pickle)
    (source / "head_config.json").write_text("{}")
    outcome = convert_folder(source, tmp_path / "out", Choices())
    assert outcome.method == "bottleneck adapter"
    assert "The prediction head is left out." in outcome.remarks
    assert config_of(tmp_path / "out") == config
    assert_same(load_file(tmp_path / "out" / WEIGHTS), tensors)
    read(tmp_path / "out")


def library_reft(parts: Mapping[str, torch.Tensor], layer: int, unit: int, orthogonal: bool) -> dict[str, Any]:
    prefix = f"model.layers.{layer}.reft_layer.refts.{NAME}.units.{unit}."
    projection = orthogonal_parameters("projection", parts[P]) if orthogonal else {"projection.weight": parts[P]}
    state = {**projection, "learned_source.weight": parts[W], "learned_source.bias": parts["source.bias"]}
    return {prefix + name: value for name, value in state.items()}


def reft_settings(**changes: Any) -> dict[str, Any]:
    return library_config(
        "reft",
        **{
            "layers": "all",
            "prefix_positions": 3,
            "suffix_positions": 0,
            "r": 4,
            "orthogonality": True,
            "tied_weights": False,
            "non_linearity": None,
            **changes,
        },
    )


# Checked once against the library, 1.3.0, on a tiny Llama and a GPT-2: the logits of its LoReFT, NoReFT and DiReFT,
# converted, agree to 2.1e-7; those of its LoRA and IA3, converted and loaded by PEFT, exactly.
@pytest.mark.parametrize(
    ("settings", "choices", "unit", "label", "positions"),
    [
        ({}, Choices(), 0, "LoReFT", Positions(num_first=3)),
        ({"prefix_positions": 0, "suffix_positions": 2}, Choices(), 1, "LoReFT", Positions(num_last=2)),
        ({"suffix_positions": 2, "tied_weights": True}, Choices(), 0, "LoReFT", Positions(num_first=3, num_last=2)),
        ({}, Choices(first=5), 0, "LoReFT", Positions(num_first=5)),
        ({"orthogonality": False}, Choices(intervention="noreft"), 0, "NoReFT", Positions(num_first=3)),
        ({"orthogonality": False}, Choices(intervention="direft"), 0, "NodiReFT", Positions(num_first=3)),
    ],
)
def test_reft_of_the_library(
    settings: dict[str, Any], choices: Choices, unit: int, label: str, positions: Positions, tmp_path: Path
) -> None:
    is_orthogonal = settings.get("orthogonality", True)
    by_unit = [random_layers("loreft" if is_orthogonal else "nodireft", 0, 1), random_layers("loreft", 1, 0)]
    tensors = {
        name: value
        for number, by_layer in enumerate(by_unit)
        for layer, parts in by_layer.items()
        for name, value in library_reft(parts, layer, number, is_orthogonal).items()
    }
    source = save_library(tmp_path / "reft", reft_settings(**settings), tensors)
    assert convert_folder(source, tmp_path / "out", choices).method == label
    checkpoint = read(tmp_path / "out")
    assert checkpoint.positions == positions
    converted = load_file(tmp_path / "out" / WEIGHTS)
    for layer, parts in by_unit[unit].items():
        for part, value in parts.items():
            torch.testing.assert_close(converted[f"layers.{layer}.{part}"], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suffix_positions": 2}, "tied_weights is false"),
        ({"orthogonality": False}, "--intervention noreft or --intervention direft"),
        ({"prefix_positions": 0}, "first and last are both 0"),
        ({"non_linearity": "leakyrelu"}, "activation is 'leakyrelu'"),
    ],
)
def test_reft_of_the_library_that_cannot_be(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    tensors = library_reft(random_layers("loreft", 0)[0], 0, 0, settings.get("orthogonality", True))
    source = save_library(tmp_path / "reft", reft_settings(**settings), tensors)
    with pytest.raises(CannotConvert, match=message):
        convert_folder(source, tmp_path / "out", Choices())


def library_lora(*modules: str, rank: int = 4) -> dict[str, torch.Tensor]:
    return {
        f"model.layers.{layer}.{module}.loras.{NAME}.{part}": torch.randn(shape)
        for layer in range(2)
        for module in modules
        for part, shape in {"lora_A": (rank, HIDDEN), "lora_B": (HIDDEN, rank)}.items()
    }


@pytest.mark.parametrize(("version", "scale"), [("adapters.1.3.0", 4.0), ("adapters.1.0.1", 1.0), ("3.2.1", 1.0)])
def test_lora_of_the_library(version: str, scale: float, tmp_path: Path) -> None:
    tensors = library_lora("self_attn.q_proj", "self_attn.o_proj")
    tensors = {
        name: value if "gate" not in name or "_A" in name else torch.randn(112, 4) for name, value in tensors.items()
    }
    config = library_config("lora", r=4, alpha=16, composition_mode="add", use_gating=False) | {"version": version}
    outcome = convert_folder(save_library(tmp_path / "lora", config, tensors, pickle=True), tmp_path / "out", Choices())
    assert outcome.method == "LoRA"
    updates = {update.site: update for update in read(tmp_path / "out").compile(ModelWeights(LLAMA)).updates}
    assert len(updates) == 4
    rows = updates["model.layers.1.self_attn.o_proj"].rows
    assert rows is not None
    name = f"model.layers.1.self_attn.o_proj.loras.{NAME}."
    torch.testing.assert_close(torch.from_numpy(rows.a), tensors[name + "lora_A"], atol=0, rtol=0)
    torch.testing.assert_close(torch.from_numpy(rows.b.T.copy()), tensors[name + "lora_B"], atol=0, rtol=0)
    assert set(rows.gain) == {scale}


def test_lora_of_the_library_without_some_layers(tmp_path: Path) -> None:
    tensors = {name: value for name, value in library_lora("self_attn.q_proj").items() if "layers.1." in name}
    config = library_config("lora", r=4, alpha=4, composition_mode="add", leave_out=[0])
    convert_folder(save_library(tmp_path / "lora", config, tensors), tmp_path / "out", Choices())
    assert read(tmp_path / "out").sites == ("model.layers.1.self_attn.q_proj",)


def test_ia3_of_the_library(tmp_path: Path) -> None:
    tensors = {f"model.layers.{layer}.mlp.down_proj.loras.{NAME}.lora_B": torch.randn(HIDDEN, 1) for layer in range(2)}
    config = library_config("lora", r=1, alpha=2, composition_mode="scale")
    outcome = convert_folder(save_library(tmp_path / "ia3", config, tensors), tmp_path / "out", Choices())
    assert outcome.method == "IA3"
    for update, value in zip(
        read(tmp_path / "out").compile(ModelWeights(LLAMA)).updates, tensors.values(), strict=True
    ):
        assert update.out_scale is not None
        torch.testing.assert_close(torch.from_numpy(update.out_scale), 2 * value.reshape(-1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (library_config("lora", r=4, alpha=4, use_dora=True), "use_dora is set"),
        (library_config("lora", r=4, alpha=4, vera_d=0.1), "vera_d is set"),
        (library_config("lora", r=4, alpha=4, use_gating=True), "use_gating is set"),
        (library_config("lora", r=2, alpha=4), "in one tensor"),
        (library_config("prefix_tuning"), "architecture 'prefix_tuning'"),
        (library_config("union"), "architecture 'union'"),
    ],
)
def test_other_adapters_of_the_library(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = save_library(tmp_path / "lora", config, library_lora("self_attn.q_proj"))
    with pytest.raises(CannotConvert, match=message):
        convert_folder(source, tmp_path / "out", Choices())


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        (library_config("lora", alpha=4), library_lora("self_attn.q_proj")),
        (library_config("lora", r=4, alpha=4), {f"m.loras.{NAME}.lora_B": torch.ones(4, 4)}),
        (
            library_config("reft", prefix_positions=2, orthogonality=True),
            {"a.0.reft_layer.refts.b.units.0.c": torch.ones(2)},
        ),
    ],
)
def test_half_a_save_of_the_library(config: dict[str, Any], tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(CannotConvert, match="is not as its library saves it"):
        convert_folder(save_library(tmp_path / "half", config, tensors), tmp_path / "out", Choices())
