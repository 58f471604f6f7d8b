"""Servers that answer what no server should: the run goes on, every request has a result, and no key is kept."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from socket import create_server, socket

import pytest

from heddle_loadtest.client.chat_client import ChatClient
from heddle_loadtest.client.result import RequestResult
from heddle_loadtest.client.server_pages import ServerPages
from heddle_loadtest.client.target import Target
from heddle_loadtest.measure.ending import Ending, ending_of
from heddle_loadtest.workload.schedule import ScheduledRequest

KEY = "sk-secret-key"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
WORD = b'data: {"choices": [{"index": 0, "delta": {"content": "word"}, "finish_reason": "length"}]}\n\n'
DONE = b"data: [DONE]\n\n"
REQUEST = ScheduledRequest(
    id=7, at_seconds=None, prompt="Why?", max_tokens=4, ignore_eos=False, temperature=0.0, seed=0
)


@contextmanager
def raw_server(answer: bytes, *, hold_seconds: float = 0.0) -> Iterator[str]:
    """Sends these bytes to whoever asks, waits, and closes the connection."""

    def serve(listening: socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return  # closed: the test is over
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)
                time.sleep(hold_seconds)

    with create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def ask(url: str, api_key: str | None = None, timeout_seconds: float = 20.0) -> RequestResult:
    async def send() -> RequestResult:
        async with ChatClient(Target(url=url, api_key=api_key, timeout_seconds=timeout_seconds)) as client:
            return await client.send(REQUEST, time.perf_counter())

    return asyncio.run(send())


def body(content: bytes, status: bytes = b"500 Internal Server Error") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
        status,
        len(content),
        content,
    )


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (STREAM + b"\r\n" + b'data: {"choices": 1, oops\n\n', "malformed_event"),  # the wrong shape, then no JSON
        (STREAM + b"\r\n" + b"data: " + b"[" * 100_000 + b"\n\n", "malformed_event"),
        (STREAM + b"\r\n" + b'event: error\ndata: {"message": "no"}\n\n', "stream_error"),
        (STREAM + b"\r\n" + WORD.replace(b'"length"', b'"abort"') + DONE, "given_up"),
        (STREAM + b"Content-Length: 10000\r\n\r\n" + WORD, "connection_lost"),
        (body(b'{"error": {"code": "abandoned", "message": "ours"}}'), "server_abandoned"),
        (body(b'{"error": {"code": "client_limit"}}'), "server_client_limit"),
        (body(b'{"error": {"code": "' + b"x" * 1000 + b'"}}'), "x" * 64),
        (body(b"", b"302 Found\r\nLocation: http://127.0.0.1:9/"), "http_302"),
        (b"no HTTP at all\r\n\r\n", "connection_failed"),
    ],
)
def test_every_answer_is_a_result(answer: bytes, code: str) -> None:
    with raw_server(answer) as url:
        result = ask(url)
    assert result.error is not None
    assert result.error.code == code
    assert result.id == 7
    assert ending_of(result) is Ending.FAILED


def test_what_was_said_before_the_connection_broke_counts() -> None:
    error = b'data: {"error": {"code": "adapter_evicted", "message": "gone"}}\n\n'
    with raw_server(STREAM + b"Content-Length: 10000\r\n\r\n" + WORD + error) as url:
        assert (result := ask(url)).error is not None
    assert result.error.code == "adapter_evicted"


def test_an_answer_that_is_whole_is_whole_though_the_connection_breaks_or_stays() -> None:
    with raw_server(STREAM + b"Content-Length: 10000\r\n\r\n" + WORD + DONE) as url:
        assert ask(url).error is None
    with raw_server(STREAM + b"Content-Length: 10000\r\n\r\n" + WORD + DONE, hold_seconds=6) as url:
        started = time.perf_counter()
        assert ask(url).error is None
        assert time.perf_counter() - started < 5


@pytest.mark.parametrize("number", [b"-5", b"9" * 400, b"1e300", b'"many"'])
def test_numbers_of_tokens_that_cannot_be_are_not_taken(number: bytes) -> None:
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": %s}}\n\n' % number
    with raw_server(STREAM + b"\r\n" + WORD + usage + DONE) as url:
        result = ask(url)
    assert (result.error, result.num_output_tokens) == (None, 1)


def test_a_key_that_the_server_echoes_is_not_kept() -> None:
    content = b'{"error": {"code": "bad_%s", "message": "wrong key: %s"}}' % (KEY.encode(), KEY.encode())
    with raw_server(body(content, b"401 Unauthorized")) as url:
        result = ask(url, api_key=KEY)
    assert result.error is not None
    assert (result.error.code, result.error.message) == ("bad_***", "wrong key: ***")
    assert KEY not in repr(result)


def test_metrics_in_an_odd_charset_are_read_or_left() -> None:
    async def metrics(url: str) -> str | None:
        async with ChatClient(url) as client:
            pages: ServerPages = client.pages
            return await pages.metrics()

    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=hex\r\nContent-Length: 5\r\n\r\nup 1\n"
    with raw_server(answer) as url:
        assert asyncio.run(metrics(url)) == "up 1\n"
