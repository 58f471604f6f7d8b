"""Who is let in: every route of the real app, with and without keys; keys that change while it runs; browsers."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from fastapi.routing import iter_route_contexts
from starlette.types import Message

from heddle_server.api.access import ACCESS, access_of
from heddle_server.api.app import create_app
from heddle_server.api.authentication import Authentication
from heddle_server.api.loopback import is_loopback
from heddle_server.api.service import Service
from heddle_server.audit_log import AUDIT_FILE
from heddle_server.config import ConfigError
from heddle_server.key_store import SCOPES
from live_server import live_server, server_config
from tenant_keys import Tenants, client_of, keys_of, make_key, tenants
from test_adapter_api import ADAPTERS, upload
from test_http_api import CHAT, HELLO, refusal
from test_registry import running

PARAMETER = re.compile(r"\{\w+(:\w+)?\}")


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """Path and method of every route of the app as it is served."""

    async def collect() -> list[tuple[str, str]]:
        async with running(server_config(tmp_path_factory.mktemp("routes"))) as service:
            found = list(iter_route_contexts(create_app(service).routes))
            assert all(route.path and route.methods for route in found), "a mount, or no HTTP"
            return [(route.path or "", method) for route in found for method in route.methods or ()]

    return asyncio.run(collect())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    with tenants(server_config(tmp_path_factory.mktemp("server"))) as world:
        yield world


def test_every_route_has_its_line_and_every_line_its_route(routes: list[tuple[str, str]]) -> None:
    assert len(routes) > 20
    lines = {(path, method) for path, methods in ACCESS.items() for method in methods}
    assert {(path, method) for path, method in routes if method != "HEAD"} == lines
    assert [route for route in routes if access_of(*route).needs == "closed"] == []


def test_a_route_without_a_line_is_closed() -> None:
    assert access_of("/v1/forgotten", "GET").needs == "closed"
    assert access_of("/v1/models", "POST").needs == "closed"


def test_every_route_wants_a_key_of_its_scope(world: Tenants, routes: list[tuple[str, str]]) -> None:
    with_one_scope = {scope: client_of(world.nobody, make_key(world.store_path, "blue", scope)) for scope in SCOPES}
    for path, method in routes:
        needs, url = access_of(path, method).needs, PARAMETER.sub("x", path)
        without = world.nobody.request(method, url)
        if needs in ("public", "probe"):
            assert without.status_code in (200, 404), path
            continue
        assert (without.status_code, without.headers["www-authenticate"]) == (401, "Bearer"), path
        assert refusal(without) == (401, "missing_api_key", None), path
        for scope, client in with_one_scope.items():
            answer = client.request(method, url)
            if scope in (needs, "admin"):
                assert answer.status_code not in (401, 403), (path, scope)
            else:
                assert refusal(answer) == (403, "insufficient_scope", None), (path, scope)
                assert repr(needs) in answer.json()["error"]["message"]
    for client in with_one_scope.values():
        client.close()


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1/adapters/", "//v1/models", "/v1/%6dodels/x", "/V1/models", "/page/../v1/models"]
)
def test_other_paths_say_nothing_without_a_key(world: Tenants, path: str) -> None:
    assert world.nobody.get(path).status_code == 401
    assert world.nobody.post(path).status_code == 401
    assert world.nobody.request("BREW", path).status_code == 401
    assert world.nobody.post("/readyz").status_code == 401
    assert world.admin.get("/nothing").status_code == 404
    assert world.admin.post("/readyz").status_code == 405


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ("", "missing_api_key"),
        ("Bearer", "missing_api_key"),
        ("Basic {key}", "missing_api_key"),
        ("{key}", "missing_api_key"),
        ("Bearer nonsense", "invalid_api_key"),
        ("Bearer {key}0", "invalid_api_key"),
        ("Bearer {key} {key}", "invalid_api_key"),
        ("Bearer \xe9", "invalid_api_key"),
    ],
)
def test_headers_that_are_no_key(world: Tenants, header: str, code: str) -> None:
    key = make_key(world.store_path, "blue")
    response = world.nobody.get("/v1/models", headers={b"authorization": header.format(key=key).encode("latin-1")})
    assert refusal(response) == (401, code, None)
    assert response.headers["x-request-id"]
    assert key not in response.text
    assert world.nobody.get("/v1/models", headers={"authorization": f"bearer  {key}"}).status_code == 200
    for nowhere_else in ({"x-api-key": key}, {"cookie": f"authorization=Bearer {key}"}):
        assert world.nobody.get(f"/v1/models?api_key={key}", headers=nowhere_else).status_code == 401


def test_nobody_without_a_key_has_a_body_read(world: Tenants) -> None:
    """The refusal comes while not a byte of a gigabyte was sent."""
    address = (world.nobody.base_url.host, world.nobody.base_url.port or 80)
    for path in (ADAPTERS, CHAT):
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {1 << 30}\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 401")


def test_errors_of_keys_are_counted(world: Tenants) -> None:
    before = world.admin.get("/metrics").text
    world.nobody.get("/v1/models")
    after = world.admin.get("/metrics").text
    counts = [
        float(match[1]) if (match := re.search(r'heddle_errors_total\{code="missing_api_key"\} (\S+)', text)) else 0
        for text in (before, after)
    ]
    assert counts[1] == counts[0] + 1


def test_keys_change_while_the_server_runs(tmp_path: Path) -> None:
    config = server_config(tmp_path)
    with live_server(config) as nobody:
        assert nobody.get("/v1/models").status_code == 200
        assert upload(nobody, "sql").status_code == 201
        with keys_of(config.store_path) as keys:
            key, text = keys.create("local", ["infer"])
            assert nobody.get("/v1/models").status_code == 401
            with client_of(nobody, text) as client:
                assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["scripted-model", "sql"]
                assert refusal(client.get("/metrics"))[1] == "insufficient_scope"
                keys.revoke(key.key_id)
                response = client.get("/v1/models")
                assert refusal(response)[1] == "invalid_api_key"
                assert "revoked" in response.json()["error"]["message"]
        assert nobody.get("/v1/models").status_code == 401
    with live_server(config) as nobody:
        assert nobody.get("/v1/models").status_code == 401, "open again after a restart"


def test_keys_stand_in_no_log_answer_or_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    config = server_config(tmp_path)
    text = make_key(config.store_path, "blue", *SCOPES)
    unknown = f"hdl_{'ab' * 6}_{'cd' * 32}"
    answers: list[httpx.Response] = []
    with live_server(config) as nobody:
        for key in (text, unknown):
            with client_of(nobody, key) as client:
                answers += [
                    upload(client, "sql"),
                    upload(client, "no way"),
                    client.post(CHAT, json={"messages": HELLO}),
                    client.post(CHAT, content=b"{"),
                    client.get(f"{ADAPTERS}/nobody"),
                    client.delete(f"{ADAPTERS}/sql"),
                    client.get("/v1/cache"),
                    client.get("/metrics"),
                    client.get("/openapi.json"),
                ]
    output = capfd.readouterr()
    told = "".join((caplog.text, output.out, output.err, *(answer.text + str(answer.headers) for answer in answers)))
    files = b"".join(file.read_bytes() for file in config.store_path.rglob("*") if file.is_file())
    for key in (text, unknown):
        secret = key.rpartition("_")[2]
        assert secret not in told
        assert secret.encode() not in files
    lines = [json.loads(line) for line in (config.store_path / AUDIT_FILE).read_text().splitlines()]
    assert {line["action"] for line in lines} >= {"key.create", "adapter.upload", "adapter.delete"}


# Without keys


@pytest.fixture(scope="module")
def keyless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with live_server(server_config(tmp_path_factory.mktemp("keyless"))) as client:
        yield client


PATHS = ["/", "/openapi.json", "/v1/models", "/v1/cache", "/metrics", "/nothing"]


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "192.168.1.2", "[::2]", "", ":80", "[", "0.0.0.0"],
)
def test_another_host_name_is_refused(keyless: httpx.Client, host: str) -> None:
    for path in PATHS:
        assert refusal(keyless.get(path, headers={"host": host})) == (403, "forbidden_origin", None)
    for path in ("/livez", "/readyz", "/health"):
        assert keyless.get(path, headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "localhost.", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000", "app.localhost"]
)
def test_names_of_this_machine_are_not(keyless: httpx.Client, host: str) -> None:
    assert keyless.get("/v1/models", headers={"host": host}).status_code == 200
    same_origin = {"host": host, "origin": f"http://{host.lower()}"}
    assert keyless.post(CHAT, json={"messages": HELLO}, headers=same_origin).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:1", "http://127.0.0.1", "", "file://"]
)
def test_another_sites_pages_are_refused(keyless: httpx.Client, origin: str) -> None:
    for path, method in itertools.product(PATHS, ("GET", "POST", "DELETE", "OPTIONS")):
        response = keyless.request(method, path, headers={"origin": origin})
        assert refusal(response) == (403, "forbidden_origin", None)
        assert "access-control-allow-origin" not in response.headers
    assert keyless.get("/readyz", headers={"origin": origin}).status_code == 200


def test_programs_pages_are_not(keyless: httpx.Client) -> None:
    for origin in ("app://obsidian.md", "vscode-file://vscode-app", "tauri://localhost"):
        assert keyless.post(CHAT, json={"messages": HELLO}, headers={"origin": origin}).status_code == 200
    for origin in ("app", "app:", "https://app://x", "application://x", "chrome-extension://x"):
        assert refusal(keyless.get("/v1/models", headers={"origin": origin}))[1] == "forbidden_origin"


def test_a_web_socket_is_closed(tmp_path: Path) -> None:
    async def ask() -> list[str]:
        async def nothing(*_: object) -> Any:
            raise AssertionError("nobody reads what is not served")

        sent: list[str] = []

        async def send(message: Message) -> None:
            sent.append(message["type"])

        async with running(server_config(tmp_path)) as service:
            await Authentication(nothing, service=service)({"type": "websocket"}, nothing, send)
        return sent

    assert asyncio.run(ask()) == ["websocket.close"]


def test_a_form_of_another_site_uploads_nothing(keyless: httpx.Client) -> None:
    """Browsers send multipart forms to any address without asking it first."""
    keyless.headers["origin"] = "https://evil.example"
    assert refusal(upload(keyless, "sql"))[1] == "forbidden_origin"
    del keyless.headers["origin"]
    assert keyless.get(ADAPTERS).json()["data"] == []


def test_no_guard_where_everybody_may_come_or_keys_decide(tmp_path: Path) -> None:
    headers = {"host": "heddle.example", "origin": "https://evil.example"}
    open_to_all = server_config(tmp_path / "open", allow_anonymous=True)
    with live_server(open_to_all) as client:
        assert client.get("/v1/models", headers=headers).status_code == 200
        make_key(open_to_all.store_path, "blue")
        assert client.get("/v1/models", headers=headers).status_code == 401
    with tenants(server_config(tmp_path / "closed")) as world:
        assert world.blue.get("/v1/models", headers=headers).status_code == 200


def test_a_client_that_sends_a_key_nobody_asked_for_is_answered(keyless: httpx.Client) -> None:
    assert keyless.get("/v1/models", headers={"authorization": "Bearer none"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "heddle.example", ""])
def test_a_server_without_keys_does_not_listen_to_other_machines(tmp_path: Path, host: str) -> None:
    config = server_config(tmp_path, host=host)
    with pytest.raises(ConfigError) as error:
        Service(config)
    assert all(said in str(error.value) for said in ("--host", "heddle keys create", "--allow-anonymous"))

    async def start(config: object) -> None:
        assert isinstance(config, type(server_config(tmp_path)))
        async with running(config):
            pass

    asyncio.run(start(msgspec.structs.replace(config, allow_anonymous=True)))
    make_key(config.store_path, "blue")
    asyncio.run(start(config))


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("127.0.0.1", True), ("::1", True), ("[::1]", True), ("0.0.0.0", False), ("10.0.0.1", False)],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


def test_the_version_is_told_to_everybody(world: Tenants) -> None:
    assert set(world.nobody.get("/version").json()) == {"version"}
