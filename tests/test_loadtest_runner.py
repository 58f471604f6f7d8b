"""Closed-loop runs against a real server of known speed."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from fake_openai_server import FakeOpenAIServer
from heddle_loadtest.errors import TargetError
from heddle_loadtest.result import RequestResult
from heddle_loadtest.runner import run_closed_loop
from heddle_loadtest.spec import ALL_ADAPTERS, ClosedLoopSpec
from heddle_loadtest.style import AdapterStyle
from heddle_loadtest.summary import Summary


@pytest.fixture
def server() -> Iterator[FakeOpenAIServer]:
    with FakeOpenAIServer(("tiny", "poet", "clerk", "overloaded", "poisoned", "stuck")) as server:
        yield server


def run(server: FakeOpenAIServer, **settings: Any) -> Summary:
    return asyncio.run(run_closed_loop(ClosedLoopSpec(target=server.url, **settings)))


def test_measures_what_the_server_does(server: FakeOpenAIServer) -> None:
    summary = run(server, num_streams=2, num_requests=10, max_tokens=20, adapters=("base", "poet"))
    assert (summary.total.num_ok, summary.total.num_failed, summary.total.num_output_tokens) == (10, 0, 200)
    assert summary.total.ttft_seconds is not None
    assert summary.total.tpot_seconds is not None
    assert 0.045 < summary.total.ttft_seconds.p50 < 0.120
    assert 0.009 < summary.total.tpot_seconds.p50 < 0.020
    # Two streams, each a request of 240 ms after another.
    assert 2.0 < summary.total.requests_per_second < 8.5
    assert [row.num_ok for row in summary.adapters.values()] == [5, 5]


def test_keeps_the_number_of_streams(server: FakeOpenAIServer) -> None:
    results: list[RequestResult] = []
    spec = ClosedLoopSpec(target=server.url, num_streams=3, num_requests=9, max_tokens=3)
    asyncio.run(run_closed_loop(spec, on_result=results.append))
    assert len(results) == 9
    assert server.max_in_flight == 3


def test_ends_after_its_duration_with_whole_answers(server: FakeOpenAIServer) -> None:
    summary = run(server, num_streams=2, duration_seconds=0.4, max_tokens=5)
    assert summary.total.num_ok >= 2
    assert summary.total.num_failed == 0
    assert 0.4 <= summary.elapsed_seconds < 1.5
    assert not summary.was_interrupted


def test_warm_up_is_sent_to_each_adapter_and_not_counted(server: FakeOpenAIServer) -> None:
    summary = run(
        server, num_streams=1, num_requests=1, max_tokens=30, adapters=("poet", "clerk"), num_warmup_requests=2
    )
    assert summary.total.num_ok == 1
    warm_up = server.bodies[:4]
    assert Counter(body["adapter"] for body in warm_up) == {"poet": 2, "clerk": 2}
    assert {body["max_tokens"] for body in warm_up} == {8}
    assert len(server.bodies) == 5


def test_errors_are_counted_by_code_and_adapter(server: FakeOpenAIServer) -> None:
    summary = run(server, num_streams=3, num_requests=9, max_tokens=3, adapters=("base", "overloaded", "poisoned"))
    assert summary.errors == {"adapter_capacity": 3, "adapter_evicted": 3}
    assert summary.error_examples["adapter_capacity"] == "all slots are taken"
    assert [(row.num_ok, row.num_failed) for row in summary.adapters.values()] == [(3, 0), (0, 3), (0, 3)]


def test_failing_target_is_not_hammered(server: FakeOpenAIServer) -> None:
    summary = run(server, num_streams=1, duration_seconds=0.5, adapters=("overloaded",))
    assert 1 <= summary.total.num_failed <= 5


def test_all_adapters_are_those_listed_after_the_base() -> None:
    with FakeOpenAIServer(("tiny", "poet", "clerk")) as server:
        summary = run(server, num_requests=6, max_tokens=1, adapters=ALL_ADAPTERS, style=AdapterStyle.OPENAI)
        assert {name: row.num_ok for name, row in summary.adapters.items()} == {"base": 2, "poet": 2, "clerk": 2}
        assert Counter(body["model"] for body in server.bodies) == {"tiny": 3, "poet": 3, "clerk": 3}
    assert summary.spec.model == "tiny"


def test_base_models_own_name_means_no_adapter(server: FakeOpenAIServer) -> None:
    summary = run(server, num_requests=1, max_tokens=1, adapters=("tiny",))
    assert list(summary.adapters) == ["base"]
    assert all("adapter" not in body for body in server.bodies)


@pytest.mark.parametrize(("field", "value"), [("adapters", ("base", "poett")), ("model", "poett")])
def test_what_the_target_lacks_is_refused_before_the_run(server: FakeOpenAIServer, field: str, value: object) -> None:
    with pytest.raises(TargetError, match="It has: poet") as caught:
        run(server, num_requests=1, **{field: value})
    assert (caught.value.field, caught.value.value) == (field, "poett")
    assert server.bodies == []


def test_target_without_models_is_refused() -> None:
    with FakeOpenAIServer(()) as empty, pytest.raises(TargetError, match="lists no models"):
        run(empty, num_requests=1)


def test_stop_ends_the_run_and_keeps_what_finished(server: FakeOpenAIServer) -> None:
    async def run_and_stop() -> Summary:
        stop = asyncio.Event()
        spec = ClosedLoopSpec(
            target=server.url, num_streams=2, duration_seconds=60, adapters=("base", "stuck"), num_warmup_requests=0
        )
        asyncio.get_running_loop().call_later(1.5, stop.set)
        return await run_closed_loop(spec, stop=stop)

    started_seconds = time.perf_counter()
    summary = asyncio.run(run_and_stop())
    assert time.perf_counter() - started_seconds < 10
    assert summary.was_interrupted
    assert summary.total.num_ok >= 1
    assert summary.total.num_failed == 0


def test_error_in_a_callback_ends_the_run(server: FakeOpenAIServer) -> None:
    def fail(result: RequestResult) -> None:
        raise RuntimeError("mine")

    spec = ClosedLoopSpec(target=server.url, num_streams=2, duration_seconds=60, max_tokens=1)
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(run_closed_loop(spec, on_result=fail))
    assert caught.group_contains(RuntimeError, match="mine")
