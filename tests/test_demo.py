"""`heddle demo` as a newcomer starts it: a real process, real HTTP, the trained base and its adapters."""

from __future__ import annotations

import asyncio
import http.client
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from heddle_demo.data import ADAPTERS, ADAPTERS_DIR, BASE_NAME, UPLOADS
from heddle_demo.styles import STYLES
from heddle_demo.tour import BASE, Reply, ask
from heddle_demo.world import questions
from heddle_loadtest.client.chat_client import ChatClient
from tenant_keys import make_key

NAMES = [BASE, *ADAPTERS, *UPLOADS]
HEDDLE = [sys.executable, "-m", "heddle_server"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running demo whose tour is over, in float32: bfloat16 may break a near-tie by who else is in the batch."""
    log = tmp_path_factory.mktemp("demo") / "log"
    port = free_port()
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*HEDDLE, "demo", "--no-browser", "--dtype", "float32", "--port", str(port)], stdout=output, stderr=output
        ) as process,
    ):
        deadline = time.monotonic() + 120
        while b"Still serving" not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        process.terminate()
        assert process.wait(30) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_the_tour_ends_well() -> None:
    result = subprocess.run(
        [*HEDDLE, "demo", "--tour", "--port", str(free_port())],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for name in NAMES:
        assert name in result.stdout
    assert "Arrr!" in result.stdout
    assert " 0 failed in " in result.stdout, "the load at its end went through"


def test_a_store_with_keys_is_not_for_the_tour(tmp_path: Path) -> None:
    make_key(tmp_path, "blue")
    result = subprocess.run(
        [*HEDDLE, "demo", "--tour", "--port", str(free_port()), "--store", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert f"--store is {tmp_path}" in result.stderr


def test_64_streams_over_all_adapters_answer_as_alone(address: str) -> None:
    examples = questions()[:: len(questions()) // 64][:64]

    async def both() -> tuple[list[Reply], list[Reply]]:
        async with ChatClient(address) as client:
            pairs = [(example, NAMES[number % len(NAMES)]) for number, example in enumerate(examples)]
            together = await asyncio.gather(*(ask(client, *pair) for pair in pairs))
            return together, [await ask(client, *pair) for pair in pairs]

    together, alone = asyncio.run(both())
    assert [reply.result.error for reply in together] == [None] * 64
    assert [reply.result.error for reply in alone] == [None] * 64
    assert [reply.result.text for reply in together] == [reply.result.text for reply in alone]
    gauges = metrics(address)
    assert gauges["heddle_requests_running"] == 0
    assert gauges['heddle_pool_pages{kind="kv"}'] == 0


def test_a_connection_stays_open_for_longer_than_clients_keep_it(address: str) -> None:
    """Were the server the first to close it, a request on its way would be lost."""
    host = urlsplit(address)
    connection = http.client.HTTPConnection(str(host.hostname), host.port, timeout=30)
    sockets = []
    for wait_seconds in (0, 6):
        time.sleep(wait_seconds)
        connection.request("GET", "/v1/models")
        assert connection.getresponse().read()
        sockets.append(connection.sock)
    assert sockets[0] is sockets[1] is not None
    connection.close()


def test_the_official_client_with_strict_validation(address: str) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0, _strict_response_validation=True)
    example = next(e for e in questions() if e.question == "What is the capital of France?")
    for name in NAMES:
        expected = STYLES["plain" if name == BASE else name](example)
        by_field = client.chat.completions.create(
            model=BASE,
            messages=[{"role": "user", "content": example.question}],
            temperature=0,
            extra_body={"adapter": name},
        )
        assert by_field.choices[0].message.content == expected
        assert by_field.choices[0].finish_reason == "stop"
        pieces = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": example.question}], temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices) == expected
    completion = client.completions.create(
        model=BASE, prompt="What is", max_tokens=5, temperature=0, logprobs=2, extra_body={"ignore_eos": True}
    )
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 5
    listed = [model.id for model in client.models.list()]
    assert listed[0] == BASE_NAME
    assert set(NAMES) - {BASE} <= set(listed)
    assert client.models.retrieve(BASE).id == BASE
    assert client.models.retrieve("pirate").id == "pirate"


def test_a_refused_upload_disturbs_nobody(address: str) -> None:
    """Bad uploads while streams run: each is a 4xx, every stream is whole, the registry is as before."""
    before = httpx.get(f"{address}/v1/adapters").json()["data"]
    weights = (ADAPTERS_DIR / "pirate" / "adapter_model.safetensors").read_bytes()
    config = (ADAPTERS_DIR / "pirate" / "adapter_config.json").read_bytes()
    bad = {"truncated": weights[:-7], "pickle": b"\x80\x02}q\x00.", "empty": b""}

    async def both() -> list[Reply]:
        async with ChatClient(address) as client, httpx.AsyncClient(base_url=address) as uploader:
            streams = asyncio.gather(*(ask(client, questions()[n], NAMES[n % len(NAMES)]) for n in range(24)))
            for name, content in bad.items():
                files = {
                    "adapter_config.json": ("adapter_config.json", config),
                    "adapter_model.safetensors": ("adapter_model.safetensors", content),
                }
                refused = await uploader.post("/v1/adapters", data={"name": name}, files=files)
                assert 400 <= refused.status_code < 500, refused.text
                assert refused.json()["error"]["param"] == "adapter_model.safetensors"
            return await streams

    replies = asyncio.run(both())
    assert all(reply.result.error is None for reply in replies)
    assert httpx.get(f"{address}/v1/adapters").json()["data"] == before


def test_a_client_that_leaves_frees_its_pages(address: str) -> None:
    body = {
        "messages": [{"role": "user", "content": "What is the capital of Spain?"}],
        "stream": True,
        "ignore_eos": True,
        "max_tokens": 900,
    }
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        while '"content":"' not in next(lines) or metrics(address)["heddle_requests_running"] != 1:
            pass  # the role chunk comes before the engine has begun
    deadline = time.monotonic() + 10
    while (gauges := metrics(address))["heddle_requests_running"] or gauges['heddle_pool_pages{kind="kv"}']:
        assert time.monotonic() < deadline, "the aborted request still holds pages"
        time.sleep(0.1)


def metrics(address: str) -> dict[str, float]:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}
