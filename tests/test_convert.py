"""`heddle adapters convert`: other libraries' folders become uploads that compute the same, and nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from base_samples import full_layout_of
from heddle_adapters.checkpoint import Checkpoint, read_checkpoint
from heddle_adapters.methods.representation import INTERVENTIONS
from heddle_adapters.positions import Positions
from heddle_server.cli import app
from heddle_server.convert.choices import Choices
from heddle_server.convert.conversion import Outcome, convert_folder
from heddle_server.convert.source_folder import CannotConvert
from peft_samples import make_adapter, tiny_llama
from reft_samples import pyreft_state, reft_parts, save_as_pyreft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LLAMA = tiny_llama()
BASE = full_layout_of(LLAMA)
EDGES = Choices(first=2, last=3)


def read(folder: Path) -> Checkpoint:
    return read_checkpoint(folder / CONFIG, folder / WEIGHTS, BASE)


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return config


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def random_layers(intervention: str, *layers: int, rank: int = 4) -> dict[int, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {layer: reft_parts(intervention, rank, generator) for layer in layers}


# pyreft


@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_pyreft_keeps_its_numbers(intervention: str, tmp_path: Path) -> None:
    by_layer = random_layers(intervention, 0, 1)
    source = save_as_pyreft(tmp_path / "reft", intervention, by_layer)
    outcome = convert_folder(source, tmp_path / "out", EDGES)
    assert outcome.method == INTERVENTIONS[intervention].label
    checkpoint = read(tmp_path / "out")
    assert checkpoint.positions == Positions(num_first=2, num_last=3)
    converted = load_file(tmp_path / "out" / WEIGHTS)
    expected = {f"layers.{layer}.{part}": value for layer, parts in by_layer.items() for part, value in parts.items()}
    assert converted.keys() == expected.keys()
    for name, value in expected.items():
        # Two of the classes keep the parameters of an orthogonal matrix, which are multiplied out again.
        torch.testing.assert_close(converted[name], value, atol=1e-6, rtol=0)


def test_pyreft_in_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    by_layer = {0: {part: value.bfloat16() for part, value in random_layers("loreft", 0)[0].items()}}
    convert_folder(save_as_pyreft(tmp_path / "reft", "loreft", by_layer), tmp_path / "out", EDGES)
    assert {value.dtype for value in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}


def test_pyreft_says_what_it_does_not_save(tmp_path: Path) -> None:
    source = save_as_pyreft(tmp_path / "reft", "loreft", random_layers("loreft", 1))
    with pytest.raises(CannotConvert, match="--first and --last"):
        convert_folder(source, tmp_path / "out", Choices(activation="relu"))
    assert any("--activation" in remark for remark in convert_folder(source, tmp_path / "a", EDGES).remarks)
    outcome = convert_folder(source, tmp_path / "b", Choices(last=1, activation="relu"))
    assert not any("--activation" in remark for remark in outcome.remarks)
    assert config_of(tmp_path / "b") | {"first": 0, "last": 1, "activation": "relu"} == config_of(tmp_path / "b")
    assert read(tmp_path / "b").num_rows == 8


def test_pyreft_components_named_by_path(tmp_path: Path) -> None:
    parts = random_layers("loreft", 1)
    source = save_as_pyreft(tmp_path / "reft", "loreft", parts)
    key = "comp_model_layers[1]_output_unit_pos_nunit_1#0"
    torch.save(pyreft_state("loreft", parts[1]), source / f"intkey_{key}.bin")
    change_json(source / "config.json", sorted_keys=[key])
    convert_folder(source, tmp_path / "out", EDGES)
    assert config_of(tmp_path / "out")["layers"] == [1]


def test_pyreft_weights_of_first_and_last_tokens(tmp_path: Path) -> None:
    parts, others = random_layers("loreft", 0)[0], random_layers("loreft", 1, 0)[0]
    source = save_as_pyreft(tmp_path / "reft", "loreft", {0: parts})
    keys = [f"layer_0_comp_block_output_unit_pos_nunit_1#{copy}" for copy in range(2)]
    change_json(source / "config.json", sorted_keys=keys)
    torch.save(pyreft_state("loreft", parts), source / f"intkey_{keys[1]}.bin")
    convert_folder(source, tmp_path / "shared", EDGES)
    torch.save(pyreft_state("loreft", others), source / f"intkey_{keys[1]}.bin")
    with pytest.raises(CannotConvert, match="train with share_weights=True"):
        convert_folder(source, tmp_path / "apart", EDGES)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intervention_types": ["<class 'os.system'>"]}, r"names the interventions \['system'\]"),
        ({"intervention_types": ["a", "b"]}, "the same at every layer"),
        ({"intervention_types": []}, r"names the interventions \[\]"),
        ({"sorted_keys": []}, "lists no sorted_keys"),
        ({"sorted_keys": ["layer_0_comp_mlp_output_unit_pos_nunit_1#0"]}, "block_output"),
        ({"sorted_keys": ["layer_0_comp_block_output_unit_pos_nunit_2#0"]}, "at single positions"),
        ({"sorted_keys": ["../../layer_0_comp_block_output_unit_pos_nunit_1#0"]}, "has an intervention at"),
        ({"sorted_keys": ["layer_9_comp_block_output_unit_pos_nunit_1#0"]}, "has no intkey_layer_9"),
    ],
)
def test_pyreft_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = save_as_pyreft(tmp_path / "reft", "loreft", random_layers("loreft", 0))
    change_json(source / "config.json", **changes)
    with pytest.raises(CannotConvert, match=message):
        convert_folder(source, tmp_path / "out", EDGES)
    assert not (tmp_path / "out").exists()


def test_pyreft_unknown_tensors(tmp_path: Path) -> None:
    source = save_as_pyreft(tmp_path / "reft", "loreft", random_layers("loreft", 0))
    torch.save({"more": torch.ones(2)}, source / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin")
    with pytest.raises(CannotConvert, match=r"has \['more'\], which is no state of a ReFT"):
        convert_folder(source, tmp_path / "out", EDGES)


# PEFT


def as_pickle(folder: Path, **config: Any) -> Path:
    """The folder with a .bin in place of the safetensors."""
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    change_json(folder / CONFIG, **config)
    return folder


def test_a_pickle_of_peft_keeps_everything(tmp_path: Path) -> None:
    make_adapter(LLAMA, "lora", tmp_path / "lora")
    before, digest = load_file(tmp_path / "lora" / WEIGHTS), read(tmp_path / "lora").digest
    outcome = convert_folder(as_pickle(tmp_path / "lora"), tmp_path / "out", Choices())
    assert outcome == Outcome("LoRA", ("adapter_model.bin is now adapter_model.safetensors, tensor by tensor.",))
    assert_same(load_file(tmp_path / "out" / WEIGHTS), before)
    assert read(tmp_path / "out").digest == digest


def test_doubles_become_single_floats(tmp_path: Path) -> None:
    make_adapter(LLAMA, "lora", tmp_path / "lora")
    tensors = {name: value.double() for name, value in load_file(tmp_path / "lora" / WEIGHTS).items()}
    save_file(tensors, tmp_path / "lora" / WEIGHTS)
    convert_folder(as_pickle(tmp_path / "lora"), tmp_path / "out", Choices())
    read(tmp_path / "out")


def test_bone_is_miss(tmp_path: Path) -> None:
    folder = tmp_path / "bone"
    folder.mkdir()
    config = {"peft_type": "BONE", "r": 4, "target_modules": ["q_proj"]}
    (folder / CONFIG).write_text(json.dumps(config))
    blocks = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.bone_block": torch.ones(4, 64) for layer in (0, 1)
    }
    save_file(blocks, folder / WEIGHTS)
    convert_folder(folder, tmp_path / "out", Choices())
    assert config_of(tmp_path / "out") == config | {"peft_type": "MISS"}
    read(tmp_path / "out")
    renamed = {name.replace("bone_block", "miss_block"): value for name, value in blocks.items()}
    assert_same(load_file(tmp_path / "out" / WEIGHTS), renamed)


def test_what_needs_no_conversion(tmp_path: Path) -> None:
    make_adapter(LLAMA, "lora", tmp_path / "lora")
    with pytest.raises(CannotConvert, match="needs no conversion; upload it as it is"):
        convert_folder(tmp_path / "lora", tmp_path / "out", Choices())


class Payload:
    """A pickle of it writes a file when it is opened carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    make_adapter(LLAMA, "lora", tmp_path / "lora")
    folder = as_pickle(tmp_path / "lora")
    torch.save({"a": Payload(tmp_path / "ran")}, folder / "adapter_model.bin")
    with pytest.raises(CannotConvert, match="holds more than tensors"):
        convert_folder(folder, tmp_path / "out", Choices())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"garbage"])
def test_a_broken_pickle_is_said_to_be_broken(content: bytes, tmp_path: Path) -> None:
    make_adapter(LLAMA, "lora", tmp_path / "lora")
    folder = as_pickle(tmp_path / "lora")
    (folder / "adapter_model.bin").write_bytes(content)
    with pytest.raises(CannotConvert, match=r"adapter_model\.bin"):
        convert_folder(folder, tmp_path / "out", Choices())


def test_a_pickle_of_something_else(tmp_path: Path) -> None:
    make_adapter(LLAMA, "lora", tmp_path / "lora")
    folder = as_pickle(tmp_path / "lora")
    torch.save([torch.ones(2)], folder / "adapter_model.bin")
    with pytest.raises(CannotConvert, match="is not a table of tensors by name"):
        convert_folder(folder, tmp_path / "out", Choices())


def test_what_no_server_takes_is_not_written(tmp_path: Path) -> None:
    make_adapter(LLAMA, "lora", tmp_path / "lora")
    folder = as_pickle(tmp_path / "lora", layer_replication=[[0, 1]])
    with pytest.raises(CannotConvert, match=r"no server would take the result: .*layer_replication is set"):
        convert_folder(folder, tmp_path / "out", Choices())
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_an_unknown_folder(tmp_path: Path) -> None:
    with pytest.raises(CannotConvert, match="is no folder of a known library"):
        convert_folder(tmp_path, tmp_path / "out", Choices())


# The command


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["adapters", "convert", *arguments])
    return result.exit_code, " ".join(result.output.split())


def test_the_command_says_what_it_did_and_what_comes_next(tmp_path: Path) -> None:
    source = str(save_as_pyreft(tmp_path / "reft", "loreft", random_layers("loreft", 0, 1)))
    target = str(tmp_path / "out")
    status, text = run(source, target, "--first", "2", "--last", "3")
    assert status == 0
    assert text.startswith(f"converted to LoReFT: {target} pyreft's loreft at the layers 0, 1.")
    assert text.endswith(f"upload it: heddle adapters push {target}")
    status, text = run(source, target, "--first", "2")
    assert status == 1
    assert "exists already, and nothing is ever overwritten; name a new folder." in text


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    source = str(save_as_pyreft(tmp_path / "reft", "loreft", random_layers("loreft", 0)))
    status, text = run(source, str(tmp_path / "out"))
    assert status == 1
    assert text.startswith("heddle: pyreft does not save which tokens it changes")
    assert run(str(tmp_path / "none"), str(tmp_path / "out"))[0] == 2
    assert run(source, str(tmp_path / "out"), "--first", "-1")[0] == 2
