"""The fake server against a client of its own: raw sockets, a thread a request, no line of the load generator's."""

import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import typer
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from heddle_loadtest.commands.mock import mock
from heddle_loadtest.errors import SpecError
from heddle_loadtest.mock.adapter_slots import AdapterSlots
from heddle_loadtest.mock.lateness import Lateness
from heddle_loadtest.mock.process import MockProcess
from heddle_loadtest.mock.settings import MockSettings

SLACK_SECONDS = 0.04  # what other work on a shared machine may add; faults are told apart by more than this


@dataclass
class RawAnswer:
    """What came over the socket, each event with its time after the request."""

    status: int = 0
    events: list[tuple[float, Any]] = field(default_factory=list)
    is_whole: bool = False

    @property
    def tokens(self) -> list[tuple[float, str]]:
        deltas = [(at, event["choices"][0]) for at, event in self.events if event.get("choices")]
        texts = [(at, choice.get("text") or choice.get("delta", {}).get("content", "")) for at, choice in deltas]
        return [(at, text) for at, text in texts if text]

    @property
    def ttft_seconds(self) -> float:
        return self.tokens[0][0]

    @property
    def report(self) -> dict[str, Any]:
        (report,) = [event["heddle"] for _, event in self.events if "heddle" in event]
        return dict(report)


def send(url: str, num_tokens: int = 5, path: str = "/v1/chat/completions", **fields: Any) -> socket.socket:
    """A streamed request over a connection of its own."""
    prompt = {"messages": [{"role": "user", "content": "one two"}]} if "chat" in path else {"prompt": [5, 6, 7]}
    options = {"max_tokens": num_tokens, "stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(prompt | options | fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: mock\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port), timeout=20)
    connection.sendall(head.encode() + body)
    return connection


def ask(url: str, num_tokens: int = 5, path: str = "/v1/chat/completions", **fields: Any) -> RawAnswer:
    """One such request, its answer read line by line as the lines come."""
    with send(url, num_tokens, path, **fields) as connection:
        return read(connection, time.monotonic())


def read(connection: socket.socket, started: float) -> RawAnswer:
    answer = RawAnswer()
    with connection.makefile("rb") as lines:
        answer.status = int(lines.readline().split()[1])
        for line in lines:
            if line == b"data: [DONE]\n":
                answer.is_whole = True
            elif line.startswith(b"data: "):
                answer.events.append((time.monotonic() - started, json.loads(line[6:])))
    return answer


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=20) as response:
        return json.load(response)


def metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=20) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    return {
        sample.name + "".join(f"[{value}]" for name, value in sample.labels.items()): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with MockProcess(MockSettings(ttft_seconds=0.08, itl_seconds=0.02, load_seconds=0.3, num_slots=2)) as server:
        yield server.url


def test_tokens_leave_at_their_times(url: str) -> None:
    answers = [ask(url, num_tokens=20) for _ in range(5)]
    for answer in answers:
        assert [text for _, text in answer.tokens] == [f"{index} " for index in range(20)]
        # Never early, each of them; and late by what the machine does, not by a growing sum.
        assert all(at >= 0.08 + index * 0.02 - 0.002 for index, (at, _) in enumerate(answer.tokens))
    assert 0.078 < median(answer.ttft_seconds for answer in answers) < 0.08 + SLACK_SECONDS
    spans = [(answer.tokens[-1][0] - answer.ttft_seconds) / 19 for answer in answers]
    assert median(spans) == pytest.approx(0.02, rel=0.1)


def test_many_streams_at_once_keep_their_times(url: str) -> None:
    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(lambda _: ask(url, num_tokens=30), range(32)))
    spans = [(answer.tokens[-1][0] - answer.ttft_seconds) / 29 for answer in answers]
    assert median(spans) == pytest.approx(0.02, rel=0.1)
    lateness = get(f"{url}/mock/lateness")
    assert lateness["count"] >= 32 * 30
    assert 0 <= lateness["p50_seconds"] <= lateness["p99_seconds"] <= lateness["max_seconds"]
    assert lateness["p50_seconds"] < SLACK_SECONDS


def test_shapes_are_those_that_openai_reads(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()][:2] == ["mock", "adapter-00000"]
        messages: Any = [{"role": "user", "content": "a question of five words"}]
        chat = client.chat.completions.create(model="mock", messages=messages, max_tokens=3)
        assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == ("0 1 2 ", "length")
        assert chat.usage is not None
        assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (5, 3)
        chunks = list(client.chat.completions.create(model="mock", messages=messages, max_tokens=3, stream=True))
        assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "0 ", "1 ", "2 "]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices[0].finish_reason == "length"
        assert client.completions.create(model="mock", prompt="x", max_tokens=2).choices[0].text == "0 1 "
        with pytest.raises(openai.NotFoundError, match="there is no model 'nobody'"):
            client.chat.completions.create(model="nobody", messages=messages)


def test_a_completion_of_token_ids_streams(url: str) -> None:
    answer = ask(url, 3, "/v1/completions")
    assert [text for _, text in answer.tokens] == ["0 ", "1 ", "2 "]
    assert answer.is_whole
    assert answer.events[-1][1]["usage"]["prompt_tokens"] == 3


def test_a_whole_answer_takes_as_long_as_its_last_token(url: str) -> None:
    started = time.monotonic()
    request = urllib.request.Request(f"{url}/v1/completions", b'{"prompt": "x", "max_tokens": 11}')
    with urllib.request.urlopen(request, timeout=20) as response:
        body = json.load(response)
    assert 0.278 <= time.monotonic() - started < 0.28 + 2 * SLACK_SECONDS
    assert body["usage"]["completion_tokens"] == 11
    assert body["heddle"]["cache"] is None


def test_a_connection_serves_one_request_after_another(url: str) -> None:
    address = urlsplit(url)
    with closing(http.client.HTTPConnection(f"{address.hostname}:{address.port}", timeout=20)) as connection:
        sockets = []
        for stream in (True, False, True):
            connection.request("POST", "/v1/chat/completions", json.dumps({"max_tokens": 2, "stream": stream}))
            sockets.append(connection.sock)
            assert b'"length"' in connection.getresponse().read()
        assert sockets == [sockets[0]] * 3


def test_bad_requests_get_the_envelope(url: str) -> None:
    assert ask(url, adapter="nobody").status == 404
    for body, status, code in (
        (b"{", 400, "invalid_request"),
        (b'{"max_tokens": "many"}', 400, "invalid_request"),
        (b'{"adapter": "nobody"}', 404, "adapter_not_found"),
        (b'{"model": "nobody"}', 404, "model_not_found"),
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{url}/v1/chat/completions", body, timeout=20)
        with error.value as response:
            assert (response.status, json.load(response)["error"]["code"]) == (status, code)


def test_a_cold_adapter_takes_its_load_time_more(url: str) -> None:
    cold, warm = ask(url, adapter="adapter-00000"), ask(url, adapter="adapter-00000")
    assert (cold.report["cache"], warm.report["cache"]) == ("disk", "device")
    assert cold.ttft_seconds - warm.ttft_seconds == pytest.approx(0.3, abs=SLACK_SECONDS)
    assert cold.report["load_ms"] == pytest.approx(300, abs=0.01)
    assert cold.report["queue_ms"] == pytest.approx(300, abs=0.01)
    assert cold.report["ttft_ms"] == pytest.approx(380, abs=1000 * SLACK_SECONDS)
    assert warm.report["load_ms"] == 0
    # Two slots: the third adapter throws out the first, which then comes back from the host; `model` names one too.
    assert ask(url, model="adapter-00001").report["cache"] == "disk"
    assert ask(url, model="adapter-00002").report["cache"] == "disk"
    assert ask(url, model="adapter-00000").report["cache"] == "host"


def test_slots_keep_what_was_used_last() -> None:
    """Against a list kept by hand, over a long random order."""
    slots, held, random_adapter = AdapterSlots(5, 1.0), list[str](), random.Random(1)
    seen: set[str] = set()
    for step in range(2000):
        adapter = str(random_adapter.randrange(12))
        cache, ready_at = slots.use(adapter, now=10.0 * step)
        assert cache == ("device" if adapter in held else "host" if adapter in seen else "disk")
        assert ready_at == 10.0 * step + (0.0 if adapter in held else 1.0)
        held = [*(name for name in held if name != adapter), adapter][-5:]
        seen.add(adapter)


def test_a_load_under_way_is_waited_for_not_begun_again() -> None:
    slots = AdapterSlots(1, 1.0)
    assert slots.use("poet", now=0.0).ready_at == 1.0
    assert slots.use("poet", now=0.75) == ("disk", 1.0)
    assert slots.use("poet", now=1.25) == ("device", 1.25)


def test_the_seed_decides_whom_an_error_hits() -> None:
    settings = MockSettings(ttft_seconds=0, itl_seconds=0, error_rate=0.2, break_rate=0.3, seed=7)
    draws = random.Random(7)
    expected = ["refused" if a < 0.2 else "broken" if b < 0.3 else "ok" for a, b in _pairs(draws, 100)]
    assert set(expected) == {"refused", "broken", "ok"}
    seen = []
    with MockProcess(settings) as server:
        for _ in range(100):
            answer = ask(server.url, num_tokens=6)
            seen.append("refused" if answer.status == 503 else "ok" if answer.is_whole else "broken")
            if seen[-1] == "broken":
                assert len(answer.tokens) == 3
        counted = metrics(server.url)
    assert seen == expected
    counts = Counter(expected)
    assert counted["heddle_errors_total[overloaded]"] == counts["refused"]
    assert counted["heddle_requests_total[error]"] == counts["broken"]
    assert counted["heddle_requests_total[length]"] == counts["ok"]
    assert counted["heddle_generated_tokens_total"] == 6 * counts["ok"] + 3 * counts["broken"]


def _pairs(draws: random.Random, count: int) -> Iterator[tuple[float, float]]:
    for _ in range(count):
        yield draws.random(), draws.random()


def test_over_its_capacity_requests_queue_in_turn() -> None:
    settings = MockSettings(ttft_seconds=0.1, itl_seconds=0.02, capacity=2)
    with MockProcess(settings) as server, ExitStack() as connections:
        started = time.monotonic()
        sent = [connections.enter_context(send(server.url, num_tokens=6)) for _ in range(8)]
        answers = [read(connection, started) for connection in sent]
        elapsed = time.monotonic() - started
        assert get(f"{server.url}/mock/requests") == {"count": 8, "max_running": 2}
        running = metrics(server.url)["heddle_requests_running"]
    # Four rounds of 200 ms, not five: what comes in is served at exactly the rate that the settings say.
    assert settings.sustainable_rate(6) == pytest.approx(10.0)
    assert 8 / 10.0 <= elapsed < 1.0
    queued = sorted(answer.report["queue_ms"] for answer in answers)
    assert queued == pytest.approx([0, 0, 200, 200, 400, 400, 600, 600], abs=1000 * SLACK_SECONDS)
    assert running == 0


def test_a_client_that_leaves_gives_its_place_back() -> None:
    with MockProcess(MockSettings(ttft_seconds=30, capacity=1)) as server:
        with send(server.url) as first, send(server.url) as second:  # one is computed, the other waits
            assert first.recv(1)
            assert second.recv(1)
            assert metrics(server.url)["heddle_requests_running"] == 1
        deadline = time.monotonic() + 10
        while (counted := metrics(server.url)).get("heddle_requests_total[disconnect]") != 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert counted["heddle_requests_running"] == 0


def test_metrics_agree_with_what_came() -> None:
    with MockProcess(MockSettings(ttft_seconds=0.03, itl_seconds=0.001, load_seconds=0.2, num_slots=1)) as server:
        answers = [ask(server.url, num_tokens=4, adapter=f"adapter-{index // 2:05d}") for index in range(6)]
        counted = metrics(server.url)
    assert counted["heddle_requests_total[length]"] == 6
    assert counted["heddle_generated_tokens_total"] == 24
    assert counted["heddle_prompt_tokens_total"] == 12
    assert counted["heddle_adapter_cache_requests_total[disk]"] == 3
    assert counted["heddle_adapter_cache_requests_total[device]"] == 3
    assert counted["heddle_time_to_first_token_seconds_count"] == 6
    seen = sum(answer.ttft_seconds for answer in answers)
    assert counted["heddle_time_to_first_token_seconds_sum"] == pytest.approx(seen, abs=6 * SLACK_SECONDS)
    told = sum(answer.report["ttft_ms"] for answer in answers) / 1000
    assert counted["heddle_time_to_first_token_seconds_sum"] == pytest.approx(told, abs=0.001)


def test_jitter_is_late_and_does_not_add_up() -> None:
    with MockProcess(MockSettings(ttft_seconds=0.02, itl_seconds=0.02, jitter_seconds=0.015)) as server:
        answer = ask(server.url, num_tokens=60)
    late = [at - 0.02 * (index + 1) for index, (at, _) in enumerate(answer.tokens)]
    assert min(late) > -0.002
    assert 0.003 < median(late) < 0.015 + SLACK_SECONDS
    assert median(late[40:]) < median(late[:20]) + SLACK_SECONDS / 2


def test_quantiles_of_lateness() -> None:
    lateness, values = Lateness(), [index / 10_000 + 0.00005 for index in range(1000)]
    random.Random(3).shuffle(values)
    for value in values:
        lateness.add(value)
    assert lateness.quantile(0.5) == pytest.approx(0.05, abs=0.0001)
    assert lateness.quantile(0.99) == pytest.approx(0.099, abs=0.0001)
    assert lateness.to_json()["max_seconds"] == max(values)
    assert Lateness().to_json() == {"count": 0, "p50_seconds": 0.0, "p99_seconds": 0.0, "max_seconds": 0.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ttft", "soon"], "--ttft 'soon': is no duration"),
        (["--error-rate", "1.5"], "--error-rate '1.5': is no share"),
        (["--slots", "0"], "--slots '0': is too few"),
        (["--capacity", "0"], "--capacity '0': is too few"),
        (["--port", "70000"], "--port '70000': is no port"),
        (["--adapter-name", "a-{rank}"], "--adapter-name 'a-{rank}': is no pattern"),
    ],
)
def test_what_cannot_be_is_said_by_option(options: list[str], message: str) -> None:
    application = typer.Typer()
    application.command()(mock)
    result = CliRunner().invoke(application, options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_port_that_is_taken() -> None:
    application = typer.Typer()
    application.command()(mock)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = CliRunner().invoke(application, ["--port", str(taken.getsockname()[1])])
    assert result.exit_code == 2
    assert "cannot be listened on" in result.stderr


def test_the_command_says_where_it_listens_and_ends_when_told() -> None:
    program = "import typer; from heddle_loadtest.commands.mock import mock; typer.run(mock)"
    command = [sys.executable, "-c", program, "--ttft", "1ms", "--adapters", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        match = re.fullmatch(r"mock is ready at (http://127\.0\.0\.1:\d+)\n", process.stdout.readline())
        assert match is not None
        assert len(get(f"{match[1]}/v1/models")["data"]) == 3
        assert ask(match[1]).is_whole
        process.terminate()
        assert process.wait(10) == 0


def test_it_does_not_outlive_a_parent_that_is_killed() -> None:
    program = (
        "import os, signal\n"
        "from heddle_loadtest.mock.process import MockProcess\n"
        "from heddle_loadtest.mock.settings import MockSettings\n"
        "with MockProcess(MockSettings()) as server:\n"
        "    print(server.url, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parent = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert parent.returncode == -signal.SIGKILL
    address, deadline = urlsplit(parent.stdout.strip()), time.monotonic() + 10
    while is_listening(address.hostname, address.port):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_listening(host: str | None, port: int | None) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except ConnectionError:
        return False
    return True


def test_settings_that_cannot_be() -> None:
    with pytest.raises(SpecError, match="error_rate"):
        MockSettings(error_rate=-0.1)
    assert MockSettings().sustainable_rate(10) == float("inf")
