"""The HTTP API over real sockets, in front of a scripted engine: shapes, streams, refusals, disconnects."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from tokenizers import AddedToken, Tokenizer

import scripted_engine
from byte_tokenizer import save_tokenizer
from heddle_server.api import streaming
from live_server import live_server, server_config, wait_until
from strict_client import strict_client

CHAT = "/v1/chat/completions"
QUESTION: ChatCompletionMessageParam = {"role": "user", "content": "Hello"}
HELLO = [QUESTION]
TOOL = {"type": "function", "function": {"name": "look_up"}}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with live_server(server_config(tmp_path_factory.mktemp("server"))) as client:
        yield client


@pytest.fixture
def official(client: httpx.Client) -> Iterator[openai.OpenAI]:
    with strict_client(client.base_url) as official:
        yield official


def events(response: httpx.Response) -> list[Any]:
    """The frames of an event stream; checks the framing on the way."""
    frames = response.text.split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    assert frames.pop() == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def refusal(response: httpx.Response) -> tuple[int, str, str | None]:
    """Status, code and param of an error reply; checks the envelope on the way."""
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["code"], str)
    return response.status_code, error["code"], error["param"]


def running(client: httpx.Client) -> float:
    return metric(client, "heddle_requests_running")


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name + " ")), 0.0)


def test_chat_answers_with_openais_shape(client: httpx.Client) -> None:
    reply = client.post(CHAT, json={"model": "base", "messages": HELLO}).json()
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "base"
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert reply["usage"] == {
        "prompt_tokens": 8,  # bos, user, five bytes, assistant
        "completion_tokens": 6,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    heddle = reply["heddle"]
    assert heddle.pop("ttft_ms") > 0
    assert heddle == {
        "adapter": None,
        "version": None,
        "digest": None,
        "cache": None,
        "load_ms": 0.0,
        "queue_ms": scripted_engine.STEP_SECONDS * 1000,
    }


def test_stream_frames(client: httpx.Client) -> None:
    response = client.post(CHAT, json={"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    first, *chunks, last, usage = events(response)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "Hello"
    assert all(chunk["usage"] is None and chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6
    assert len({chunk["id"] for chunk in (first, *chunks, last, usage)}) == 1


def test_stream_without_usage_has_no_usage(client: httpx.Client) -> None:
    chunks = events(client.post(CHAT, json={"messages": HELLO, "stream": True}))
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


def test_characters_split_over_tokens_come_whole(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "🧵 é"}], "stream": True}
    contents = [chunk["choices"][0]["delta"].get("content") for chunk in events(client.post(CHAT, json=body))]
    assert [content for content in contents if content] == ["🧵", " ", "é"]


def test_stop_strings_end_the_answer_and_the_request(client: httpx.Client) -> None:
    body = {"prompt": "one two three", "stop": ["two"], "max_tokens": 40}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("one ", "stop")
    wait_until(lambda: running(client) == 0)


def test_stop_token_ids_are_not_part_of_the_text(client: httpx.Client) -> None:
    body = {"prompt": "abc", "stop_token_ids": [ord("x")]}
    assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == "abc"


def test_completion_takes_token_ids_and_defaults_to_16_tokens(client: httpx.Client) -> None:
    reply = client.post("/v1/completions", json={"model": "", "prompt": [ord("a")] * 20}).json()
    assert reply["choices"][0] == {"index": 0, "text": "a" * 16, "logprobs": None, "finish_reason": "length"}


def test_chat_logprobs(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "é"}], "logprobs": True, "top_logprobs": 2}
    content = client.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content[:2]] == [[0xC3], [0xA9]]
    assert content[0]["token"] == "\ufffd"
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -1.5]


def test_completion_logprobs(client: httpx.Client) -> None:
    logprobs = client.post("/v1/completions", json={"prompt": "ab", "logprobs": 1}).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "<|eos|>"]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["token_logprobs"] == [-0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"][0] == {"a": -0.5}


def test_official_client_accepts_every_shape(official: openai.OpenAI) -> None:
    reply = official.chat.completions.create(model="base", messages=[QUESTION], logprobs=True)
    assert reply.choices[0].message.content == "Hello"
    chunks = list(
        official.chat.completions.create(
            model="base",
            messages=[QUESTION],
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            top_logprobs=1,
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello"
    assert chunks[-1].usage is not None
    completion = official.completions.create(model="base", prompt="Hi", logprobs=1)
    assert completion.choices[0].text == "Hi"
    assert [model.id for model in official.models.list()] == ["scripted-model"]
    assert official.models.retrieve("base").id == "base"
    assert official.models.retrieve("scripted-model").id == "scripted-model"
    with pytest.raises(openai.NotFoundError) as caught:
        official.chat.completions.create(model="scripted-modell", messages=[QUESTION])
    assert caught.value.code == "model_not_found"
    assert "scripted-model" in caught.value.message


def test_official_client_streams_completions(client: httpx.Client) -> None:
    # Not strictly: its type for chunks forbids the null finish_reason that OpenAI itself sends until the last.
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="unused", max_retries=0) as official:
        chunks = list(official.completions.create(model="base", prompt="Hi", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hi"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "stop"]


def test_official_client_selects_an_adapter_by_extra_body(official: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        official.chat.completions.create(model="base", messages=[QUESTION], extra_body={"adapter": "pirate"})
    assert (caught.value.code, caught.value.param) == ("adapter_not_found", "adapter")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{", (400, "invalid_request", None)),
        (b"[]", (400, "invalid_request", None)),
        (b"", (400, "invalid_request", None)),
        (b'{"messages": ' + b"[" * 10_000, (400, "invalid_request", None)),
        (b'{"messages": "x", "model": "\\ud800"}', (400, "invalid_request", "model")),
    ],
)
def test_malformed_bodies(client: httpx.Client, body: bytes, expected: tuple[int, str, str | None]) -> None:
    response = client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert refusal(response) == expected


def test_a_form_is_told_to_be_json(client: httpx.Client) -> None:
    response = client.post(CHAT, content=b"{}", headers={"content-type": "application/x-www-form-urlencoded"})
    assert refusal(response) == (400, "invalid_request", None)
    assert "application/json" in response.json()["error"]["message"]


def test_unknown_routes_and_methods_keep_the_envelope(client: httpx.Client) -> None:
    assert refusal(client.get("/v1/nothing")) == (404, "unknown_route", None)
    wrong_method = client.get(CHAT)
    assert refusal(wrong_method) == (405, "method_not_allowed", None)
    assert wrong_method.headers["allow"] == "POST"


def test_too_large_and_compressed_bodies(client: httpx.Client) -> None:
    big = json.dumps({"messages": [{"role": "user", "content": "x" * (1 << 20)}]}).encode()
    headers = {"content-type": "application/json"}
    assert refusal(client.post(CHAT, content=big, headers=headers))[:2] == (413, "body_too_large")
    chunked = client.post(CHAT, content=iter([big[: 1 << 19], big[1 << 19 :]]), headers=headers)
    assert refusal(chunked)[:2] == (413, "body_too_large")
    assert refusal(client.post(CHAT, content=b"x", headers={"content-encoding": "gzip"}))[:2] == (
        415,
        "unsupported_encoding",
    )


def test_a_prompt_longer_than_the_context_states_both_numbers(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json={"prompt": "x" * 64})
    assert refusal(response) == (400, "context_length_exceeded", "prompt")
    assert response.json()["error"]["message"].count("64") == 2
    long_chat = client.post(CHAT, json={"messages": [{"role": "user", "content": "x" * 100}]})
    assert refusal(long_chat) == (400, "context_length_exceeded", "messages")


def test_max_tokens_is_clamped_only_when_nobody_asked(client: httpx.Client) -> None:
    prompt = "x" * 60
    clamped = client.post("/v1/completions", json={"prompt": prompt}).json()
    assert clamped["usage"]["completion_tokens"] == 4
    asked = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 5})
    assert refusal(asked) == (400, "context_length_exceeded", "max_tokens")
    chat = client.post(CHAT, json={"messages": HELLO, "max_completion_tokens": 1000})
    assert refusal(chat) == (400, "context_length_exceeded", "max_completion_tokens")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"adapter": "nobody"}, (404, "adapter_not_found", "adapter")),
        ({"adapter": "a/../b,c"}, (404, "adapter_not_found", "adapter")),
        ({"model": "nobody"}, (404, "model_not_found", "model")),
        ({"model": "one", "adapter": "two"}, (400, "adapter_conflict", "adapter")),
        ({"model": "one", "adapter": "base"}, (400, "adapter_conflict", "adapter")),
        ({"adapter": {"name": "base", "scale": 2}}, (400, "invalid_request", "adapter.scale")),
        ({"adapter": ["base"]}, (400, "invalid_request", "adapter.0")),
        ({"adapter": [{"name": "scripted-model"}]}, (400, "invalid_request", "adapter.0")),
        ({"adapter": ["nobody", "base"]}, (400, "invalid_request", "adapter.1")),
        ({"adapter": ["nobody", "noone"]}, (404, "adapter_not_found", "adapter")),
        ({"model": "one", "adapter": ["one", "two"]}, (400, "adapter_conflict", "adapter")),
        ({"lora": "one"}, (400, "unknown_parameter", "lora")),
        ({"best_of": 2}, (400, "unsupported_parameter", "best_of")),
        ({"messages": [{"role": "tool", "content": "x"}]}, (400, "invalid_request", "messages.0.tool_call_id")),
        ({"logit_bias": {"264": 1}}, (400, "invalid_request", "logit_bias")),
        ({"stop_token_ids": [264]}, (400, "invalid_request", "stop_token_ids")),
        ({"min_tokens": 60}, (400, "invalid_request", "min_tokens")),
        ({"reasoning_effort": "low"}, (400, "invalid_request", "reasoning_effort")),
        ({"chat_template_kwargs": {"messages": "x"}}, (400, "invalid_request", "chat_template_kwargs.messages")),
        ({"tools": [TOOL]}, (400, "invalid_request", "tools")),
    ],
)
def test_refused_requests(client: httpx.Client, fields: dict[str, Any], expected: tuple[int, str, str]) -> None:
    assert refusal(client.post(CHAT, json={"messages": HELLO, **fields})) == expected


def test_empty_prompts_and_foreign_tokens(client: httpx.Client) -> None:
    assert refusal(client.post("/v1/completions", json={"prompt": ""})) == (400, "invalid_request", "prompt")
    assert refusal(client.post("/v1/completions", json={"prompt": [5, 264]})) == (400, "invalid_request", "prompt")


@pytest.mark.parametrize("adapter", ["base", "scripted-model", None, {"name": "base"}])
def test_every_name_of_the_base(client: httpx.Client, adapter: object) -> None:
    assert client.post(CHAT, json={"messages": HELLO, "adapter": adapter}).status_code == 200


def test_an_empty_name_is_a_forgotten_one_and_not_the_base(client: httpx.Client) -> None:
    for adapter in ("", {"name": ""}):
        assert refusal(client.post(CHAT, json={"messages": HELLO, "adapter": adapter}))[0] == 400


def test_an_error_of_the_engine_is_typed(client: httpx.Client) -> None:
    body = {"messages": HELLO, "seed": scripted_engine.ADAPTER_DAMAGED}
    assert refusal(client.post(CHAT, json=body)) == (422, "adapter_damaged", "adapter")
    *_, last = events(client.post(CHAT, json={**body, "stream": True}))
    assert last["error"]["code"] == "adapter_damaged"


def test_the_official_client_sees_an_error_in_a_stream(official: openai.OpenAI) -> None:
    stream = official.chat.completions.create(
        model="base",
        messages=[QUESTION],
        stream=True,
        seed=scripted_engine.ADAPTER_DAMAGED,
    )
    with pytest.raises(openai.APIError, match="damaged"):
        list(stream)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(client: httpx.Client, stream: bool) -> None:
    body = json.dumps({"messages": HELLO, "seed": scripted_engine.NEVER_ENDS, "stream": stream}).encode()
    headers = f"host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    head = f"POST {CHAT} HTTP/1.1\r\n{headers}\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: running(client) == 1)
        if stream:
            assert b"200 OK" in connection.recv(4096)
    wait_until(lambda: running(client) == 0)
    assert 'heddle_requests_total{outcome="disconnect"}' in client.get("/metrics").text


def test_request_ids_are_echoed_or_made(client: httpx.Client) -> None:
    assert client.get("/livez", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert len(client.get("/livez", headers={"x-request-id": "x" * 500}).headers["x-request-id"]) == 32
    assert client.get("/v1/nothing").headers["x-request-id"]


def test_health_and_metrics(client: httpx.Client) -> None:
    client.post(CHAT, json={"messages": HELLO})
    assert client.get("/livez").json() == {"status": "ok"}
    assert client.get("/health").json() == {"status": "ready"}
    text = client.get("/metrics").text
    for name in ("heddle_ready 1.0", "heddle_pool_pages", "heddle_time_to_first_token_seconds_bucket"):
        assert name in text
    assert metric(client, "heddle_generated_tokens_total") > 0


def test_a_dead_engine_ends_requests_and_comes_back(client: httpx.Client) -> None:
    body = {"messages": HELLO, "seed": scripted_engine.DIES}
    *_, last = events(client.post(CHAT, json={**body, "stream": True}))
    assert last["error"]["code"] == "engine_unavailable"
    wait_until(lambda: client.get("/readyz").status_code == 200)
    response = client.post(CHAT, json=body)
    assert refusal(response)[:2] == (503, "engine_unavailable")
    assert response.headers["retry-after"] == "2"
    wait_until(lambda: client.get("/readyz").status_code == 200)
    assert client.post(CHAT, json={"messages": HELLO}).status_code == 200


def test_a_client_that_does_not_read_is_gone_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "UNREAD_SECONDS", 0.3)
    with live_server(server_config(tmp_path, max_model_len=1 << 30)) as client:
        fields = {"seed": scripted_engine.NEVER_ENDS, "stream": True, "logprobs": True, "top_logprobs": 20, "n": 1}
        body = json.dumps({"messages": HELLO, **fields}).encode()
        headers = f"host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((client.base_url.host, client.base_url.port or 80))
            connection.sendall(f"POST {CHAT} HTTP/1.1\r\n{headers}\r\n".encode() + body)
            wait_until(lambda: running(client) == 1)
            wait_until(lambda: running(client) == 0, seconds=60)


def test_a_full_server_refuses_at_once_and_says_when_to_come_back(tmp_path: Path) -> None:
    with live_server(server_config(tmp_path, max_queued_requests=1)) as client:
        body = {"messages": HELLO, "seed": scripted_engine.NEVER_ENDS, "stream": True}
        with client.stream("POST", CHAT, json=body) as response:
            lines = response.iter_lines()
            next(lines)
            refused = client.post(CHAT, json={"messages": HELLO})
            assert refusal(refused)[:2] == (503, "overloaded")
            assert 1 <= int(refused.headers["retry-after"]) <= 30
        wait_until(lambda: client.post(CHAT, json={"messages": HELLO}).status_code == 200)  # when it has left
        assert refusal(client.post(CHAT, json={"messages": HELLO, "adapter": "nobody"}))[0] == 404
        assert refusal(client.post("/v1/completions", json={"prompt": "x" * 64}))[0] == 400
        assert client.post(CHAT, json={"messages": HELLO}).status_code == 200  # refused requests hold no place
        assert metric(client, 'heddle_requests_refused_total{reason="requests"}') >= 1


def test_text_whose_tokens_the_base_does_not_have_is_refused(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(f"<|added{number}|>", special=True) for number in range(5)])
    tokenizer.save(str(folder / "tokenizer.json"))
    with live_server(server_config(tmp_path)) as client:
        chat = {"messages": [{"role": "user", "content": "<|added4|>"}]}
        assert refusal(client.post(CHAT, json=chat)) == (400, "invalid_request", "messages")
        assert refusal(client.post("/v1/completions", json={"prompt": "a<|added4|>"}))[2] == "prompt"
        assert client.post("/v1/completions", json={"prompt": "a<|added0|>"}).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"maximum": 2**64}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 10**400}}}},
        {"messages": [{"role": "user", "content": "\ud800"}]},
    ],
)
def test_what_is_json_and_cannot_be_followed_is_refused(client: httpx.Client, fields: dict[str, Any]) -> None:
    content = json.dumps({"messages": HELLO, **fields}).encode()
    response = client.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert refusal(response)[:2] == (400, "invalid_request")
