"""Several answers in one reply: `n`, lists of prompts, `echo`, whole and streamed, in front of a scripted engine."""

from __future__ import annotations

import json
import socket
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

import scripted_engine
from heddle_server.api import admission
from live_server import live_server, server_config, wait_until
from strict_client import strict_client
from test_http_api import CHAT, HELLO, QUESTION, events, metric, refusal, running

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with live_server(server_config(tmp_path_factory.mktemp("server"))) as client:
        yield client


@pytest.fixture
def official(client: httpx.Client) -> Iterator[openai.OpenAI]:
    with strict_client(client.base_url) as official:
        yield official


def texts(chunks: list[Any], part: str) -> dict[int, str]:
    """What each choice of a stream came to."""
    told = defaultdict[int, str](str)
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        told[choice["index"]] += choice["text"] if part == "text" else choice["delta"].get("content", "")
    return dict(told)


def test_n_answers_one_prompt(official: openai.OpenAI) -> None:
    reply = official.chat.completions.create(model="base", messages=[QUESTION], n=3)
    assert [(choice.index, choice.message.content) for choice in reply.choices] == [(n, "Hello") for n in range(3)]
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (8, 18)
    assert reply.system_fingerprint is not None
    assert reply.system_fingerprint.startswith("fp_")


def test_n_streams_side_by_side(client: httpx.Client, official: openai.OpenAI) -> None:
    body = {"messages": HELLO, "n": 3, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(client.post(CHAT, json=body))
    assert texts(chunks, "delta") == dict.fromkeys(range(3), "Hello")
    ends = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert sorted(choice["index"] for choice in ends) == [0, 1, 2]
    assert chunks[-1]["usage"]["completion_tokens"] == 18
    order = [choice["index"] for chunk in chunks for choice in chunk["choices"]]
    assert order != sorted(order), "one after the other"
    stream = official.chat.completions.create(model="base", messages=[QUESTION], n=2, stream=True)
    assert {choice.index for chunk in stream for choice in chunk.choices} == {0, 1}


def test_prompts_in_a_list_are_answered_each(official: openai.OpenAI, client: httpx.Client) -> None:
    reply = official.completions.create(model="base", prompt=["ab", "cde"], n=2)
    assert [choice.text for choice in reply.choices] == ["ab", "ab", "cde", "cde"]
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == 5
    ids = client.post(COMPLETIONS, json={"prompt": [[97], [98, 99]], "stream": True})
    assert texts(events(ids), "text") == {0: "a", 1: "bc"}


def test_one_that_fails_ends_all_and_leaves_nothing(client: httpx.Client) -> None:
    body = {"messages": HELLO, "seed": scripted_engine.NEVER_ENDS, "n": 2}  # the second finds its adapter damaged
    assert refusal(client.post(CHAT, json=body)) == (422, "adapter_damaged", "adapter")
    wait_until(lambda: running(client) == 0)
    *_, last = events(client.post(CHAT, json={**body, "stream": True}))
    assert last["error"]["code"] == "adapter_damaged"
    wait_until(lambda: running(client) == 0)


def test_echo_repeats_the_prompt(client: httpx.Client) -> None:
    # Nothing judges a first token: null, as OpenAI had it, though its client's type forbids that.
    reply = client.post(COMPLETIONS, json={"prompt": "ab", "echo": True, "logprobs": 1}).json()["choices"][0]
    assert reply["text"] == "abab"
    assert reply["logprobs"] == {
        "tokens": ["a", "b", "a", "b", "<|eos|>"],
        "token_logprobs": [None, -0.25, -0.5, -0.5, -0.5],
        "top_logprobs": [None, {"b": -0.25}, {"a": -0.5}, {"b": -0.5}, {"<|eos|>": -0.5}],
        "text_offset": [0, 1, 2, 3, 4],
    }
    assert client.post(COMPLETIONS, json={"prompt": [97, 98], "echo": True}).json()["choices"][0]["text"] == "abab"


def test_echo_in_a_stream_comes_once(client: httpx.Client) -> None:
    body = {"prompt": ["ab", "c"], "echo": True, "logprobs": 0, "stream": True}
    chunks = events(client.post(COMPLETIONS, json=body))
    assert texts(chunks, "text") == {0: "abab", 1: "cc"}
    tokens = [
        token
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == 0 and choice["logprobs"]
        for token in choice["logprobs"]["tokens"]
    ]
    assert tokens == ["a", "b", "a", "b", "<|eos|>"]


def test_too_many_prompts_and_a_bad_one_among_good(client: httpx.Client) -> None:
    assert refusal(client.post(COMPLETIONS, json={"prompt": ["a"] * 65})) == (400, "invalid_request", "prompt")
    assert refusal(client.post(COMPLETIONS, json={"prompt": ["a", ""]})) == (400, "invalid_request", "prompt")
    assert refusal(client.post(COMPLETIONS, json={"prompt": [[97], [264]]})) == (400, "invalid_request", "prompt")
    wait_until(lambda: running(client) == 0)


def test_the_stop_string_is_kept_where_asked(client: httpx.Client) -> None:
    body = {"prompt": "one two three", "stop": ["two"], "max_tokens": 40, "include_stop_str_in_output": True}
    assert client.post(COMPLETIONS, json=body).json()["choices"][0]["text"] == "one two"


def test_headers_say_what_was_used_and_how_long_it_took(client: httpx.Client) -> None:
    headers = client.post(CHAT, json={"messages": HELLO}).headers
    assert int(headers["openai-processing-ms"]) >= 0
    assert "x-heddle-adapter" not in headers
    assert "warning" not in headers


def test_another_servers_name_for_the_adapter_is_understood_with_a_warning(client: httpx.Client) -> None:
    reply = client.post(CHAT, json={"messages": HELLO, "adapter_id": "base"})
    assert reply.status_code == 200
    assert "adapter" in reply.headers["warning"]
    assert refusal(client.post(CHAT, json={"messages": HELLO, "adapter_id": "nobody"}))[:2] == (
        404,
        "adapter_not_found",
    )


def test_more_than_one_reply_can_be_is_refused(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_PROMPT_LOGPROBS", 100_000)
    assert refusal(client.post(COMPLETIONS, json={"prompt": ["a"] * 17, "n": 8})) == (400, "invalid_request", "n")
    long = {"prompt": [[97] * 60] * 64, "n": 2, "echo": True, "logprobs": 20, "max_tokens": 1}
    assert refusal(client.post(COMPLETIONS, json=long)) == (400, "invalid_request", "echo")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_all_its_answers(client: httpx.Client, stream: bool) -> None:
    # The scripted engine takes seeds for scripts, and the second answer has the next seed: it waits for ever too.
    body = {"messages": HELLO, "seed": scripted_engine.WAITS_TOO, "n": 2, "stream": stream}
    content = json.dumps(body).encode()
    headers = f"host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\n{headers}\r\n".encode() + content)
        wait_until(lambda: metric(client, "heddle_requests_waiting") == 2)
    wait_until(lambda: metric(client, "heddle_requests_waiting") == running(client) == 0)
