"""The engine client against a real, scripted process: start, stream, abort, death, restart, giving up."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest

import scripted_engine
from heddle_adapters.mix import AdapterPart
from heddle_server.api import engine_client
from heddle_server.api.engine_client import EngineClient, EngineFailed
from heddle_server.api.errors import EngineUnavailable
from heddle_server.config import EngineConfig
from heddle_server.messages import StartupProgress, StepOutput, TokenOutput
from heddle_server.request import Request, SamplingParams
from live_server import SCRIPTED_ENGINE


@asynccontextmanager
async def engine(name: str = "scripted", **options: Callable[..., None] | int) -> AsyncGenerator[EngineClient, None]:
    config = EngineConfig(model_path="", model_name=name, store_path="")
    client = EngineClient(config, command=SCRIPTED_ENGINE, **options)  # type: ignore[arg-type]
    client.start()
    try:
        yield client
    finally:
        await client.close()


def request(number: int, text: str = "Hello", seed: int = 0, adapter: str | None = None) -> Request:
    sampling = SamplingParams(max_tokens=50, seed=seed)
    parts = () if adapter is None else (AdapterPart(adapter),)
    return Request(request_id=number, prompt_token_ids=list(text.encode()), sampling=sampling, adapters=parts)


async def outputs(client: EngineClient, asked: Request) -> list[TokenOutput]:
    return [output async for output in client.generate(asked)]


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_true():  # noqa: ASYNC110  (what is watched has no event to wait for)
            await asyncio.sleep(0.01)


def engine_pid(client: EngineClient) -> int:
    assert client._process is not None
    return client._process.pid


def has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_start_tells_phases_and_the_model() -> None:
    async def scenario() -> None:
        phases: list[StartupProgress] = []
        async with engine(on_progress=phases.append) as client:
            assert not client.is_ready
            with pytest.raises(EngineUnavailable):
                await outputs(client, request(1))
            model = await client.wait_ready()
            assert model.layout == scripted_engine.LAYOUT
            assert [phase.phase for phase in phases] == ["weights"]

    asyncio.run(scenario())


def test_requests_run_beside_each_other() -> None:
    async def scenario() -> None:
        async with engine() as client:
            await client.wait_ready()
            texts = [f"answer {number}" for number in range(20)]
            answers = await asyncio.gather(*(outputs(client, request(n, text)) for n, text in enumerate(texts)))
            for text, answer in zip(texts, answers, strict=True):
                token_ids = [token_id for output in answer for token_id in output.token_ids]
                assert token_ids == [*text.encode(), scripted_engine.EOS]
                assert answer[-1].finish_reason == "stop"
            assert client.stats is not None
            await until(lambda: client.stats is not None and client.stats.num_running == 0)

    asyncio.run(scenario())


def test_leaving_early_aborts_the_request_in_the_engine() -> None:
    async def scenario() -> None:
        async with engine() as client:
            await client.wait_ready()
            answer = client.generate(request(1, seed=scripted_engine.NEVER_ENDS))
            await anext(answer)
            assert client.stats is not None
            assert client.stats.num_running == 1
            await answer.aclose()
            await until(lambda: client.stats is not None and client.stats.num_running == 0)

    asyncio.run(scenario())


def test_death_ends_every_request_with_an_error_and_the_engine_comes_back() -> None:
    async def scenario() -> None:
        async with engine() as client:
            await client.wait_ready()
            endless = asyncio.create_task(outputs(client, request(1, seed=scripted_engine.NEVER_ENDS)))
            answer = await outputs(client, request(2, seed=scripted_engine.DIES))
            assert len(answer) <= 3
            for last in (answer[-1], (await endless)[-1]):
                assert (last.finish_reason, last.error_code) == ("error", "engine_died")
            assert not client.is_ready
            with pytest.raises(EngineUnavailable):
                await outputs(client, request(3))
            await client.wait_ready()
            assert (await outputs(client, request(4)))[-1].finish_reason == "stop"
            assert client.num_restarts == 1

    asyncio.run(scenario())


def test_deaths_with_answers_between_them_are_not_counted_together() -> None:
    async def scenario() -> None:
        async with engine(max_restarts=1) as client:
            for number in range(3):
                await client.wait_ready()
                await outputs(client, request(2 * number))
                await outputs(client, request(2 * number + 1, seed=scripted_engine.DIES_AT_ONCE))
                assert not client.is_ready
            await client.wait_ready()

    asyncio.run(scenario())


def test_deaths_of_an_engine_that_was_stable_are_not_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "STABLE_SECONDS", 0.0)

    async def scenario() -> None:
        async with engine(max_restarts=1) as client:
            for number in range(3):
                await client.wait_ready()
                await outputs(client, request(number, seed=scripted_engine.DIES_AT_ONCE))
            await client.wait_ready()

    asyncio.run(scenario())


def test_gives_up_after_failed_restarts_in_a_row() -> None:
    async def scenario() -> None:
        reasons: list[str] = []
        async with engine(scripted_engine.DIES_AT_START, max_restarts=2, on_failed=reasons.append) as client:
            with pytest.raises(EngineFailed, match="status 3"):
                await client.wait_ready()
            assert client.num_restarts == 2
            assert reasons == ["The engine process ended with status 3."]

    asyncio.run(scenario())


def test_what_the_engine_refuses_is_not_tried_again() -> None:
    async def scenario() -> None:
        async with engine(scripted_engine.REFUSES_TO_START) as client:
            with pytest.raises(EngineFailed, match=r"These weights cannot be served\."):
                await client.wait_ready()
            assert client.num_restarts == 0

    asyncio.run(scenario())


def test_an_engine_that_cannot_be_launched_is_given_up() -> None:
    async def scenario() -> None:
        config = EngineConfig(model_path="", model_name="scripted", store_path="")
        client = EngineClient(config, command=("/no/such/program",))
        client.start()
        with pytest.raises(EngineFailed, match="could not be started"):
            await client.wait_ready()
        await client.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["scripted", scripted_engine.HANGS_AT_START])
def test_close_leaves_no_process(name: str) -> None:
    async def scenario() -> int:
        async with engine(name) as client:
            if name == "scripted":
                await client.wait_ready()
            else:
                await until(lambda: client._process is not None)
            return engine_pid(client)

    assert has_ended(asyncio.run(scenario()))


def test_close_ends_requests_in_flight() -> None:
    async def scenario() -> None:
        async with engine() as client:
            await client.wait_ready()
            answer = asyncio.create_task(outputs(client, request(1, seed=scripted_engine.NEVER_ENDS)))
            await until(lambda: client.stats is not None and client.stats.num_running == 1)
        assert (await answer)[-1].error_code == "engine_died"

    asyncio.run(scenario())


def test_where_adapters_are_is_mirrored_until_the_engine_ends() -> None:
    async def scenario() -> None:
        async with engine() as client:
            await client.wait_ready()
            assert client.tier_of("sha256:a") == "disk"
            await outputs(client, request(1, adapter="sha256:a"))
            client.pin_adapters({"sha256:b": "local"})
            await until(lambda: client.tier_of("sha256:b") == "device")
            assert client.resident_digests() == {"sha256:a", "sha256:b"}
            client.forget_adapter("sha256:a")
            client.pin_adapters({})
            await until(lambda: client.tier_of("sha256:b") == "host")
            assert client.tier_of("sha256:a") == "disk"
            assert client.resident_digests() == frozenset()
            await outputs(client, request(2, seed=scripted_engine.DIES_AT_ONCE, adapter="sha256:c"))
            await client.wait_ready()
            assert client.tier_of("sha256:b") == "disk"

    asyncio.run(scenario())


def test_every_step_is_told_on() -> None:
    async def scenario() -> None:
        steps: list[StepOutput] = []
        async with engine(on_step=steps.append) as client:
            await client.wait_ready()
            await outputs(client, request(1, adapter="sha256:a"))
            moves = [move for step in steps for move in step.moves]
            assert [(move.source, move.target) for move in moves] == [("disk", "device")]
            assert steps[-1].stats == client.stats

    asyncio.run(scenario())


def test_the_first_token_says_how_the_request_came_to_it() -> None:
    async def scenario() -> None:
        async with engine() as client:
            await client.wait_ready()
            for number, tier in enumerate(("disk", "device")):
                first, *others = await outputs(client, request(number, adapter="sha256:a"))
                assert first.admission is not None
                assert first.admission.tier == tier
                assert all(output.admission is None for output in others)

    asyncio.run(scenario())


def test_the_cache_describes_itself() -> None:
    async def scenario() -> None:
        async with engine() as client:
            with pytest.raises(EngineUnavailable):
                await client.describe_cache()
            await client.wait_ready()
            await outputs(client, request(1, adapter="sha256:a"))
            reports = await asyncio.gather(*(client.describe_cache() for _ in range(5)))
            assert len({report.query_id for report in reports}) == 5
            for report in reports:
                assert [(each.adapter_digest, each.tier) for each in report.adapters] == [("sha256:a", "device")]

    asyncio.run(scenario())


def test_an_engine_that_does_not_describe_its_cache_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with engine() as client:
            await client.wait_ready()
            await outputs(client, request(1, seed=scripted_engine.DESCRIBES_NOTHING))
            monkeypatch.setattr(engine_client, "REPORT_SECONDS", 0.05)
            with pytest.raises(EngineUnavailable, match="busy"):
                await client.describe_cache()
            monkeypatch.setattr(engine_client, "REPORT_SECONDS", 60.0)
            asking = asyncio.create_task(client.describe_cache())
            await outputs(client, request(2, seed=scripted_engine.DIES_AT_ONCE))
            with pytest.raises(EngineUnavailable, match="stopped"):
                await asking

    asyncio.run(scenario())
