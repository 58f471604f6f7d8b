"""What the command line asks servers with: keys, refusals, streams that end well and badly."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from heddle_server.server_address import ServerError
from heddle_server.server_client import ServerClient

BODIES = {
    "/v1/good": b': keep-alive\n\ndata: {"n": 1}\n\ndata: {"n": 2}\n\ndata: [DONE]\n\n',
    "/v1/cut": b'data: {"n": 1}\n\n',
    "/v1/failing": b'data: {"error": {"message": "The engine\\u001b[2J failed."}}\n\n',
    "/v1/garbage": b"data: {not json\n\n",
}


class Endpoint(BaseHTTPRequestHandler):
    """Says what it was asked, or streams what its path is about."""

    def do_GET(self) -> None:
        self._say(200, json.dumps({"path": self.path, "key": self.headers["authorization"]}).encode())

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path in BODIES:
            assert asked == {"question": "?", "stream": True}
            self._say(200, BODIES[self.path])
        elif self.path == "/v1/refused":
            self._say(403, b'{"error": {"message": "This key may not."}}')
        else:
            self._say(500, b"<html>")

    def _say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("form", ["{}", "http://{}", "http://{}/", "http://{}/v1", "http://{}/v1/"])
def test_any_form_of_the_address_will_do(address: str, form: str) -> None:
    assert ServerClient(form.format(address)).get("/v1/x") == {"path": "/v1/x", "key": None}


def test_a_path_is_put_before_the_apis_own(address: str) -> None:
    assert ServerClient(f"http://{address}/behind/v1").get("/v1/x")["path"] == "/behind/v1/x"


def test_the_key_goes_with_every_request(address: str) -> None:
    assert ServerClient(address, "hdl_1_abc").get("/v1/x")["key"] == "Bearer hdl_1_abc"
    assert "Bearer hdl_1_abc" in ServerClient(address, "hdl_1_abc").get_text("/v1/x")


def test_a_stream_is_its_events(address: str) -> None:
    assert list(ServerClient(address).stream("/v1/good", {"question": "?"})) == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/v1/cut", "was cut off"),
        ("/v1/failing", "The engine\N{REPLACEMENT CHARACTER}\\[2J failed."),
        ("/v1/garbage", "was cut off"),
        ("/v1/refused", "This key may not."),
        ("/v1/elsewhere", "answers HTTP 500; is it a heddle server"),
    ],
)
def test_a_stream_that_ends_badly_is_an_error(address: str, path: str, message: str) -> None:
    with pytest.raises(ServerError, match=message):
        list(ServerClient(address).stream(path, {"question": "?"}))


@pytest.mark.parametrize("address", ["ftp://here", "http://", "http://here:port", "http://here:99999"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ServerError, match="is no server's address"):
        ServerClient(address)


def test_nobody_there() -> None:
    with pytest.raises(ServerError, match=r"no heddle server answers at http://127\.0\.0\.1:1 \(Connection refused\)"):
        ServerClient("127.0.0.1:1").get("/v1/cache")
