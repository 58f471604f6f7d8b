"""openai-python, strictly validating, against `heddle serve`: its helpers, and the page that shows it to people."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel, ConfigDict, Field

from client_packages import CLIENTS
from clients_server import ANSWER, PIRATE, QUESTION, clients_server
from documented import PAGE, snippets
from heddle_demo.data import UPLOAD_DIR
from live_server import wait_until
from strict_client import strict_client
from test_http_api import metric, running

ASKED: ChatCompletionMessageParam = {"role": "user", "content": QUESTION}
RUN_SECONDS = 60


class City(BaseModel):
    """A city."""

    model_config = ConfigDict(extra="forbid")

    city: str = Field(max_length=20)
    big: bool


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with clients_server(tmp_path_factory.mktemp("server")) as server:
        yield server.address


@pytest.fixture
def official(address: str) -> Iterator[openai.OpenAI]:
    with strict_client(address) as official:
        yield official


def test_a_parsed_answer_and_the_conversation_after_it(official: openai.OpenAI) -> None:
    reply = official.chat.completions.parse(model="base", messages=[ASKED], temperature=0, response_format=City)
    message = reply.choices[0].message
    assert isinstance(message.parsed, City)
    told = message.model_dump(warnings=False)  # as programs keep it: with what the client has added
    assert told["parsed"] == message.parsed.model_dump()
    after = official.chat.completions.create(model="base", messages=[ASKED, told, ASKED], temperature=0)  # type: ignore[list-item]
    assert after.choices[0].finish_reason == "stop"


def test_parsed_calls_and_the_conversation_after_them(official: openai.OpenAI) -> None:
    reply = official.chat.completions.parse(
        model="base",
        messages=[ASKED],
        temperature=0,
        tools=[openai.pydantic_function_tool(City)],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    message = reply.choices[0].message
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert isinstance(call.function.parsed_arguments, City)
    result: ChatCompletionMessageParam = {"role": "tool", "tool_call_id": call.id, "content": "It is Paris."}
    told = message.model_dump(warnings=False)
    after = official.chat.completions.create(model="base", messages=[ASKED, told, result], temperature=0)  # type: ignore[list-item]
    assert after.choices[0].finish_reason == "stop"


def test_the_stream_helper(official: openai.OpenAI) -> None:
    options: openai.types.chat.ChatCompletionStreamOptionsParam = {"include_usage": True}
    with official.chat.completions.stream(
        model="pirate", messages=[ASKED], temperature=0, logprobs=True, stream_options=options
    ) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        reply = stream.get_final_completion()
    (choice,) = reply.choices
    assert "".join(pieces) == choice.message.content == PIRATE
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len(choice.logprobs.content)


def test_the_stream_helper_with_a_forced_call(official: openai.OpenAI) -> None:
    with official.chat.completions.stream(
        model="base",
        messages=[ASKED],
        temperature=0,
        tools=[openai.pydantic_function_tool(City)],
        tool_choice="required",
        parallel_tool_calls=False,
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        reply = stream.get_final_completion()
    assert [event.name for event in done] == ["City"]
    assert isinstance(done[0].parsed_arguments, City)
    assert reply.choices[0].finish_reason == "tool_calls"


def test_headers(official: openai.OpenAI) -> None:
    raw = official.chat.completions.with_raw_response.create(
        model="base", messages=[ASKED], temperature=0, extra_body={"adapter": "pirate"}
    )
    assert raw.parse().choices[0].message.content == PIRATE
    assert raw.headers["x-heddle-adapter"] == "pirate@1"
    assert raw.request_id
    assert int(raw.headers["openai-processing-ms"]) >= 0


def test_a_model_is_deleted(official: openai.OpenAI, address: str) -> None:
    robot = UPLOAD_DIR / "robot"
    files = {name: (robot / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    assert httpx.post(f"{address}/v1/adapters", data={"name": "robot"}, files=files).status_code == 201
    assert official.models.retrieve("robot").owned_by == "heddle"
    assert official.models.delete("robot").deleted
    with pytest.raises(openai.NotFoundError) as caught:
        official.models.delete("robot")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_many_at_once_and_one_that_leaves(address: str) -> None:
    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(
            base_url=f"{address}/v1", api_key="unused", max_retries=0, _strict_response_validation=True
        ) as official:
            left = await official.chat.completions.create(
                model="base", messages=[ASKED], max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
            )
            await anext(left)
            asked = [
                official.chat.completions.create(model=model, messages=[ASKED], temperature=0)
                for model in ("base", "pirate") * 4
            ]
            replies = await asyncio.gather(*asked)
            await left.close()
            return [reply.choices[0].message.content for reply in replies]

    with httpx.Client(base_url=address) as client:
        before = metric(client, 'heddle_requests_total{outcome="disconnect"}')
        assert asyncio.run(ask_all()) == [ANSWER, PIRATE] * 4
        wait_until(lambda: running(client) == 0)
        wait_until(lambda: metric(client, 'heddle_requests_total{outcome="disconnect"}') == before + 1)


def test_the_documented_snippets(address: str, tmp_path: Path) -> None:
    script = tmp_path / "documented.py"
    for snippet in snippets("openai for Python"):
        script.write_text(snippet.at(address))
        process = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=RUN_SECONDS)
        assert process.returncode == 0, process.stderr
        assert process.stdout == snippet.output


def test_the_page_names_the_versions_that_are_tried() -> None:
    packages = json.loads((CLIENTS / "js" / "package.json").read_text())["dependencies"]
    tried = {openai.__version__, *packages.values()}
    for client in ("langchain-openai", "litellm", "lm-eval"):
        (version,) = [
            line.partition("==")[2]
            for file in CLIENTS.glob("*.txt")
            for line in file.read_text().splitlines()
            if line.partition("==")[0].partition("[")[0] == client
        ]
        tried.add(version)
    table = PAGE.read_text().partition("| client |")[2].partition("\n## ")[0]
    assert [version for version in sorted(tried) if version not in table] == []
