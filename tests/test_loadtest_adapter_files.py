"""Made-up adapter files against PEFT itself: it must load every one of them, completely, and compute something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from heddle_loadtest.commands.adapters import adapters as adapters_command
from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.adapter_files import write_adapter_files
from heddle_loadtest.workload.spec import AdapterKind, Adapters
from tiny_models import save_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # raised by PEFT

LORA = AdapterKind(method="lora", rank=4)
RSLORA = AdapterKind(method="rslora", rank=8)
IA3 = AdapterKind(method="ia3")
PROMPT = torch.tensor([[5, 9, 13, 17]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("llama"), "llama")


def saved(folder: Path, family: str, **overrides: Any) -> Path:
    save_tiny_model(folder, family, **overrides)
    return folder


def loaded(base: Path, adapter: Path) -> Any:
    """The base with the adapter; a key that is missing or left over is a warning of PEFT's, and so an error."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)


def assert_is_complete(model: Any, adapter: Path) -> None:
    """Every adapter weight of the model comes from the file, every tensor of the file is in the model."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    held = {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name or ".ia3_" in name
    }
    assert held.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(held[name].detach(), tensor.float()), name
        assert tensor.count_nonzero() > 0, name


def assert_differs(model: Any) -> None:
    with torch.no_grad():
        adapted = model(PROMPT).logits
        with model.disable_adapter():
            plain = model(PROMPT).logits
    assert (adapted - plain).abs().max() > 1e-4


@pytest.mark.parametrize("kind", [LORA, RSLORA, IA3], ids=lambda kind: kind.method)
def test_peft_loads_what_is_made(llama: Path, tmp_path: Path, kind: AdapterKind) -> None:
    write_adapter_files(Adapters(names=("mine",), kinds=(kind,)), llama, tmp_path)
    model = loaded(llama, tmp_path / "mine")
    assert_is_complete(model, tmp_path / "mine")
    assert_differs(model)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3", "gpt_neox", "gpt2", "starcoder2", "mixtral"])
def test_peft_loads_them_over_other_families(tmp_path: Path, family: str) -> None:
    base = saved(tmp_path / family, family)
    write_adapter_files(Adapters(names=("a", "b"), kinds=(LORA, IA3)), base, tmp_path / "adapters")
    for name in ("a", "b"):
        model = loaded(base, tmp_path / "adapters" / name)
        assert_is_complete(model, tmp_path / "adapters" / name)
        assert_differs(model)


def test_kinds_take_turns_with_their_ranks(llama: Path, tmp_path: Path) -> None:
    adapters = Adapters(count=5, name="{method}-r{rank}-{index}", kinds=(LORA, RSLORA))
    written: list[str] = []
    write_adapter_files(adapters, llama, tmp_path, on_written=lambda path: written.append(path.name))
    assert written == ["lora-r4-0", "rslora-r8-1", "lora-r4-2", "rslora-r8-3", "lora-r4-4"]
    for name in written:
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        rank = int(name.split("-")[1].removeprefix("r"))
        assert config["r"] == rank
        assert config["use_rslora"] == name.startswith("rslora")
        assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {rank}
        assert all(tensor.abs().max() <= 0.0201 for tensor in tensors.values())
        assert len(tensors) == 2 * 7 * 3  # A and B, linears of a layer, layers


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ("all", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("qkv", {"q_proj", "k_proj", "v_proj"}),
        ("o_proj, up_proj", {"o_proj", "up_proj"}),
    ],
)
def test_modules(llama: Path, tmp_path: Path, modules: str, expected: set[str]) -> None:
    write_adapter_files(Adapters(names=("a",), kinds=(AdapterKind(modules=modules),)), llama, tmp_path)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == expected
    assert_is_complete(loaded(llama, tmp_path / "a"), tmp_path / "a")


def test_ia3_is_on_keys_values_and_the_way_into_the_down_projection(llama: Path, tmp_path: Path) -> None:
    write_adapter_files(Adapters(names=("a",), kinds=(IA3,)), llama, tmp_path)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "k_proj", "v_proj"]
    assert config["feedforward_modules"] == ["down_proj"]


def test_a_base_in_several_files(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "whole", "llama")
    model.save_pretrained(tmp_path / "parts", max_shard_size="60KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    for base in ("whole", "parts"):
        write_adapter_files(Adapters(names=("a",)), tmp_path / base, tmp_path / f"of-{base}")
    whole, parts = (
        load_file(tmp_path / f"of-{base}" / "a" / "adapter_model.safetensors") for base in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_seed_and_the_index_decide_the_weights(llama: Path, tmp_path: Path) -> None:
    for folder, seed in (("one", 1), ("again", 1), ("two", 2)):
        write_adapter_files(Adapters(names=("a", "b")), llama, tmp_path / folder, seed)
    one, again, two = (tmp_path / folder / "a" / "adapter_model.safetensors" for folder in ("one", "again", "two"))
    other = tmp_path / "one" / "b" / "adapter_model.safetensors"
    assert one.read_bytes() == again.read_bytes()
    assert one.read_bytes() != two.read_bytes()
    assert one.read_bytes() != other.read_bytes()


def test_no_two_rows_of_a_weight_are_alike(llama: Path, tmp_path: Path) -> None:
    write_adapter_files(Adapters(names=("a",), kinds=(AdapterKind(rank=64),)), llama, tmp_path)
    for tensor in load_file(tmp_path / "a" / "adapter_model.safetensors").values():
        assert len(set(map(tuple, tensor.tolist()))) == len(tensor)


def test_the_base_itself_needs_no_files(llama: Path, tmp_path: Path) -> None:
    write_adapter_files(Adapters(names=("base", "mine")), llama, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "with space", "x" * 97, "ümlaut"])
def test_unsafe_names_are_refused_before_anything_is_written(llama: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match="no safe folder name"):
        write_adapter_files(Adapters(names=("good", name)), llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (AdapterKind(method="dora"), "method 'dora'.*lora, rslora, ia3"),
        (AdapterKind(modules="q_proj,w_pack"), "modules 'q_proj,w_pack'.*some of down_proj, gate_proj"),
    ],
)
def test_what_the_base_lacks_is_refused(llama: Path, tmp_path: Path, kind: AdapterKind, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        write_adapter_files(Adapters(names=("a",), kinds=(kind,)), llama, tmp_path)


def test_folders_that_are_no_base(tmp_path: Path) -> None:
    adapters = Adapters(names=("a",))
    with pytest.raises(SpecError, match=r"config\.json cannot be read"):
        write_adapter_files(adapters, tmp_path / "nowhere", tmp_path / "out")
    for fields, message in (
        ("{", "is not JSON"),
        ("[]", "no JSON object"),
        ('{"model_type": "llama"}', r"model\.safetensors cannot be read"),
        ('{"quantization_config": {}}', "quantised"),
    ):
        (tmp_path / "config.json").write_text(fields)
        with pytest.raises(SpecError, match=message):
            write_adapter_files(adapters, tmp_path, tmp_path / "out")
    with pytest.raises(SpecError, match=r"adapters\.listed"):
        write_adapter_files(Adapters(listed=True), saved(tmp_path / "base", "llama"), tmp_path / "out")


def test_the_command_makes_a_workloads_adapters_and_its_tenants(llama: Path, tmp_path: Path) -> None:
    spec = tmp_path / "mine.yaml"
    spec.write_text(
        """
        name: mine
        requests: 4
        arrivals: {kind: closed, streams: 1}
        adapters: {count: 3, kinds: [{rank: 2}, {method: ia3}]}
        tenants:
          gold: {adapters: {names: [base, golden]}}
          tin: {}
        """
    )
    out = tmp_path / "out"
    result = run_command(str(spec), "--base", str(llama), "--out", str(out), "--set", "adapters.count=2")
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["adapter-00000", "adapter-00001", "golden"]
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "adapters": 3,
        "size_bytes": sum(path.stat().st_size for path in out.glob("*/*")),
        "folder": str(out),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "nowhere"], "error: --base 'nowhere': config.json cannot be read"),
        (["--base", "nowhere", "--seed", "-1"], "error: --seed '-1': is below 0"),
        (["--base", "nowhere", "--set", "adapters={names: [base]}"], "error: adapters: asks for none but the base"),
    ],
)
def test_the_command_refuses_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        "{name: mine, requests: 1, arrivals: {kind: closed, streams: 1}, adapters: {names: [a]}}"
    )
    result = run_command("mine.yaml", "--out", "out", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def run_command(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(adapters_command)
    return CliRunner().invoke(app, list(arguments))
