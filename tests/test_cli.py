"""The `heddle` command: quick help, clear refusals, and a server that says what it does."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from byte_tokenizer import save_tokenizer
from heddle_server.api.serving import access_line
from heddle_server.cli import COMMANDS, app
from heddle_server.config import EngineConfig
from heddle_server.options import ServeOptions
from live_server import SCRIPTED_ENGINE, server_config, wait_until
from scripted_engine import NEVER_ENDS
from test_registry import write_adapter

RUN = "import sys; sys.path[:0] = {paths!r};"
PATHS = [path for path in sys.path if path]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = save_tokenizer(tmp_path / "my-model")
    (folder / "config.json").write_text("{}")
    return folder


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN.format(paths=PATHS) + "\n" + code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_api_process_never_imports_torch() -> None:
    code = (
        "import heddle_server.api.serving, heddle_server.cli; "
        "print([name for name in ('torch', 'transformers', 'triton', 'heddle_kernels') if name in sys.modules])"
    )
    output, errors = python(code).communicate(timeout=60)
    assert output.strip() == "[]", errors


def test_help_is_quick() -> None:
    """Best of several: the machine may be busy with something else."""
    code = "import time; start = time.process_time(); from heddle_server.cli import app; "
    code += "app(['--help'], standalone_mode=False); "
    code += "import sys; print(time.process_time() - start, sorted({HEAVY} & set(sys.modules)), file=sys.stderr)"
    heavy = {"pydantic", "rich", "numpy", "msgspec", "fastapi", "http.client", "aiohttp", "importlib.metadata"}
    runs = [python(code.replace("{HEAVY}", repr(heavy))).communicate(timeout=60) for _ in range(3)]
    for shown, _ in runs:
        assert all(name in shown for name in COMMANDS)
    assert {errors.split(maxsplit=1)[1].strip() for _, errors in runs} == {"[]"}
    assert min(float(errors.split()[0]) for _, errors in runs) < 0.3


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_what_the_list_says_of_it(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert COMMANDS[name][1] in " ".join(result.stdout.split())


def test_the_page_of_commands_has_them_all() -> None:
    page = (Path(__file__).parent.parent / "docs" / "commands.md").read_text()
    assert [name for name in COMMANDS if f"`heddle {name}" not in page] == []


def test_commands_of_commands() -> None:
    assert CliRunner().invoke(app, ["adapters", "push", "--help"]).exit_code == 0


def test_a_mistyped_command_is_met_with_the_nearest() -> None:
    result = CliRunner().invoke(app, ["estimat"])
    assert result.exit_code == 2
    assert "Did you mean 'estimate'?" in result.stderr


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output.startswith("heddle ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/folder"], "is no directory"),
        (["--pool-bytes", "1GiB", "--memory-fraction", "0.5"], "both size the page pool"),
        (["--max-model-len", "1"], "--max-model-len is 1"),
        (["--memory-fraction", "2"], "--memory-fraction is 2; it must be a number, more than 0 and at most 1."),
        (["--dtype", "float8"], "--dtype is float8; it must be one of auto, bfloat16, float16, float32."),
        (["--adapters", "/no/such/folder"], "--adapters is /no/such/folder, which is no folder"),
    ],
)
def test_settings_that_cannot_be_served_exit_with_2(model: Path, arguments: list[str], message: str) -> None:
    if arguments[0].startswith("--"):
        arguments = [str(model), *arguments]
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_of_adapters_is_not_an_adapter(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "sql")
    result = CliRunner().invoke(app, ["serve", str(model), "--adapters", str(adapter)])
    assert (result.exit_code, "is itself an adapter" in result.stderr) == (2, True)


def test_a_folder_without_a_tokenizer_exits_with_2(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    arguments = ["serve", str(tmp_path), "--port", "0", "--store", str(tmp_path / "store")]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, "no tokenizer.json" in result.stderr) == (2, True)


def test_a_port_in_use_exits_with_1(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", str(model), "--port", port, "--store", str(tmp_path / "store")])
    assert (result.exit_code, f"port {port} is in use" in result.stderr) == (1, True)


def test_options_become_the_config(model: Path, tmp_path: Path) -> None:
    options = ServeOptions(store=tmp_path, dtype="float32", max_model_len=128, port=0, adapters=tmp_path)
    config = options.config(str(model))
    assert config.engine == EngineConfig(
        model_path=str(model), model_name="my-model", store_path=str(tmp_path), dtype="float32", max_model_len=128
    )
    assert (config.store_path, config.host, config.port) == (tmp_path, "127.0.0.1", 0)
    assert config.adapters_path == tmp_path


def serve_scripted(
    model: Path,
    tmp_path: Path,
    name: str = "scripted",
    companion: str = "None",
    shutdown_seconds: float = 10,
    more: str = "",
) -> subprocess.Popen[str]:
    """What `heddle serve` does, in a process of its own, in front of the scripted engine."""
    code = f"""
from pathlib import Path
import typer
from heddle_server.options import ServeOptions
from heddle_server.api import serving
from heddle_server.api.serving import serve

serving.SHUTDOWN_SECONDS = {shutdown_seconds}

async def waits(address):
    import asyncio
    print("beside", address, flush=True)
    await asyncio.sleep(60)

async def answers(address):
    print("beside", address, flush=True)
    return 7

def command():
    options = ServeOptions(model_name={name!r}, port=0, store=Path({str(tmp_path / "store")!r}), {more})
    serve(options.config({str(model)!r}), engine_command={SCRIPTED_ENGINE!r}, companion={companion})

typer.run(command)
"""
    return python(code)


@pytest.mark.parametrize(
    ("has_keys", "allow_anonymous", "says"),
    [
        (False, False, "only this machine can use this server"),
        (False, True, "whoever reaches this server can use it"),
        (True, False, "every request needs one"),
        (True, True, "every request needs one"),
    ],
)
def test_the_line_that_says_who_may_use_a_server(
    has_keys: bool, allow_anonymous: bool, says: str, tmp_path: Path
) -> None:
    assert says in access_line(server_config(tmp_path, allow_anonymous=allow_anonymous), has_keys)


def test_serve_says_what_it_does_and_stops_on_sigterm(model: Path, tmp_path: Path) -> None:
    server = serve_scripted(model, tmp_path)
    assert server.stdout is not None
    lines: list[str] = []
    while not lines or not lines[-1].startswith("try: curl"):
        lines.append(server.stdout.readline())
        assert lines[-1], server.communicate()
    text = "".join(lines)
    assert "weights" in text
    assert (
        "memory: base 3.0 MiB (2.0 MiB in nf4, 1.0 MiB in float32), pool 32 KiB = 128 tokens or 8 adapters r16" in text
    )
    assert "no API keys: only this machine can use this server" in text
    address = next(line.split()[-1] for line in lines if line.startswith("heddle is ready at"))
    assert f"playground: {address}/\n" in lines
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 200
    shown = json.loads(lines[-1].split("-d '")[1].rstrip().rstrip("'"))
    assert httpx.post(f"{address}/v1/chat/completions", json=shown).status_code == 200
    server.send_signal(signal.SIGTERM)
    started = time.monotonic()
    _, errors = server.communicate(timeout=20)
    assert time.monotonic() - started < 5
    assert server.returncode == 0
    assert "Traceback" not in errors


def test_serve_registers_a_folder_of_adapters_before_it_is_ready(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    for name in ("chat", "team/sql"):
        write_adapter(folder / name)
    write_adapter(folder / "bad name")
    server = serve_scripted(model, tmp_path, more=f"adapters=Path({str(folder)!r})")
    assert server.stdout is not None
    lines: list[str] = []
    while not lines or not lines[-1].startswith("heddle is ready at"):
        lines.append(server.stdout.readline())
        assert lines[-1], server.communicate()
    start = lines.index(f"adapters: 2 registered from {folder}, 1 refused:\n")
    assert lines[start + 1].startswith("  bad name: The adapter name 'bad name' is not allowed")
    models = httpx.get(f"{lines[-1].split()[-1]}/v1/models").json()["data"]
    assert [each["id"] for each in models] == ["scripted", "chat", "team/sql"]
    server.terminate()
    server.communicate(timeout=20)


def test_an_engine_that_refuses_ends_the_server_with_1(model: Path, tmp_path: Path) -> None:
    server = serve_scripted(model, tmp_path, name="refuses")
    output, errors = server.communicate(timeout=30)
    assert server.returncode == 1, output
    assert "heddle: These weights cannot be served." in errors
    assert "Traceback" not in errors


def test_a_companion_runs_beside_the_server_and_ends_it(model: Path, tmp_path: Path) -> None:
    server = serve_scripted(model, tmp_path, companion="answers")
    output, errors = server.communicate(timeout=30)
    assert server.returncode == 7, errors
    assert "beside http://127.0.0.1:" in output


def test_stopping_ends_requests_in_flight_with_an_error_that_clients_see(model: Path, tmp_path: Path) -> None:
    server = serve_scripted(model, tmp_path, shutdown_seconds=0.5)
    assert server.stdout is not None
    while not (line := server.stdout.readline()).startswith("heddle is ready at"):
        assert line
    body = {"prompt": "Hi", "max_tokens": 8, "seed": NEVER_ENDS, "stream": True}
    with httpx.stream("POST", f"{line.split()[-1]}/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        server.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert '"error"' in rest[-2]
    assert rest[-1] == "data: [DONE]"
    output, errors = server.communicate(timeout=20)
    assert "finishing 1 request," in output
    assert server.returncode == 0
    assert "Traceback" not in errors


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopping_dismisses_the_companion_in_silence(model: Path, tmp_path: Path, stop: signal.Signals) -> None:
    server = serve_scripted(model, tmp_path, companion="waits")
    assert server.stdout is not None
    while not (line := server.stdout.readline()).startswith("beside"):
        assert line
    server.send_signal(stop)
    _, errors = server.communicate(timeout=20)
    assert server.returncode == 0
    assert "Traceback" not in errors


@pytest.mark.parametrize("place", ["/proc/x", "{tmp}/file/store"])
def test_a_store_that_cannot_be_made_is_one_clear_line(model: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["serve", str(model), "--port", "0", "--store", place.format(tmp=tmp_path)])
    assert result.exit_code == 2
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "cannot be made" in result.output


def test_the_engine_goes_when_the_server_is_killed(model: Path, tmp_path: Path) -> None:
    server = serve_scripted(model, tmp_path)
    assert server.stdout is not None
    while "ready" not in server.stdout.readline():
        pass
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
    if not children.exists():
        pytest.skip("needs /proc")
    (engine,) = children.read_text().split()
    server.kill()
    server.communicate()
    wait_until(lambda: not Path(f"/proc/{engine}").exists())
