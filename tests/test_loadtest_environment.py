"""What a folder says of where it was made, and what it must not say."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import msgspec
import pytest

from heddle_loadtest.report import machine
from heddle_loadtest.report.environment import describe_environment

ARGUMENTS = ("/opt/somewhere/bin/heddle-loadtest", "run", "smoke", "--seed", "3")


def describe(arguments: tuple[str, ...] = ARGUMENTS, target: str = "http://127.0.0.1:8000") -> str:
    return json.dumps(describe_environment(target=target, style="heddle", model="tiny", arguments=arguments))


def test_says_what_ran_where() -> None:
    document = json.loads(describe())
    assert document["command"] == "heddle-loadtest run smoke --seed 3"
    assert document["target"]["url"] == "http://127.0.0.1:8000"
    assert (document["target"]["style"], document["target"]["model"]) == ("heddle", "tiny")
    assert document["python"] == platform.python_version()
    assert document["packages"]["msgspec"] == version("msgspec")
    assert document["machine"]["num_cores"] == os.cpu_count()
    now = datetime.now(UTC)
    assert now - timedelta(minutes=1) < datetime.fromisoformat(document["date"]) <= now


def test_memory_is_the_kernels() -> None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        pytest.skip("no /proc/meminfo here")
    kibibytes = int(meminfo.read_text().split("MemTotal:")[1].split()[0])
    assert json.loads(describe())["machine"]["memory_bytes"] == kibibytes * 1024


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--api-key", "sk-secret"),
        ("run", "--api-key=sk-secret", "smoke"),
        ("run", "--target", "https://me:sk-secret@host/v1"),
        ("run", "--target=https://sk-secret@host/v1"),
        ("run", "--admin-token", "sk-secret", "--seed", "1"),
    ],
)
def test_tells_no_key(arguments: tuple[str, ...]) -> None:
    printed = describe(("heddle-loadtest", *arguments), target="https://me:sk-secret@host/v1")
    assert "sk-secret" not in printed
    assert "run" in printed


def test_what_only_sounds_like_a_key_stays() -> None:
    command = json.loads(describe(("heddle-loadtest", "run", "--api-key", "--x", "--max-tokens", "7")))["command"]
    assert command == "heddle-loadtest run --api-key *** --max-tokens 7"


def test_tells_no_host_and_no_path_of_the_program() -> None:
    printed = describe()
    assert "/opt/somewhere" not in printed
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in printed


def test_lists_the_head_of_what_the_target_has() -> None:
    names = [f"adapter-{index}" for index in range(2000)]
    document = describe_environment(target="http://x", style="vllm", model=None, arguments=("x",), listed=names)
    assert (document["target"]["listed"], document["target"]["num_listed"]) == (names[:20], 2000)


def test_revision_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracked file has the checkout's revision; one in a virtual environment inside a checkout has none."""
    file = tmp_path / "machine.py"
    file.write_text("x = 1\n")
    monkeypatch.setattr(machine, "__file__", str(file))
    assert json.loads(describe())["git_revision"] is None
    identity = ("-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "commit.gpgsign=false")
    for arguments in (("init", "-q"), ("add", "-f", "machine.py"), (*identity, "commit", "-q", "-m", "x")):
        subprocess.run(("git", "-C", tmp_path, *arguments), check=True)
    asking = ("git", "-C", tmp_path, "rev-parse", "--short=12", "HEAD")
    head = subprocess.run(asking, check=True, capture_output=True, text=True)
    assert json.loads(describe())["git_revision"] == head.stdout.strip()
    file.write_text("x = 2\n")
    assert json.loads(describe())["git_revision"] == f"{head.stdout.strip()}+"
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "untracked.py"))
    assert json.loads(describe())["git_revision"] is None


def test_bytes_that_are_no_text_do_not_stop_a_run() -> None:
    document = describe_environment(
        target="http://x", style="heddle", model="\ud800", arguments=("run", "caf\udce9"), listed=["\ud800"]
    )
    assert msgspec.json.decode(msgspec.json.encode(document)) == document
    assert msgspec.json.encode(document["command"]) == b'"run caf\\\\udce9"'
