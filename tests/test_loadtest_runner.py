"""Schedules on a real server of known speed: what is sent when, and what is recorded of it."""

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_openai_server import FAULTS, FakeOpenAIServer
from heddle_loadtest.client.result import RequestResult
from heddle_loadtest.client.target import Target
from heddle_loadtest.run.dispatcher import Dispatcher
from heddle_loadtest.run.outcome import Outcome
from heddle_loadtest.run.runner import run_schedule
from heddle_loadtest.workload.schedule import Schedule, ScheduledRequest, ScheduledUpload

CODES = {
    "overloaded": "adapter_capacity",
    "teapot": "http_418",
    "unstreamed": "not_an_event_stream",
    "poisoned": "adapter_evicted",
    "garbled": "malformed_event",
    "cut": "stream_interrupted",
    "dropped": "connection_lost",
    "stuck": "timeout",
    "frail": "connection_failed",
}


@pytest.fixture
def server() -> Iterator[FakeOpenAIServer]:
    with FakeOpenAIServer() as server:
        yield server


def request(id: int, at_seconds: float | None = None, **fields: Any) -> ScheduledRequest:
    defaults: dict[str, Any] = {
        "prompt": f"Question {id}",
        "max_tokens": 2,
        "ignore_eos": False,
        "temperature": 0.0,
        "seed": id,
    }
    return ScheduledRequest(id=id, at_seconds=at_seconds, **defaults | fields)


def run(server: FakeOpenAIServer, schedule: Schedule, timeout_seconds: float = 30.0, **options: Any) -> Outcome:
    target = Target(url=server.url, model="tiny", timeout_seconds=timeout_seconds)
    return asyncio.run(run_schedule(schedule, target, **options))


def run_and_stop(server: FakeOpenAIServer, schedule: Schedule, when: Callable[[FakeOpenAIServer], bool]) -> Outcome:
    async def both() -> Outcome:
        stop = asyncio.Event()
        running = asyncio.create_task(run_schedule(schedule, Target(url=server.url, model="tiny"), stop=stop))
        async with asyncio.timeout(30):
            while not when(server):  # noqa: ASYNC110 - the server is in another thread
                await asyncio.sleep(0.01)
        stop.set()
        return await running

    return asyncio.run(both())


def asked(server: FakeOpenAIServer) -> list[str]:
    return [body["messages"][0]["content"] for body in server.bodies]


# Open loops ----------------------------------------------------------------------------------------------------------


def test_open_loop_does_not_wait_for_answers() -> None:
    schedule = Schedule(requests=tuple(request(index, index / 50, max_tokens=1) for index in range(50)))
    with FakeOpenAIServer(ttft_seconds=1.5) as slow:
        outcome = run(slow, schedule)
        assert slow.max_in_flight == 50  # all were sent within the first second, none answered before the last was
    assert all(result.is_ok for result in outcome.results)
    assert asked(slow) == [f"Question {index}" for index in range(50)]
    for result in outcome.results:
        assert result.scheduled_seconds == pytest.approx(outcome.started_seconds + result.id / 50)
        assert 0 <= result.lag_seconds < 0.4
    assert outcome.ended_seconds - outcome.started_seconds > 2.4


def test_latency_counts_from_the_schedule_when_the_client_is_held_up(server: FakeOpenAIServer) -> None:
    """The callback of the first answer blocks the event loop past the second request's time."""
    schedule = Schedule(requests=(request(0, 0.0), request(1, 0.12)))

    def hold_up(result: RequestResult) -> None:
        if result.id == 0:
            time.sleep(max(0.0, result.scheduled_seconds + 0.6 - time.perf_counter()))

    outcome = run(server, schedule, on_result=hold_up)
    late = outcome.results[1]
    assert late.id == 1
    assert late.lag_seconds >= 0.4  # due at 0.12 s, free at 0.6 s
    assert late.ttft_seconds is not None
    assert late.ttft_seconds >= late.lag_seconds + 0.05
    assert max(outcome.health.loop_lag_seconds) > 0.3


def test_idle_client_has_little_lag_and_little_to_do(server: FakeOpenAIServer) -> None:
    outcome = run(server, Schedule(requests=(request(0, 0.0), request(1, 0.5))))
    lags = sorted(outcome.health.loop_lag_seconds)
    assert len(lags) >= 5
    assert lags[len(lags) // 2] < 0.010
    assert outcome.health.cpu_share < 0.9


def test_errors_are_recorded_by_code(server: FakeOpenAIServer) -> None:
    assert set(CODES) | {"silent"} == set(FAULTS)
    requests = tuple(request(index, 0.01 * index, adapter=name, max_tokens=5) for index, name in enumerate(FAULTS))
    outcome = run(server, Schedule(requests=requests), timeout_seconds=1.0)
    assert {result.adapter: result.error.code for result in outcome.results if result.error} == CODES
    assert all(result.error.message for result in outcome.results if result.error)
    assert [result.adapter for result in outcome.results if result.is_ok] == ["silent"]


# Closed loops --------------------------------------------------------------------------------------------------------


def test_closed_loop_keeps_its_streams_and_its_order(server: FakeOpenAIServer) -> None:
    schedule = Schedule(requests=tuple(request(index) for index in range(9)), streams={"": 3})
    outcome = run(server, schedule)
    assert asked(server) == [f"Question {index}" for index in range(9)]
    assert server.max_in_flight == 3
    assert sorted(result.id for result in outcome.results) == list(range(9))
    for result in outcome.results:
        assert result.lag_seconds < 0.05  # due when its stream was free, so never before it could be sent


def test_closed_loop_begins_again_under_new_ids(server: FakeOpenAIServer) -> None:
    schedule = Schedule(requests=tuple(request(index) for index in range(3)), streams={"": 1}, seconds=0.6)
    outcome = run(server, schedule)
    ids = [result.id for result in outcome.results]
    assert ids == list(range(len(ids)))
    assert len(ids) > 3
    assert asked(server) == [f"Question {index % 3}" for index in ids]
    assert all(result.is_ok for result in outcome.results)  # what is under way at the end is awaited
    assert outcome.results[-1].started_seconds < outcome.started_seconds + 0.6
    assert not outcome.was_interrupted


def test_closed_loop_may_be_kept_from_beginning_again(server: FakeOpenAIServer) -> None:
    schedule = Schedule(requests=tuple(request(index) for index in range(3)), streams={"": 2}, seconds=20.0)
    outcome = run(server, schedule, begins_again=False)
    assert len(outcome.results) == 3
    assert outcome.ended_seconds - outcome.started_seconds < 10


def test_tenants_have_loops_and_keys_of_their_own(server: FakeOpenAIServer) -> None:
    gold = [request(index, tenant="gold") for index in range(4)]
    iron = [request(index, tenant="iron") for index in range(4, 6)]
    timed = [request(6, 0.1, tenant="open")]
    schedule = Schedule(requests=(*gold, *iron, *timed), streams={"gold": 2, "iron": 1})
    outcome = run(server, schedule, tenant_keys={"gold": "of-gold"})
    assert Counter(result.tenant for result in outcome.results) == {"gold": 4, "iron": 2, "open": 1}
    assert Counter(server.keys) == {"Bearer of-gold": 4, None: 3}
    assert "of-gold" not in repr(outcome)


def test_failing_target_is_not_hammered(server: FakeOpenAIServer) -> None:
    schedule = Schedule(requests=(request(0, adapter="overloaded"),), streams={"": 1}, seconds=0.5)
    assert 1 <= len(run(server, schedule).results) <= 5


# The end -------------------------------------------------------------------------------------------------------------


def test_stop_abandons_what_is_under_way_and_loses_nothing(server: FakeOpenAIServer) -> None:
    adapters = ("base", "stuck", "stuck")
    timed = tuple(request(index, 0.0, adapter=adapter) for index, adapter in enumerate(adapters))
    looped = tuple(request(index, tenant="loop", adapter="stuck") for index in range(3, 6))
    schedule = Schedule(requests=(*timed, *looped, request(6, 3600.0)), streams={"loop": 1})
    outcome = run_and_stop(server, schedule, lambda server: len(server.bodies) == 4)
    assert outcome.was_interrupted
    assert sorted(result.id for result in outcome.results) == [0, 1, 2, 3]  # 4 to 6 were never sent
    codes = {result.id: result.error.code if result.error else "" for result in outcome.results}
    assert {codes[1], codes[2], codes[3]} == {"abandoned"}
    assert codes[0] in ("", "abandoned")
    assert outcome.ended_seconds - outcome.started_seconds < 20


def test_stop_amid_many_starts_leaves_no_mess(server: FakeOpenAIServer, caplog: pytest.LogCaptureFixture) -> None:
    schedule = Schedule(requests=tuple(request(index, index / 1000) for index in range(5000)))
    for _ in range(3):
        num_before = len(server.bodies)
        outcome = run_and_stop(server, schedule, lambda server: len(server.bodies) > num_before + 50)  # noqa: B023
        assert any(result.error and result.error.code == "abandoned" for result in outcome.results)
        assert len(outcome.results) < 5000
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


def test_dispatcher_starts_nothing_in_the_turn_it_is_cancelled_in() -> None:
    """Where its timer is already on the event loop's list, behind whoever cancels it."""

    async def started_after_cancelling() -> list[int]:
        started: list[int] = []
        dispatcher = Dispatcher([request(0, 0.02)], time.perf_counter(), lambda one, due: started.append(one.id))
        task = asyncio.create_task(dispatcher.run())
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(task.cancel)
        time.sleep(0.05)  # noqa: ASYNC251 - the timer is to be due when the loop goes on
        await asyncio.wait([task])
        return started

    assert asyncio.run(started_after_cancelling()) == []


def test_stop_before_the_start_sends_nothing(server: FakeOpenAIServer) -> None:
    async def stopped() -> Outcome:
        stop = asyncio.Event()
        stop.set()
        return await run_schedule(Schedule(requests=(request(0, 0.0),)), Target(url=server.url), stop=stop)

    assert asyncio.run(stopped()).results == ()
    assert server.bodies == []


def test_error_in_a_callback_ends_the_run(server: FakeOpenAIServer) -> None:
    def fail(result: RequestResult) -> None:
        raise RuntimeError("mine")

    schedule = Schedule(requests=(request(0, 0.0), request(1, 3600.0)))
    with pytest.raises(ExceptionGroup) as caught:
        run(server, schedule, on_result=fail)
    assert caught.group_contains(RuntimeError, match="mine")


# Beside the requests -------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    (folder / name / "adapter_config.json").write_bytes(b'{"r": 4}')
    (folder / name / "adapter_model.safetensors").write_bytes(name.encode() * 100_000)


def test_adapters_are_uploaded_at_their_times(server: FakeOpenAIServer, tmp_path: Path) -> None:
    for name in ("fresh", "unfit"):
        write_adapter(tmp_path, name)
    uploads = tuple(ScheduledUpload(at_seconds=at, adapter=name) for at, name in ((0.1, "fresh"), (0.2, "unfit")))
    uploads = (*uploads, ScheduledUpload(at_seconds=0.3, adapter="lost"))
    schedule = Schedule(requests=(request(0, 0.0), request(1, 0.6, adapter="fresh")), uploads=uploads)
    outcome = run(server, schedule, adapter_files=tmp_path)
    assert {name: sorted(files) for name, files in server.uploads.items()} == {
        "fresh": ["adapter_config.json", "adapter_model.safetensors"]
    }
    assert server.uploads["fresh"]["adapter_model.safetensors"] == b"fresh" * 100_000
    fresh, unfit, lost = sorted(outcome.uploads, key=lambda upload: upload.scheduled_seconds)
    assert (fresh.adapter, fresh.http_status, fresh.error) == ("fresh", 201, None)
    assert fresh.scheduled_seconds == pytest.approx(outcome.started_seconds + 0.1)
    assert fresh.finished_seconds > fresh.scheduled_seconds
    assert (unfit.http_status, unfit.error) == (400, "adapter_incompatible: made for another base")
    assert lost.http_status is None
    assert lost.error is not None
    assert lost.error.startswith("unreadable_file: ")


def test_metrics_are_scraped_before_between_and_after(server: FakeOpenAIServer) -> None:
    outcome = run(server, Schedule(requests=(request(0, 0.0), request(1, 1.3))))
    counts = [scrape.samples['requests_total{adapter="a b}\\"",path="/v1"}'] for scrape in outcome.scrapes]
    assert (counts[0], counts[-1], len(counts)) == (0.0, 2.0, 3)
    assert counts == sorted(counts)
    assert outcome.scrapes[0].at_seconds < outcome.started_seconds
    assert outcome.scrapes[-1].at_seconds > outcome.ended_seconds
    assert outcome.scrapes[0].samples["running"] == 0.0


def test_garbage_collector_is_left_as_it_was(server: FakeOpenAIServer) -> None:
    before = (gc.get_threshold(), gc.isenabled())
    seen: list[int] = []
    run(server, Schedule(requests=(request(0, 0.0),)), on_result=lambda result: seen.append(gc.get_freeze_count()))
    assert seen[0] > 1000  # what there was is set aside while requests are under way
    assert ((gc.get_threshold(), gc.isenabled()), gc.get_freeze_count()) == (before, 0)


def test_target_without_metrics_is_not_asked_again() -> None:
    with FakeOpenAIServer(has_metrics=False) as server:
        assert run(server, Schedule(requests=(request(0, 0.0),))).scrapes == ()
