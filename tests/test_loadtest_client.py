"""The chat client against a real server of known speed and known faults."""

import asyncio
import socket
import time
from collections.abc import Iterator

import pytest

from fake_openai_server import FAULTS, FakeOpenAIServer
from heddle_loadtest.client.chat_client import ChatClient
from heddle_loadtest.client.result import RequestResult, ServerReport
from heddle_loadtest.client.style import Style
from heddle_loadtest.client.target import Target
from heddle_loadtest.errors import TargetError
from heddle_loadtest.workload.schedule import ScheduledRequest

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[FakeOpenAIServer]:
    with FakeOpenAIServer() as server:
        yield server


def chat(url: str, adapter: str | None = None, timeout_seconds: float = 30.0, max_tokens: int = 5) -> RequestResult:
    async def ask() -> RequestResult:
        async with ChatClient(url, timeout_seconds=timeout_seconds) as client:
            return await client.chat(HELLO, adapter=adapter, model="tiny", max_tokens=max_tokens)

    return asyncio.run(ask())


def closed_port_url() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_answer_is_whole_and_its_times_are_the_servers(server: FakeOpenAIServer) -> None:
    chat(server.url)  # the first request pays for imports and set-up
    result = min(
        (chat(server.url, "poet", max_tokens=20) for _ in range(3)), key=lambda result: result.end_to_end_seconds
    )
    assert result.error is None
    assert result.text == "".join(f"{index} " for index in range(20))
    assert (result.num_prompt_tokens, result.num_output_tokens) == (7, 20)
    assert (result.adapter, result.finish_reason, result.http_status) == ("poet", "length", 200)
    assert result.ttft_seconds is not None
    assert result.tpot_seconds is not None
    assert 0.045 < result.ttft_seconds < 0.120
    assert 0.009 < result.tpot_seconds < 0.020
    assert len(result.inter_token_seconds) == 19
    assert result.scheduled_seconds == result.started_seconds < result.chunk_seconds[0] < result.finished_seconds


@pytest.mark.parametrize(
    ("adapter", "code", "http_status", "text"),
    [
        ("overloaded", "adapter_capacity", 503, ""),
        ("teapot", "http_418", 418, ""),
        ("unstreamed", "not_an_event_stream", 200, ""),
        ("poisoned", "adapter_evicted", 200, "0 1 "),
        ("garbled", "malformed_event", 200, "0 1 "),
        ("cut", "stream_interrupted", 200, "0 1 "),
        ("dropped", "connection_lost", 200, "0 1 "),
        ("stuck", "timeout", 200, ""),
        ("frail", "connection_failed", None, ""),
    ],
)
def test_failure_is_recorded_by_code(
    server: FakeOpenAIServer, adapter: str, code: str, http_status: int | None, text: str
) -> None:
    result = chat(server.url, adapter, timeout_seconds=0.5)
    assert adapter in FAULTS
    assert result.error is not None, FAULTS[adapter]
    assert (result.error.code, result.http_status, result.text) == (code, http_status, text)
    assert result.error.message
    assert not result.is_ok


def test_dead_server_is_recorded_too() -> None:
    result = chat(closed_port_url())
    assert result.error is not None
    assert (result.error.code, result.http_status) == ("connection_failed", None)


def test_chunks_are_counted_where_the_server_reports_no_usage(server: FakeOpenAIServer) -> None:
    result = chat(server.url, "silent")
    assert (result.num_prompt_tokens, result.num_output_tokens, result.is_ok) == (None, 5, True)


@pytest.mark.parametrize(
    ("style", "adapter", "expected"),
    [
        (Style.HEDDLE, "poet", {"model": "tiny", "adapter": "poet"}),
        (Style.HEDDLE, "base", {"model": "tiny"}),
        (Style.VLLM, "poet", {"model": "poet"}),
        (Style.VLLM, None, {"model": "tiny"}),
    ],
)
def test_style_decides_how_the_adapter_is_named(
    server: FakeOpenAIServer, style: Style, adapter: str | None, expected: dict[str, str]
) -> None:
    async def ask() -> RequestResult:
        async with ChatClient(f"{server.url}/v1/", style=style) as client:
            return await client.chat(HELLO, adapter=adapter, model="tiny", max_tokens=1, temperature=0.0, seed=3)

    assert asyncio.run(ask()).is_ok
    fields = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    assert server.bodies[-1] == expected | fields | {"max_tokens": 1, "temperature": 0.0, "seed": 3}


def test_latency_counts_from_the_scheduled_time(server: FakeOpenAIServer) -> None:
    async def ask_late() -> RequestResult:
        async with ChatClient(server.url) as client:
            due_seconds = time.perf_counter() - 1.0
            return await client.chat(HELLO, max_tokens=1, scheduled_seconds=due_seconds)

    result = asyncio.run(ask_late())
    assert result.ttft_seconds is not None
    assert result.ttft_seconds > 1.0
    assert result.end_to_end_seconds > 1.0


def test_more_than_a_hundred_requests_run_at_once() -> None:
    async def ask_all(url: str) -> list[RequestResult]:
        async with ChatClient(url) as client:
            return await asyncio.gather(*(client.chat(HELLO, max_tokens=1) for _ in range(150)))

    with FakeOpenAIServer(ttft_seconds=1.0) as slow:
        results = asyncio.run(ask_all(slow.url))
    assert all(result.is_ok for result in results)
    assert slow.max_in_flight > 100  # aiohttp's own limit, were it left in place


def list_models(url: str, api_key: str | None = None) -> tuple[str, ...]:
    async def ask() -> tuple[str, ...]:
        async with ChatClient(url, api_key) as client:
            return await client.list_models()

    return asyncio.run(ask())


def test_models_are_listed_in_order(server: FakeOpenAIServer) -> None:
    assert list_models(server.url) == ("tiny", "poet", "clerk")


def test_models_of_a_dead_server() -> None:
    with pytest.raises(TargetError, match="no answer from there"):
        list_models(closed_port_url())


def test_models_of_something_else(server: FakeOpenAIServer) -> None:
    with pytest.raises(TargetError, match="HTTP 404"):
        list_models(f"{server.url}/elsewhere")


def test_key_is_sent_and_never_shown() -> None:
    with FakeOpenAIServer(api_key="right") as locked:
        assert list_models(locked.url, "right") == ("tiny", "poet", "clerk")
        with pytest.raises(TargetError, match="refuses it") as caught:
            list_models(locked.url, "sk-wrong")
    assert caught.value.field == "api_key"
    assert "sk-wrong" not in str(caught.value)


def test_client_that_is_not_open_says_so() -> None:
    with pytest.raises(RuntimeError, match="async with"):
        asyncio.run(ChatClient("http://127.0.0.1:1").chat(HELLO))


def scheduled(adapter: str = "poet", prompt: str | list[int] = "Hello", max_tokens: int = 5) -> ScheduledRequest:
    return ScheduledRequest(
        id=7, at_seconds=None, adapter=adapter, tenant="gold", prompt=prompt, max_tokens=max_tokens, ignore_eos=True,
        temperature=0.0, seed=3,
    )  # fmt: skip


def send(url: str, request: ScheduledRequest, api_key: str | None = None, *, keep_text: bool = True) -> RequestResult:
    async def ask() -> RequestResult:
        async with ChatClient(Target(url=url, model="tiny", api_key="of-the-target")) as client:
            return await client.send(request, time.perf_counter(), api_key=api_key, keep_text=keep_text)

    return asyncio.run(ask())


def test_scheduled_request_keeps_its_marks_and_the_servers_report(server: FakeOpenAIServer) -> None:
    result = send(server.url, scheduled())
    assert (result.id, result.adapter, result.tenant, result.text) == (7, "poet", "gold", "0 1 2 3 4 ")
    assert result.server == ServerReport(cache="disk", load_seconds=0.1825, queue_seconds=0.2, ttft_seconds=0.231)
    assert server.bodies[-1]["ignore_eos"] is True
    assert server.keys[-1] == "Bearer of-the-target"


def test_token_ids_are_a_plain_completion(server: FakeOpenAIServer) -> None:
    result = send(server.url, scheduled(prompt=[5, 6, 7]))
    assert (server.paths[-1], server.bodies[-1]["prompt"]) == ("/v1/completions", [5, 6, 7])
    assert (result.text, result.num_output_tokens, result.finish_reason) == ("0 1 2 3 4 ", 5, "length")
    assert len(result.chunk_seconds) == 5


def test_tenants_key_takes_the_place_of_the_targets(server: FakeOpenAIServer) -> None:
    assert send(server.url, scheduled(), "of-the-tenant").is_ok
    assert server.keys[-1] == "Bearer of-the-tenant"


def test_text_is_dropped_where_nobody_wants_it(server: FakeOpenAIServer) -> None:
    result = send(server.url, scheduled(), keep_text=False)
    assert (result.text, len(result.chunk_seconds)) == ("", 5)


def test_cancelled_request_is_abandoned_with_what_had_come(server: FakeOpenAIServer) -> None:
    async def ask_and_give_up() -> RequestResult:
        async with ChatClient(Target(url=server.url, model="tiny")) as client:
            task = asyncio.create_task(client.send(scheduled(max_tokens=1000), time.perf_counter()))
            await asyncio.sleep(0.5)
            task.cancel()
            return await task

    result = asyncio.run(ask_and_give_up())
    assert result.error is not None
    assert (result.error.code, result.http_status) == ("abandoned", 200)
    assert 2 <= len(result.chunk_seconds) < 1000
    assert result.text.startswith("0 1 ")
