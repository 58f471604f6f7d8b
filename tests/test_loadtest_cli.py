"""`heddle-loadtest` as people and scripts run it: in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import heddle_loadtest
from fake_openai_server import FakeOpenAIServer

SOURCE_ROOT = Path(heddle_loadtest.__file__).parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "HEDDLE_API_KEY"} | {
    "PYTHONPATH": str(SOURCE_ROOT),
    "COLUMNS": "100",
    "PYTHONWARNINGS": "error",
}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeOpenAIServer]:
    with FakeOpenAIServer(("tiny", "poet", "overloaded", "stuck")) as server:
        yield server


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "heddle_loadtest", *options]


def loadtest(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*options), env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=60, check=False
    )


def last_line(stdout: str) -> Any:
    return json.loads(stdout.splitlines()[-1])


def test_run_prints_tables_and_then_one_json_line(server: FakeOpenAIServer) -> None:
    done = loadtest(
        "run", "--target", server.url, "--streams", "2", "--requests", "6", "--adapters", "base, poet",
        "--max-tokens", "4", "--prompt", "Why?", "--seed", "7",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    document = last_line(done.stdout)
    assert (document["total"]["num_ok"], document["total"]["num_output_tokens"]) == (6, 24)
    assert "adapters" not in document, "rows of single adapters would push the tables off the screen"
    assert document["repeats"][0]["seed"] == 7
    assert document["total"]["ttft_seconds"]["p50"] > 0.045
    assert "time to first token" in done.stdout
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "Why?"}]


def test_json_alone(server: FakeOpenAIServer) -> None:
    done = loadtest("run", "--target", server.url, "--duration", "200ms", "--max-tokens", "2", "--json-only")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    assert last_line(done.stdout)["total"]["num_ok"] > 0
    assert list(last_line(done.stdout)["adapters"]) == ["base"]


def test_exit_code_1_if_every_request_failed(server: FakeOpenAIServer) -> None:
    done = loadtest("run", "--target", server.url, "--requests", "2", "--adapters", "overloaded")
    assert done.returncode == 1
    assert last_line(done.stdout)["errors"] == {"adapter_capacity": 2}
    assert "all slots are taken" in done.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--target", "127.0.0.1:8000"], "--target '127.0.0.1:8000': is not an http address"),
        (["--target", "http://127.0.0.1:1"], "--target 'http://127.0.0.1:1': no answer from there"),
        (["--streams", "0"], "--streams '0': must be 1 or more"),
        (["--streams", "many"], "--streams"),
        (["--requests", "-1"], "--requests '-1': must be 1 or more"),
        (["--duration", "soon"], "--duration 'soon': is no duration. Write it as 500ms, 5s, 2m or 1h"),
        (["--duration", "0s"], "--duration '0.0': must be more than 0"),
        (["--max-tokens", "0"], "--max-tokens '0': must be 1 or more"),
        (["--adapters", "base,"], "--adapters 'base,': one is empty"),
        (["--adapters", "poets"], "--adapters 'poets': the target does not list it. It has: poet"),
        (["--model", "huge"], "--model 'huge': the target does not list it. It has: "),
        (["--style", "triton"], "--style"),
        (["--prompts-file", "none.txt"], "--prompts-file 'none.txt': No such file or directory"),
        (["--prompt", "a", "--prompts-file", "b"], "--prompts-file 'b': comes on top of --prompt"),
    ],
)
def test_exit_code_2_and_what_to_do(server: FakeOpenAIServer, options: list[str], expected: str) -> None:
    target = [] if "--target" in options else ["--target", server.url]
    done = loadtest("run", *target, *options, TERM="dumb")
    assert (done.returncode, done.stdout) == (2, "")
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_key_is_named_but_not_shown() -> None:
    with FakeOpenAIServer(api_key="right") as locked:
        done = loadtest("run", "--target", locked.url, HEDDLE_API_KEY="sk-wrong")
    assert done.returncode == 2
    assert "--api-key: " in done.stderr
    assert "sk-wrong" not in done.stdout + done.stderr


def test_interrupt_stops_and_still_reports(server: FakeOpenAIServer) -> None:
    num_bodies = len(server.bodies)
    options = ("run", "--target", server.url, "--duration", "1h", "--adapters", "base,stuck", "--warmup", "0")
    with subprocess.Popen(
        command(*options, "--max-tokens", "2"),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline_seconds = time.monotonic() + 30
        while len(server.bodies) - num_bodies < 10 and time.monotonic() < deadline_seconds:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert stderr == ""
    document = last_line(stdout)
    # 3: a machine too busy for figures to be the target's, which is not what this is about.
    assert process.returncode == (0 if document["is_valid"] else 3)
    assert document["was_interrupted"] is True
    assert document["total"]["num_ok"] >= 1
    assert document["total"]["num_failed"] == 0
    assert "(interrupted)" in stdout


def test_help_needs_no_heavy_import() -> None:
    code = "import sys, heddle_loadtest.cli; print(sorted({'aiohttp', 'rich', 'numpy', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "--adapters" in loadtest("run", "--help").stdout


def test_package_imports_nothing_of_heddles_other_packages() -> None:
    for path in (SOURCE_ROOT / "heddle_loadtest").rglob("*.py"):
        if path.parent.name == "baseline":
            continue  # which has torch, and PEFT
        source = path.read_text(encoding="utf-8")
        for other in ("heddle_server", "heddle_kernels", "heddle_adapters", "heddle_demo", "torch"):
            assert f"import {other}" not in source
            assert f"from {other}" not in source
