"""Tool calls and reasoning over HTTP: a scripted engine says what it is asked, a template of Hermes' form reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionToolParam

from byte_tokenizer import CHAT_TEMPLATE, save_tokenizer
from live_server import live_server, server_config
from strict_client import strict_client
from test_http_api import CHAT, events

# The template tells the model nothing of tools; what it contains tells the server how calls are written.
TEMPLATE = (
    CHAT_TEMPLATE.replace("'assistant'] %}", "'assistant', 'tool'] %}").replace(
        "message.content", "(message.content or '') + (message.tool_calls | tojson if message.tool_calls else '')"
    )
    + "{% if tools %}{# <tool_call> <think> #}{% endif %}"
)

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": [1, "é"]}}\n</tool_call>'
TOOL: ChatCompletionToolParam = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("server")
    save_tokenizer(folder / "model", TEMPLATE)
    with live_server(server_config(folder, max_model_len=1024)) as client:
        yield client


@pytest.fixture
def official(client: httpx.Client) -> Iterator[openai.OpenAI]:
    with strict_client(client.base_url) as official:
        yield official


def say(client: httpx.Client, text: str, **fields: object) -> Any:
    body = {"messages": [{"role": "user", "content": text}], "tools": [TOOL], **fields}
    reply = client.post(CHAT, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_call_whole(official: openai.OpenAI) -> None:
    reply = official.chat.completions.create(
        model="base", messages=[{"role": "user", "content": f"I look.\n{CALL}"}], tools=[TOOL]
    )
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("f", '{"x": [1, "é"]}')


def test_two_calls_in_a_stream(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": f"{CALL}\n{CALL}"}], "tools": [TOOL], "stream": True}
    chunks = [chunk["choices"][0] for chunk in events(client.post(CHAT, json=body)) if chunk["choices"]]
    pieces = [piece for chunk in chunks for piece in chunk["delta"].get("tool_calls", [])]
    assert [piece["index"] for piece in pieces] == [0, 0, 1, 1]
    assert [piece["function"].get("name") for piece in pieces] == ["f", None, "f", None]
    assert "".join(piece["function"]["arguments"] for piece in pieces[:2]) == '{"x": [1, "é"]}'
    assert pieces[0]["id"] != pieces[2]["id"]
    assert chunks[-1]["finish_reason"] == "tool_calls"
    assert all(chunk["finish_reason"] is None for chunk in chunks[:-1])


def test_one_call_where_no_more_are_wanted_ends_the_answer(client: httpx.Client) -> None:
    choice = say(client, f"{CALL}\n{CALL} and more", parallel_tool_calls=False)["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"


def test_a_call_cut_off_or_broken_is_text(client: httpx.Client) -> None:
    broken = say(client, '<tool_call>\n{"name": \n</tool_call>')["choices"][0]
    assert "tool_calls" not in broken["message"]
    assert '{"name":' in broken["message"]["content"]
    assert broken["finish_reason"] == "stop"
    cut = say(client, CALL, max_tokens=20)["choices"][0]
    assert "tool_calls" not in cut["message"]
    assert cut["finish_reason"] == "length"


def test_calls_are_words_where_no_tool_may_be_called(client: httpx.Client) -> None:
    message = say(client, CALL, tool_choice="none")["choices"][0]["message"]
    assert message == {"role": "assistant", "content": CALL, "refusal": None}
    without = client.post(CHAT, json={"messages": [{"role": "user", "content": CALL}]}).json()
    assert without["choices"][0]["message"]["content"] == CALL


def test_reasoning_comes_apart_under_both_names(client: httpx.Client) -> None:
    reply = say(client, "<think>Hm, so.</think>\n\nYes.")
    message = reply["choices"][0]["message"]
    assert (message["reasoning_content"], message["reasoning"], message["content"]) == ("Hm, so.", "Hm, so.", "Yes.")
    assert 0 < reply["usage"]["completion_tokens_details"]["reasoning_tokens"] < reply["usage"]["completion_tokens"]
    body = {"messages": [{"role": "user", "content": "<think>Hm, so.</think>\n\nYes."}], "stream": True}
    deltas = [chunk["choices"][0]["delta"] for chunk in events(client.post(CHAT, json=body))]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm, so."
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes."


def test_every_choice_is_taken_apart_by_itself(client: httpx.Client) -> None:
    choices = say(client, CALL, n=3)["choices"]
    assert [len(choice["message"]["tool_calls"]) for choice in choices] == [1, 1, 1]
    assert len({choice["message"]["tool_calls"][0]["id"] for choice in choices}) == 3


def test_half_a_character_in_a_call_that_is_sent_back_hurts_nobody(client: httpx.Client) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]
    assert client.post(CHAT, json={"messages": messages, "tools": [TOOL]}).status_code == 200


def test_calls_and_their_results_go_back_into_the_prompt(client: httpx.Client) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 5}'}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "call_1"},
    ]
    text = client.post(CHAT, json={"messages": messages, "tools": [TOOL]}).json()["choices"][0]["message"]["content"]
    assert '"arguments": {"x": 5}' in text, "as an object, as templates expect it"
    assert "42" in text
