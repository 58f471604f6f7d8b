"""`heddle doctor --isolation`: silent about a server that keeps adapters apart, and not about one that does not."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from demo_server import DemoServer, demo_server
from heddle_demo.data import ADAPTERS, ADAPTERS_DIR
from heddle_server.cli import app
from heddle_server.doctor.isolation import PROMPTS, Answer, Isolation, Together, Verdict, check_isolation
from heddle_server.server_address import ServerError
from heddle_server.server_client import ServerClient

NUM_TOKENS = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoServer]:
    with demo_server(tmp_path_factory.mktemp("isolation"), pool_bytes=32 << 20, adapters=ADAPTERS_DIR) as server:
        yield server


def test_adapters_that_are_nowhere_are_asked_for_by_name(server: DemoServer) -> None:
    client = ServerClient(server.address)
    if not any(each["tier"] == "device" for each in client.get("/v1/cache")["adapters"]):
        with pytest.raises(ServerError, match="no adapter is on the device"):
            check_isolation(client, [])
    with pytest.raises(ServerError, match="There is no adapter 'nobody'"):
        check_isolation(client, ["nobody"])
    with pytest.raises(ServerError, match="300 adapters are too many to be asked at once: name at most 255"):
        check_isolation(client, ["pirate"] * 300)
    assert CliRunner().invoke(app, ["doctor", "--adapter", "pirate"]).exit_code == 2


def test_a_real_server_keeps_its_adapters_apart(server: DemoServer) -> None:
    result = check_isolation(ServerClient(server.address), list(ADAPTERS))
    assert [verdict.name for verdict in result.verdicts] == ["base", *ADAPTERS]
    assert {check.status for check in result.checks()} == {"ok"}, result.checks()
    assert result.ran_together
    assert len(result.passes) == 2 * len(PROMPTS)
    for verdict in result.verdicts:
        assert verdict.num_compared > NUM_TOKENS
        assert verdict.largest_difference < 1e-3, "it serves in float32"


def test_the_command_asks_those_on_the_device(server: DemoServer) -> None:
    ServerClient(server.address).post("/v1/completions", {"prompt": "Hi", "adapter": "pirate", "max_tokens": 1})
    result = CliRunner().invoke(app, ["doctor", "--isolation", "--server", server.address, "--json"])
    assert result.exit_code == 0, result.output
    names = [check["name"] for check in json.loads(result.stdout)]
    assert names[0] == "base"
    assert "pirate@1" in names
    assert names[-1] == "together"


class LeakyServer(BaseHTTPRequestHandler):
    """Answers an adapter with its neighbour's word as soon as two are here at once."""

    here: set[str]

    def do_GET(self) -> None:
        steps = {"steps": 10 * len(self.here), "segments": 10 * len(self.here), "adapter_loads": 0}
        self._say({"counters": steps, "adapters": []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        name = body.get("adapter", "base")
        self.here.add(name)
        time.sleep(0.2)
        word = min(self.here)
        self.here.discard(name)
        top = {word: -0.1, "other": -3.0}
        logprobs = {"tokens": [word] * 3, "token_logprobs": [-0.1] * 3, "top_logprobs": [top] * 3}
        self._say({"choices": [{"logprobs": logprobs}]})

    def _say(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def leaky_server() -> Iterator[str]:
    LeakyServer.here = set()
    with ThreadingHTTPServer(("127.0.0.1", 0), LeakyServer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_server_that_mixes_adapters_is_found_out() -> None:
    with leaky_server() as address:
        result = CliRunner().invoke(
            app, ["doctor", "--isolation", "--server", address, "--adapter", "a", "--adapter", "b"]
        )
    assert result.exit_code == 1
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert any("token 1 is 'a' in the batch and 'b' alone" in line for line in failed), result.stdout


def answer(tokens: str, *, margin: float = 1.0, logprob: float = -0.5) -> Answer:
    return Answer(tuple(tokens), (logprob,) * len(tokens), (margin,) * len(tokens))


@pytest.mark.parametrize(
    ("alone", "together", "expected"),
    [
        (answer("abc"), answer("abc", logprob=-0.7), (3, 0.2, 0, "")),
        (answer("abc"), answer("abx"), (2, 0.0, 0, "token 3 is 'x' in the batch and 'c' alone")),
        (answer("abc", margin=0.04), answer("abx"), (2, 0.0, 1, "")),
        (answer("abc", margin=0.04), answer("abc"), (3, 0.0, 0, "")),
        (answer("abc"), answer("ab"), (2, 0.0, 0, "2 tokens in the batch and 3 alone")),
    ],
)
def test_what_counts_as_a_difference(alone: Answer, together: Answer, expected: tuple[Any, ...]) -> None:
    verdict = Verdict("sql")
    verdict.compare("Hi", alone, together)
    assert verdict.num_compared == expected[0]
    assert verdict.largest_difference == pytest.approx(expected[1])
    assert verdict.num_near_ties == expected[2]
    assert expected[3] in verdict.difference
    assert bool(verdict.difference) == bool(expected[3])


def test_answers_that_were_not_computed_together_prove_nothing() -> None:
    verdicts = [Verdict(name, num_compared=5) for name in ("base", "a", "b", "c")]
    apart = Isolation(("base", "a", "b", "c"), verdicts, [Together(3.9, 0), Together(1.1, 2)])
    assert not apart.ran_together
    assert apart.checks()[-1].status == "FAIL"
    assert "1.1 segments a step" in apart.checks()[-1].found
    assert "2 adapters brought in" in apart.checks()[-1].found


def test_nothing_compared_is_no_success() -> None:
    result = Isolation(
        ("base", "a"), [Verdict("base", num_compared=3), Verdict("a", num_near_ties=6)], [Together(2, 0)]
    )
    assert [check.status for check in result.checks()] == ["ok", "warn", "ok"]
