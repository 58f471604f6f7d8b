"""`heddle adapters combine`: folders in, one adapter out, and one line for what goes wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

import scripted_engine
from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.tensor_file import WEIGHTS_FILE
from heddle_server.cli import app
from heddle_server.commands.combine import parse_part
from live_server import live_server, server_config
from test_registry import write_adapter

Q = scripted_engine.SITE.path


def combine(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["adapters", "combine", *map(str, arguments)])


def said(result: Result) -> str:
    """What it printed of an error, without the frame that some errors have."""
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture
def sql(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "sql")


@pytest.fixture
def scales(tmp_path: Path) -> Path:
    """An IA3."""
    folder = tmp_path / "IA3 scales"
    folder.mkdir()
    config = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    save_file({f"base_model.model.{Q}.ia3_l": np.full((8, 1), 2, np.float32)}, folder / WEIGHTS_FILE)
    return folder


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with live_server(server_config(tmp_path_factory.mktemp("server"))) as client:
        yield client


def test_two_methods_become_one_adapter_that_a_server_takes(
    client: httpx.Client, sql: Path, scales: Path, tmp_path: Path
) -> None:
    out = tmp_path / "both"
    result = combine(sql, scales, "--out", out, "--gate", "sql=-0.5")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"{out} has LoRA + IA3, 3 tensors\nupload it: heddle adapters push {out}\n" == result.stdout
    parts = json.loads((out / CONFIG_FILE).read_text())["parts"]
    assert [(part["name"], part["gate"]) for part in parts] == [("sql", -0.5), ("ia3-scales", 1.0)]
    environment = {"HEDDLE_SERVER": str(client.base_url)}
    pushed = CliRunner().invoke(app, ["adapters", "push", str(out)], env=environment)
    assert "pushed both@1: LoRA + IA3, rank 2 at 1 module" in pushed.stdout
    card = client.get("/v1/adapters/both").json()
    assert (card["method"], card["sites"]) == ("LoRA + IA3", {"model.layers.*.self_attn.q_proj": 1})


def test_folders_of_one_name_can_be_told_apart(sql: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "later" / "sql", 2.0)
    twice = combine(sql, other, "--out", tmp_path / "both")
    assert (twice.exit_code, twice.stdout) == (2, "")
    assert twice.stderr.count("\n") == 1
    assert "2 parts named 'sql'; give every part a name of its own" in twice.stderr
    result = combine(sql, f"later={other}", "--out", tmp_path / "both", "--gate", "later=2")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("text", "name", "folder"),
    [
        ("runs/SQL v2.1", "sql-v2-1", "runs/SQL v2.1"),
        ("one=runs/sql", "one", "runs/sql"),
        ("one=a=b", "one", "a=b"),
        ("runs/lr=0.1", "lr-0-1", "runs/lr=0.1"),
        (".hidden", "hidden", ".hidden"),
        ("x" * 40, "x" * 32, "x" * 40),
    ],
)
def test_what_a_part_is_called(text: str, name: str, folder: str) -> None:
    assert parse_part(text) == (name, Path(folder))


def test_a_folder_with_an_equals_sign_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=0.1").mkdir()
    assert parse_part("lr=0.1") == ("lr-0-1", Path("lr=0.1"))


def test_what_cannot_be_combined(sql: Path, scales: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    unknown = tmp_path / "unknown"
    shutil.copytree(sql, unknown)
    (unknown / CONFIG_FILE).write_text('{"peft_type": "UNHEARD"}')
    cases: list[tuple[tuple[object, ...], str]] = [
        ((sql, "--gate", "sql"), "write a part's name and a number"),
        ((sql, "--gate", "sql=lots"), "write a part's name and a number"),
        ((sql, "--gate", "other=1"), "--gate names other, and the parts are sql"),
        ((sql, "--gate", "sql=inf"), "write a part's name and a number"),
        ((sql, "--gate", "sql=1e9"), "at most 10000"),
        ((sql, scales, "--gate", "ia3-scales=2"), "IA3 does more than add"),
        ((unknown,), "In part 'unknown': adapter_config.json: peft_type is 'UNHEARD'"),
        ((f"NO={sql}",), "has the name 'NO'"),
        ((tmp_path / "gone",), "has no adapter_config.json; give the folder that PEFT's save_pretrained wrote"),
    ]
    for arguments, message in cases:
        result = combine(*arguments, "--out", out)
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        assert message in said(result)
        assert not out.exists()


def test_nothing_is_overwritten(sql: Path, tmp_path: Path) -> None:
    result = combine(sql, "--out", sql)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "exists already; give a new folder" in said(result)
