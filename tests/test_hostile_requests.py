"""Over HTTP every hostile upload is a 4xx with a pointer to the field; the server stays as it was and goes on."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from hostile_request_case import ANY, FORM, MAX_UPLOAD_BYTES, Part, RequestCase, form, honest_parts, parts_of, post
from hostile_requests import hostile_requests
from hostile_uploads import hostile_uploads
from live_server import wait_until
from process_memory import peak_bytes
from test_hostile_uploads import MAX_GROWTH_BYTES, MAX_MESSAGE_CHARS
from test_http_api import CHAT, HELLO, refusal

ADAPTERS = "/v1/adapters"
REQUESTS = hostile_requests()
UPLOADS = hostile_uploads()
MAX_SECONDS = 3.0  # for as much as 64 MiB, by a server and a client that share two cores with whatever else runs


@dataclass(frozen=True)
class Server:
    process_id: int
    port: int
    incoming: Path
    client: httpx.Client
    versions: list[Any]  # what its adapters are before and, so it must be, after
    peak_bytes_before: int

    def send(self, raw: bytes, *, then_leave: bool = False) -> httpx.Response | None:
        """The answer to raw bytes; None if there is none, as there need not be for a client that leaves."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            try:
                connection.sendall(raw)
                if then_leave:
                    connection.shutdown(socket.SHUT_WR)
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused before it had all; the answer is waiting
            response = http.client.HTTPResponse(connection)
            try:
                response.begin()
                return httpx.Response(response.status, headers=response.getheaders(), content=response.read())
            except (http.client.BadStatusLine, ConnectionResetError):
                return None

    def assert_unharmed(self) -> None:
        assert versions_of(self.client) == self.versions
        wait_until(lambda: not list(self.incoming.iterdir()))


def versions_of(client: httpx.Client) -> list[Any]:
    return [(card["name"], card["version"], card["digest"]) for card in client.get(ADAPTERS).json()["data"]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "hostile_server", str(folder), str(MAX_UPLOAD_BYTES)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            for name in ("victim", "team/victim"):
                body = form(honest_parts(name))
                reply = client.post(ADAPTERS, content=body, headers={"content-type": FORM})
                assert reply.status_code == 201
            incoming, memory = folder / "store" / "incoming", peak_bytes(process.pid)
            yield Server(process.pid, port, incoming, client, versions_of(client), memory)
        process.stdin.close()


@pytest.mark.parametrize("name", REQUESTS)
def test_a_hostile_request_is_refused(server: Server, name: str) -> None:
    case = REQUESTS[name]
    started = time.monotonic()
    response = server.send(case.make(), then_leave=case.code is None)
    assert time.monotonic() - started < MAX_SECONDS
    if case.code is None:
        assert response is None or 400 <= response.status_code < 500
    else:
        assert response is not None
        assert_refused(response, case)
    server.assert_unharmed()


def assert_refused(response: httpx.Response, case: RequestCase) -> None:
    status, code, param = refusal(response)
    assert 400 <= status < 500
    assert case.code in (code, ANY)
    assert case.param in (param, ANY)
    message = response.json()["error"]["message"]
    assert 0 < len(message) < MAX_MESSAGE_CHARS
    assert message.isprintable()


@pytest.mark.parametrize("path", [ADAPTERS, f"{ADAPTERS}/validate"])
def test_every_hostile_upload_is_a_4xx(server: Server, path: str) -> None:
    for number, (name, case) in enumerate(UPLOADS.items()):
        # The dry run reads the files by the same code, and a large header takes as long to send as all the rest.
        if number % 8 and (path != ADAPTERS or name.startswith("header bomb")):
            continue
        response = server.send(post(form(parts_of(case.make(), "victim")), path=path))
        assert response is not None, name
        status, code, param = refusal(response)
        assert 400 <= status < 500, name
        assert param == case.param, name
        # A config over its limit is refused while it is received, in other words.
        assert case.reason in response.json()["error"]["message"] or code == "body_too_large", name
        if not number % 50:
            server.assert_unharmed()
            reply = server.client.post(CHAT, json={"messages": HELLO, "adapter": "victim"})
            assert reply.status_code == 200, name
    server.assert_unharmed()


NAME, CONFIG, WEIGHTS = honest_parts("odd")
OTHER_HEADERS = (b"Content-Type: text/plain; charset=utf-16", b"X-Path: ../../etc/passwd")
ODD_FORMS: dict[str, list[Part]] = {
    "file names with paths": [part._replace(more='; filename="../../etc/passwd"') for part in (NAME, CONFIG, WEIGHTS)],
    "absolute file names": [part._replace(more='; filename="/etc/passwd"') for part in (NAME, CONFIG, WEIGHTS)],
    "an extended file name": [NAME, CONFIG, WEIGHTS._replace(more="; filename*=utf-8''..%2f..%2fetc%2fpasswd")],
    "a path parameter": [NAME, CONFIG, WEIGHTS._replace(more='; path="/etc/passwd"; size=1')],
    "other headers": [part._replace(headers=OTHER_HEADERS) for part in (NAME, CONFIG, WEIGHTS)],
    "weights first": [WEIGHTS, CONFIG, NAME],
    "name in the middle": [CONFIG, NAME, WEIGHTS],
    "boundary in the config": [
        NAME,
        CONFIG._replace(content=CONFIG.content.replace(b"folder", b"--b0undary")),
        WEIGHTS,
    ],
    "empty details": [NAME, *(Part(part, b"") for part in ("alias", "tags", "description", "pinned")), CONFIG, WEIGHTS],
}


@pytest.mark.parametrize("name", ODD_FORMS)
def test_what_a_client_calls_its_files_changes_nothing(server: Server, name: str) -> None:
    response = server.send(post(form(ODD_FORMS[name])))
    assert response is not None
    assert response.status_code == 201
    stored = {path.name for path in server.incoming.parent.glob("content/*/*")}
    assert stored == {CONFIG.name, WEIGHTS.name}
    assert server.client.delete(f"{ADAPTERS}/odd").status_code == 200
    server.assert_unharmed()


def test_memory_is_bounded(server: Server) -> None:
    """Stands last: it looks at the peak since the server was ready."""
    assert peak_bytes(server.process_id) - server.peak_bytes_before <= MAX_GROWTH_BYTES
