"""`heddle doctor`: what it finds on this machine, and what it says of one that is not fit."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from heddle_kernels import dispatch
from heddle_kernels.reference import ReferenceOps
from heddle_server.cli import app
from heddle_server.doctor import machine
from heddle_server.doctor.check import Check
from heddle_server.doctor.numerics import LIMITS, check_operations
from heddle_server.options import ServeOptions
from live_server import live_server, server_config
from test_dispatch import absent

CPU = torch.device("cpu")


class Broken(ReferenceOps):
    """Computes all but what the test is about."""

    name = "broken"
    part: str

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part

    def expand_add(self, y: Tensor, *others: Any) -> None:
        if self.part != "rows":
            super().expand_add(y, *others)

    def paged_attention(self, query: Tensor, *others: Any, **options: Any) -> Tensor:
        if self.part == "crash":
            raise RuntimeError("no kernel image is available")
        output = super().paged_attention(query, *others, **options)
        return output * torch.nan if self.part == "attention" else output

    def nf4_linear(self, packed: Tensor, state: Any, bias: Tensor | None, dtype: torch.dtype) -> Any:
        return lambda x: torch.ones(len(x), 256)


def findings(ops: Any, dtype: torch.dtype) -> dict[str, Check]:
    return {check.name: check for check in check_operations(ops, CPU, dtype)}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_the_kernels_of_this_machine_compute_what_plain_torch_does(dtype: torch.dtype) -> None:
    found = findings(dispatch.select_kernels(CPU, dtype).ops, dtype)
    assert {check.status for check in found.values()} == {"ok"}, found
    assert "is allowed" in found["adapter rows"].found
    assert "is allowed" in found["attention"].found


@pytest.mark.parametrize(
    ("part", "name", "words"),
    [
        ("rows", "adapter rows", "off plain torch"),
        ("attention", "attention", "inf off plain torch"),
        ("crash", "attention", "RuntimeError: no kernel image is available"),
        ("product", "4-bit product", "off plain torch"),
    ],
)
def test_kernels_that_compute_something_else_fail(part: str, name: str, words: str) -> None:
    check = findings(Broken(part), torch.bfloat16)[name]
    assert check.status == "FAIL"
    assert words in check.found
    assert "--kernels reference" in check.remedy


def test_without_numba_it_says_what_that_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "find_spec", absent("numba"))
    kernels, check = machine.choose_kernels(CPU, torch.bfloat16, "auto")
    assert kernels is not None
    assert (kernels.name, check.status) == ("reference", "warn")
    assert "numba is not installed" in check.found


def test_kernels_that_cannot_run_here_fail() -> None:
    kernels, check = machine.choose_kernels(CPU, torch.bfloat16, "none-such")
    assert (kernels, check.status) == (None, "FAIL")
    assert "does not exist" in check.found


def test_a_store_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert machine.check_store(tmp_path / "file" / "store").status == "FAIL"
    check = machine.check_store(tmp_path / "new" / "store")
    assert check.status in ("ok", "warn")
    assert "will be made" in check.found
    assert not (tmp_path / "new").exists(), "looking changes nothing"


def test_little_disk_and_little_memory_are_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LITTLE_DISK_BYTES", 1 << 60)
    monkeypatch.setattr(machine, "LITTLE_MEMORY_BYTES", 1 << 60)
    assert machine.check_store(tmp_path).status == "warn"
    assert {check.status for check in machine.check_memory(CPU)} == {"warn"}


def test_a_port_is_free_or_taken_by_whom(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        taken.settimeout(0.0)
        check = machine.check_port(ServeOptions(port=port))
        assert (check.status, "not by a heddle server" in check.found) == ("FAIL", True)
    assert machine.check_port(ServeOptions(port=port)).status == "ok"
    with live_server(server_config(tmp_path)) as client:
        check = machine.check_port(ServeOptions(port=client.base_url.port or 0))
        assert (check.status, "by a server that is alive" in check.found) == ("warn", True)
    check = machine.check_port(ServeOptions(host="203.0.113.1"))
    assert (check.status, "203.0.113.1:8000" in check.found) == ("FAIL", True)


def test_the_model_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "HF_HUB_CACHE", str(tmp_path))
    assert machine.check_model_cache().status == "warn"
    (tmp_path / "models--Qwen--Qwen2.5-0.5B-Instruct").mkdir()
    check = machine.check_model_cache()
    assert (check.status, "has 1: Qwen/Qwen2.5-0.5B-Instruct" in check.found) == ("ok", True)


def test_the_command(tmp_path: Path) -> None:
    options = ["doctor", "--store", str(tmp_path), "--port", "0", "--device", "cpu"]
    shown = CliRunner().invoke(app, options)
    assert shown.exit_code == 0, shown.output
    for name in ("device", "torch", "numba", "kernels", "adapter rows", "attention", "memory", "store", "port"):
        assert any(line[5:].startswith(name) for line in shown.stdout.splitlines()), name
    told = CliRunner().invoke(app, [*options, "--json"])
    checks = json.loads(told.stdout)
    assert {"name", "status", "found", "remedy"} == set(checks[0])
    assert len(checks) == sum(line[:5].strip() in ("ok", "warn") for line in shown.stdout.splitlines())


def test_a_failure_is_the_commands_status(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    options = ["doctor", "--store", str(tmp_path / "file"), "--port", "0", "--kernels", "reference", "--json"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 1
    failed = [check for check in json.loads(result.stdout) if check["status"] == "FAIL"]
    assert [check["name"] for check in failed] == ["store"]
    assert failed[0]["remedy"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there_fails(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--device", "cuda", "--store", str(tmp_path), "--port", "0", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)[0]["name"] == "device"
