"""`heddle-loadtest baseline` as a process: it says when it listens, stops on a signal, and tells what is wrong."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from byte_tokenizer import byte_tokenizer
from heddle_demo.data import ADAPTERS_DIR, BASE_DIR
from heddle_loadtest.baseline.settings import BaselineKind
from heddle_loadtest.baseline.token_text import REPLACEMENT, TokenText
from heddle_loadtest.commands.baseline import baseline

PROGRAM = f"""
import sys
sys.path[:0] = {[path for path in sys.path if path]!r}
import typer
from heddle_loadtest.commands.baseline import baseline
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(baseline)
app()
"""


def lora_folder(folder: Path) -> Path:
    for name in ("json", "pirate"):
        (folder / name).symlink_to(ADAPTERS_DIR / name)
    return folder


@pytest.mark.parametrize(
    ("kind", "stop"),
    [(BaselineKind.PEFT_MIXED, signal.SIGTERM), (BaselineKind.TRANSFORMERS_CB_GROUPED, signal.SIGINT)],
)
def test_it_serves_until_a_signal(kind: BaselineKind, stop: signal.Signals, tmp_path: Path) -> None:
    options = ("--adapters", str(lora_folder(tmp_path)), "--port", "0", "--device", "cpu", "--threads", "1")
    command = (sys.executable, "-c", PROGRAM, kind, str(BASE_DIR), *options, "--max-batch", "4")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.fullmatch(rf"baseline {kind} is ready at (http://127\.0\.0\.1:\d+)\n", line)
            assert match, line
            answer = ask(
                match[1], model="pirate", messages=[{"role": "user", "content": "What is the capital of France?"}]
            )
            assert answer["choices"][0]["message"]["content"].startswith("Arrr!")
            process.send_signal(stop)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


def ask(url: str, **body: Any) -> Any:
    request = urllib.request.Request(f"{url}/v1/chat/completions", data=json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def refusal(*arguments: str) -> str:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(baseline)
    finished = CliRunner().invoke(app, [*arguments])
    assert finished.exit_code == 2, finished.output
    return finished.stderr


def test_bad_settings_are_told_in_a_line(tmp_path: Path) -> None:
    base, adapters = str(BASE_DIR), ("--adapters", str(ADAPTERS_DIR))
    assert "no transformers model lies there" in refusal("peft-mixed", str(tmp_path), *adapters)
    assert "holds no adapter" in refusal("peft-mixed", base, "--adapters", str(tmp_path))
    assert "no such folder" in refusal("peft-mixed", base, "--adapters", str(tmp_path / "absent"))
    two_methods = tmp_path / "two"
    two_methods.mkdir()
    for name in ("capitals", "json"):
        (two_methods / name).symlink_to(ADAPTERS_DIR / name)
    told = refusal("peft-grouped", base, "--adapters", str(two_methods))
    assert "PEFT holds one method in a model" in told, "a LoRA and an IA3"
    assert "the base is called that" in refusal("peft-mixed", base, *adapters, "--model-name", "json")
    assert "--max-wait 'soon'" in refusal("peft-mixed", base, *adapters, "--max-wait", "soon")
    assert "--max-batch '0'" in refusal("peft-mixed", base, *adapters, "--max-batch", "0")


def test_an_adapter_for_another_base_is_named(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    for file in (ADAPTERS_DIR / "json").iterdir():
        (tmp_path / "json" / file.name).write_bytes(file.read_bytes())
    config_file = tmp_path / "json" / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"r": config["r"] * 2}))
    told = refusal("peft-mixed", str(BASE_DIR), "--adapters", str(tmp_path), "--quantization", "none")
    assert "PEFT cannot load it over this base" in told
    assert str(tmp_path / "json") in told


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heddle_loadtest.baseline.peft_runner.find_spec", lambda name: None)
    told = refusal("peft-mixed", str(BASE_DIR), "--adapters", str(ADAPTERS_DIR))
    assert "peft is not installed" in told
    assert "pip install 'heddle[baselines]'" in told


def test_help_brings_no_torch_in() -> None:
    script = PROGRAM.replace("\napp()", "\nsys.exit(any(name in sys.modules for name in ('torch', 'peft', 'aiohttp')))")
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


class ByteTokens:
    """transformers' `decode` over the byte tokenizer."""

    def decode(self, tokens: list[int], **options: bool) -> str:
        return byte_tokenizer().decode(tokens, skip_special_tokens=options["skip_special_tokens"])


def test_every_token_has_a_piece_and_the_pieces_make_the_text() -> None:
    written = "naïve €5 𝄞 ok"
    tokens = list(written.encode())
    text = TokenText(ByteTokens())
    pieces = [text.piece(token) for token in (*tokens, 256, 256, *b"end")]
    assert all(pieces)
    assert "".join(pieces).replace(REPLACEMENT, "") == written + "end"
    assert pieces[2:4] == [REPLACEMENT, "ï"]


def test_bytes_that_make_no_character_are_not_held_back_for_ever() -> None:
    text = TokenText(ByteTokens())
    assert all(text.piece(token) for token in (*[0xFF] * 50, *[256] * 50))
    assert text.piece(ord("a")) == "a"
    assert len(text._pending) < 20


def test_without_a_tokenizer_a_piece_is_the_token_s_number() -> None:
    text = TokenText(None)
    assert [text.piece(token) for token in (7, 0, 7)] == ["7 ", "0 ", "7 "]
