"""`heddle adapters` against a real server: what it does there, and what it says."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import typer
from typer.testing import CliRunner, Result

import scripted_engine
from heddle_server.adapter_text import print_card
from heddle_server.adapters_cli import parse_duration
from heddle_server.adapters_client import AdaptersClient
from heddle_server.cli import app
from heddle_server.server_address import printable
from live_server import live_server, server_config
from tenant_keys import make_key
from test_http_api import CHAT, HELLO
from test_registry import write_adapter


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with live_server(server_config(tmp_path_factory.mktemp("server"), max_upload_bytes=1 << 20)) as client:
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter as save_pretrained leaves it."""
    folder = write_adapter(tmp_path / "sql")
    (folder / "README.md").write_text("PEFT writes one; it is not sent.")
    return folder


@pytest.fixture
def heddle(client: httpx.Client) -> Iterator[Heddle]:
    """The command, and a server without adapters once the test is over."""
    yield Heddle(str(client.base_url))
    for card in client.get("/v1/adapters").json()["data"]:
        client.delete(f"/v1/adapters/{card['name']}")


class Heddle:
    """Runs `heddle adapters ...` against one server."""

    def __init__(self, server: str) -> None:
        self.environment = {"HEDDLE_SERVER": server}

    def run(self, *arguments: str, answer: str | None = None) -> Result:
        return CliRunner().invoke(app, ["adapters", *arguments], env=self.environment, input=answer)

    def __call__(self, *arguments: str, answer: str | None = None) -> str:
        """What a command that works prints."""
        result = self.run(*arguments, answer=answer)
        assert result.exit_code == 0, result.output
        assert "\x1b" not in result.output
        return result.stdout

    def json(self, *arguments: str) -> object:
        return json.loads(self(*arguments, "--json"))

    def refusal(self, *arguments: str) -> str:
        """The one line that a command which fails prints."""
        result = self.run(*arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        line, end = result.stderr.split("\n")
        assert line.startswith("heddle: ")
        assert end == ""
        return line


def test_push_ls_and_show(heddle: Heddle, folder: Path) -> None:
    assert heddle("ls").startswith("no adapters; upload one with")
    pushed = heddle("push", str(folder), "--tag", "a", "--tag", "b", "--description", "For [b]queries[/b]", "--pin")
    assert pushed.startswith("pushed sql@")
    assert "LoRA, rank 2 at 1 module, 376 B, takes 128 bytes of the page pool: 1 page" in pushed
    heddle("push", str(folder), "--name", "team/sql", "--alias", "prod", "--ttl", "7d")
    table = heddle("ls")
    assert [line.split()[0] for line in table.splitlines() if line.strip()][2:] == ["sql", "team/sql"]
    assert "pinned" in table
    assert "a, b" in table
    cards = heddle.json("ls", "--tag", "a", "--pinned")
    assert isinstance(cards, list)
    assert [(card["name"], card["pinned"], card["tags"]) for card in cards] == [("sql", True, ["a", "b"])]
    for filters in (["-q", "team"], ["--not-pinned"], ["--status", "ready", "--method", "lora", "-q", "m/s"]):
        assert "team/sql" in heddle("ls", *filters)
        assert heddle("ls", *filters).count("LoRA") == 1
    shown = heddle("show", "team/sql@prod")
    assert "expires" in shown
    assert "sha256:" in shown
    assert "For [b]queries[/b]" in heddle("show", "sql")
    for line in (
        "sites        model.layers.*.self_attn.q_proj",
        "acts on      all tokens",
        "cost         128 bytes of the page pool: 1 page",
    ):
        assert line in shown.splitlines()
    (version,) = heddle.json("show", "sql")["versions"]  # type: ignore[index]
    assert version["object"] == "adapter.version"


def test_a_card_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    attention = {f"model.layers.*.self_attn.{name}": 24 for name in ("q_proj", "k_proj")}
    card = {
        "name": "both",
        "version": 1,
        "num_versions": 1,
        "description": "",
        "tags": [],
        "method": "LoRA + prefix tuning",
        "rank": 8,
        "combination": "alone",
        "sites": {**attention, "model.layers.*.mlp.down_proj": 24, "lm_head": 1, "keys and values of every layer": 1},
        "positions": "the first 4 and the last 4 tokens of the prompt",
        "num_virtual_tokens": 20,
        "size_bytes": 1 << 20,
        "pool_bytes_estimate": 86_016,
        "pool_pages": 3,
        "status": "ready",
        "reason": None,
        "tier": "disk",
        "created": 0,
        "owner": "local",
        "visibility": "private",
        "pinned": False,
        "expires": None,
        "aliases": {},
        "digest": "sha256:0",
    }
    print_card(card, [])
    assert capsys.readouterr().out.startswith(
        """\
name         both
version      1 of 1
method       LoRA + prefix tuning, rank 8
sites        model.layers.*.self_attn.{q_proj,k_proj}, 24 each
             model.layers.*.mlp.down_proj, 24
             lm_head
             keys and values of every layer
acts on      the first 4 and the last 4 tokens of the prompt
tokens       puts 20 tokens before every prompt
in a mix     cannot take part
file         1.0 MiB
cost         86,016 bytes of the page pool: 3 pages
is           ready, disk
"""
    )


def test_a_dry_run_tells_and_stores_nothing(heddle: Heddle, folder: Path) -> None:
    said = heddle("push", str(folder), "--dry-run")
    assert "sql would be taken: LoRA, rank 2" in said
    assert "takes 128 bytes of the page pool: 1 page (12.50% of it)" in said
    assert "a new adapter" in said
    assert heddle.json("ls") == []
    heddle("push", str(folder), "--name", "other")
    assert "stored as other@" in heddle("push", str(folder), "--dry-run")
    assert "no new version" in heddle("push", str(folder), "--name", "other", "--dry-run")
    report = heddle.json("push", str(folder), "--dry-run")
    assert isinstance(report, dict)
    assert report["object"] == "adapter.validation"


def test_an_alias_moves_and_comes_back(heddle: Heddle, folder: Path, tmp_path: Path) -> None:
    versions = []
    for number in (1, 2):
        source = write_adapter(tmp_path / f"v{number}", float(number))
        card = heddle.json("push", str(source), "--name", "moving")
        assert isinstance(card, dict)
        versions.append(card["version"])
    old, new = versions
    assert f"moving@prod now means version {old}; it is new" in heddle("alias", "moving", "prod", str(old))
    moved = heddle("alias", "moving", "prod", "latest")
    assert f"now means version {new}" in moved
    back = moved.split("back: heddle adapters ")[1].split()
    assert f"now means version {old}" in heddle(*back)
    assert f"moving@prod is gone; it meant version {old}" in heddle("alias", "moving", "prod", "--remove")
    assert "has no version or alias 'prod'" in heddle.refusal("alias", "moving", "prod", "--remove")
    for arguments in (["alias", "moving", "prod"], ["alias", "moving", "prod", "1", "--remove"]):
        result = heddle.run(*arguments)
        assert (result.exit_code, "either a TARGET or --remove" in result.stderr) == (2, True)


def test_pin_and_unpin(heddle: Heddle, folder: Path, client: httpx.Client) -> None:
    heddle("push", str(folder))
    assert "stays on the device" in heddle("pin", "sql")
    assert client.get("/v1/adapters/sql").json()["pinned"] is True
    assert "may give way" in heddle("pin", "sql", "--unpin")
    assert client.get("/v1/adapters/sql").json()["pinned"] is False


def test_rm_asks_and_says_what_drains(heddle: Heddle, folder: Path, client: httpx.Client) -> None:
    heddle("push", str(folder))
    result = heddle.run("rm", "sql", answer="n\n")
    assert (result.exit_code, "Delete sql with 1 version?" in result.output) == (1, True)
    assert client.get("/v1/adapters/sql").status_code == 200
    body = {"messages": HELLO, "adapter": "sql", "seed": scripted_engine.NEVER_ENDS, "stream": True}
    with client.stream("POST", CHAT, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        said = heddle("rm", "sql", answer="y\n")
    assert "1 running request will finish on it" in said
    heddle("push", str(folder))
    version = client.get("/v1/adapters/sql").json()["version"]
    assert f"(version {version})" in heddle("rm", f"sql@{version}", "--yes")
    assert "There is no adapter 'sql'" in heddle.refusal("rm", "sql", "--yes")


def test_refusals_are_one_line(heddle: Heddle, folder: Path) -> None:
    assert "is not allowed" in heddle.refusal("push", str(folder), "--name", "no way")
    assert "'status' should be" in heddle.refusal("ls", "--status", "new")
    assert "There is no adapter 'nobody'" in heddle.refusal("show", "nobody")
    assert "There is no adapter 'a b?c'" in heddle.refusal("show", "a b?c")
    (folder / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in heddle.refusal("push", str(folder))


def test_a_folder_that_is_no_adapter_is_not_sent(heddle: Heddle, folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    cases = [
        (["push", str(folder)], "has no adapter_model.safetensors"),
        (["push", str(tmp_path / "gone")], "does not exist"),
        (["push", str(folder), "--ttl", "soon"], "'soon' is no time"),
    ]
    for arguments, message in cases:
        result = heddle.run(*arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.replace("│", " ").split())
    write_adapter(tmp_path / "fine")
    result = heddle.run("push", str(tmp_path / "fine"), "--tag", "a,b")
    assert (result.exit_code, "no comma" in result.stderr) == (2, True)


def test_an_upload_over_the_servers_limit_is_told_while_it_is_sent(heddle: Heddle, folder: Path) -> None:
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.truncate(64 << 20)
    assert "over this server's limit" in heddle.refusal("push", str(folder))


def test_a_key_goes_with_every_request(tmp_path: Path, folder: Path) -> None:
    config = server_config(tmp_path)
    key = make_key(config.store_path, "blue", "adapters:read", "adapters:write")
    admin = make_key(config.store_path, "ops", "admin")
    with live_server(config) as client:
        heddle = Heddle(str(client.base_url))
        assert "needs an API key" in heddle.refusal("ls")
        assert "--api-key or HEDDLE_API_KEY" in heddle.refusal("push", str(folder))
        assert "is not known" in heddle.refusal("ls", "--api-key", "nonsense")
        assert "pushed sql@1" in heddle("push", str(folder), "--api-key", key)
        heddle.environment["HEDDLE_API_KEY"] = key
        assert "blue, private" in heddle("show", "sql")
        assert "needs a key with the scope 'admin'" in heddle.refusal("publish", "sql")
        publish = ("publish", "sql", "--owner", "blue", "--api-key", admin)
        assert "is public" in heddle(*publish)
        assert "blue, public" in heddle("ls")
        assert json.loads(heddle("ls", "--visibility", "private", "--json")) == []
        assert "is private" in heddle("publish", "sql", "--undo")
        assert "is public" in heddle(*publish)
        heddle("push", str(folder), "--visibility", "private")
        assert "blue, private" in heddle("show", "sql")
        heddle("rm", "sql", "--yes")
        heddle.environment["HEDDLE_API_KEY"] = make_key(config.store_path, "blue", "infer")
        assert "'adapters:read'" in heddle.refusal("ls")


def test_a_server_that_is_not_there_says_how_to_start_one(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    line = Heddle(f"http://127.0.0.1:{port}").refusal("ls")
    assert f"no heddle server answers at http://127.0.0.1:{port}" in line
    assert "heddle serve MODEL" in line


@pytest.mark.parametrize("server", ["ftp://here", "http://", "http://here:port", "http://here:99999"])
def test_an_address_that_is_none(server: str) -> None:
    assert "is no server's address" in Heddle(server).refusal("ls")


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi", b"", b"nonsense\r\n\r\n"])
def test_something_else_that_answers(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve_one() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve_one)
        thread.start()
        line = Heddle(f"127.0.0.1:{listener.getsockname()[1]}").refusal("ls")
        thread.join()
    assert "is it a heddle server?" in line or "was cut off" in line


def test_lists_are_read_to_their_last_page(
    client: httpx.Client, heddle: Heddle, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heddle_server.adapters_client.MAX_PAGE", 2)
    for number in range(5):
        heddle("push", str(folder), "--name", f"n{number}")
    cards = AdaptersClient(str(client.base_url) + "/v1/").cards({})
    assert [card["name"] for card in cards] == [f"n{number}" for number in range(5)]


def test_files_are_streamed(client: httpx.Client, heddle: Heddle, folder: Path, tmp_path: Path) -> None:
    sent: list[int] = []
    card = AdaptersClient(str(client.base_url)).push(folder, {"name": "sql"}, on_sent=sent.append)
    sizes = [(folder / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors")]
    assert (sent, card["size_bytes"]) == (sizes, sizes[1])
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        AdaptersClient(str(client.base_url)).push(folder, {"name": "sql"})


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("30m", 1800), ("12h", 43_200), ("7d", 604_800), ("2w", 1_209_600), ("0", 0)]
)
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "-1", "1.5h", "1y", "1d2h"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_duration(text)


def test_text_from_a_server_cannot_steer_the_terminal() -> None:
    assert printable("é\x1b[31m\n\x9b2J") == "é�[31m��2J"
