"""The trace for aiperf: what it holds is what our own client sends, at the same times."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from fake_openai_server import FakeOpenAIServer
from heddle_loadtest.client.aiperf import write_aiperf_trace
from heddle_loadtest.client.chat_client import ChatClient
from heddle_loadtest.client.style import Style
from heddle_loadtest.client.target import Target
from heddle_loadtest.workload.schedule import Schedule, ScheduledRequest, ScheduledUpload


def asked(id: int, **changes: Any) -> ScheduledRequest:
    fields: dict[str, Any] = {
        "at_seconds": id * 0.0625,
        "adapter": ("base", "poet", "clerk")[id % 3],
        "prompt": f"Question “{id}”?\n",
        "max_tokens": 3 + id,
        "ignore_eos": id % 2 == 0,
        "temperature": 0.5,
        "seed": 40 + id,
    }
    return ScheduledRequest(id=id, **{**fields, **changes})


def written(schedule: Schedule, path: Path, style: Style = Style.HEDDLE, model: str | None = "tiny") -> list[Any]:
    write_aiperf_trace(schedule, style, model, path)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("style", [Style.HEDDLE, Style.VLLM])
def test_payloads_are_what_the_client_sends(tmp_path: Path, style: Style) -> None:
    requests = tuple(asked(id) for id in range(6))

    async def send_all(url: str) -> None:
        async with ChatClient(Target(url=url, style=style, model="tiny")) as client:
            for request in requests:
                result = await client.send(request, time.perf_counter())
                assert result.is_ok, result.error

    with FakeOpenAIServer(ttft_seconds=0, inter_token_seconds=0) as server:
        asyncio.run(send_all(server.url))
    lines = written(Schedule(requests=requests), tmp_path / "aiperf.jsonl", style)
    assert [line["payload"] for line in lines] == server.bodies


def test_times_are_milliseconds(tmp_path: Path) -> None:
    requests = (asked(0, at_seconds=0.0), asked(1, at_seconds=0.25), asked(2, at_seconds=3600.0001234))
    lines = written(Schedule(requests=requests), tmp_path / "aiperf.jsonl")
    assert [line["timestamp"] for line in lines] == [0, 250, 3600000.123]


def test_a_closed_loop_has_no_times_and_uploads_are_left_out(tmp_path: Path) -> None:
    requests = (asked(0, at_seconds=None), asked(1, at_seconds=None))
    upload = ScheduledUpload(at_seconds=1.0, adapter="new")
    lines = written(Schedule(requests=requests, uploads=(upload,), streams={"": 2}), tmp_path / "aiperf.jsonl")
    assert [set(line) for line in lines] == [{"payload"}, {"payload"}]


def test_token_ids_stay_token_ids(tmp_path: Path) -> None:
    (line,) = written(Schedule(requests=(asked(0, prompt=[5, 6, 7]),)), tmp_path / "aiperf.jsonl")
    assert line["payload"]["prompt"] == [5, 6, 7]
    assert "messages" not in line["payload"]
