"""/tokenize and /detokenize: the tokens that a completion is counted for, and their text; /v1/embeddings: none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from live_server import live_server, server_config
from scripted_engine import MAX_MODEL_LEN, VOCABULARY_SIZE
from test_http_api import CHAT, HELLO, TOOL, refusal


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with live_server(server_config(tmp_path_factory.mktemp("server"))) as client:
        yield client


def post(client: httpx.Client, path: str, body: object) -> httpx.Response:
    """In ASCII, so that text that is no Unicode arrives as well."""
    return client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})


def test_a_text_there_and_back(client: httpx.Client) -> None:
    reply = post(client, "/tokenize", {"model": "base", "prompt": "Grüße"}).json()
    assert reply == {"count": 7, "max_model_len": MAX_MODEL_LEN, "tokens": list("Grüße".encode())}
    assert post(client, "/detokenize", {"tokens": reply["tokens"]}).json() == {"prompt": "Grüße"}


def test_each_tokens_text_where_asked_for(client: httpx.Client) -> None:
    reply = post(client, "/tokenize", {"prompt": "<|bos|>aü", "return_token_strs": True}).json()
    assert reply["token_strs"] == ["<|bos|>", "a", "\ufffd", "\ufffd"]
    assert post(client, "/detokenize", {"tokens": reply["tokens"]}).json() == {"prompt": "<|bos|>aü"}


def test_a_chat_has_the_tokens_that_its_completion_is_counted_for(client: httpx.Client) -> None:
    chat = {"messages": [{"role": "system", "content": "Be brief."}, *HELLO]}
    counted = client.post(CHAT, json=chat).json()["usage"]["prompt_tokens"]
    reply = post(client, "/tokenize", chat).json()
    assert (reply["count"], len(reply["tokens"])) == (counted, counted)
    text = post(client, "/detokenize", {"tokens": reply["tokens"]}).json()["prompt"]
    assert text == "<|bos|><|system|>Be brief.<|user|>Hello<|assistant|>"
    assert post(client, "/tokenize", {**chat, "add_generation_prompt": False}).json()["count"] == counted - 1
    chat["messages"].append({"role": "assistant", "content": "Hi"})
    reply = post(client, "/tokenize", {**chat, "continue_final_message": True, "return_token_strs": True}).json()
    assert reply["token_strs"][-3:] == ["<|assistant|>", "H", "i"]


def test_nothing_and_more_than_the_context(client: httpx.Client) -> None:
    assert post(client, "/tokenize", {"prompt": ""}).json()["tokens"] == []
    assert post(client, "/detokenize", {"tokens": []}).json() == {"prompt": ""}
    assert post(client, "/tokenize", {"prompt": "x" * 1000}).json()["count"] == 1000


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        ("/tokenize", {}, "prompt", "either a prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt", "either a prompt or messages"),
        ("/tokenize", {"prompt": ["a"]}, "prompt", "string"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt", "unicode"),
        ("/tokenize", {"prompt": "a", "tools": [TOOL]}, "tools", "belongs to messages"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt", "belongs to messages"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens", "chat template"),
        ("/tokenize", {"messages": []}, "messages", "at least 1"),
        ("/tokenize", {"messages": HELLO * 513}, "messages", "at most 512"),
        ("/tokenize", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string"),
        ("/tokenize", {"messages": HELLO, "continue_final_message": True}, "continue_final_message", "last message"),
        ("/tokenize", {"messages": HELLO, "tools": [TOOL, TOOL]}, "tools", "same name"),
        ("/tokenize", {"messages": HELLO, "tools": [TOOL]}, "tools", "chat template knows none"),
        ("/tokenize", {"messages": [{"role": "tool", "content": "", "tool_call_id": "c"}]}, "messages", "role tool"),
        ("/tokenize", {"prompt": "a", "return_token_str": True}, "return_token_str", "'return_token_strs'"),
        ("/detokenize", {}, "tokens", "required"),
        ("/detokenize", {"tokens": "a"}, "tokens", "list"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens.1", "greater"),
        ("/detokenize", {"tokens": [1.5]}, "tokens.0", "integer"),
        ("/detokenize", {"tokens": [True]}, "tokens.0", "integer"),
        ("/detokenize", {"tokens": [1, VOCABULARY_SIZE]}, "tokens", f"Token id {VOCABULARY_SIZE}"),
        ("/detokenize", {"tokens": [2**40]}, "tokens.0", "less"),
    ],
)  # fmt: skip
def test_what_is_refused_names_the_field(client: httpx.Client, path: str, body: Any, param: str, says: str) -> None:
    reply = post(client, path, body)
    status, _, named = refusal(reply)
    assert (status, named) == (400, param), reply.text
    assert says in reply.json()["error"]["message"]


def test_embeddings_are_not_served_whatever_is_sent(client: httpx.Client) -> None:
    for body in ({"model": "base", "input": "Hello"}, {}, [1]):
        assert refusal(post(client, "/v1/embeddings", body)) == (404, "not_served", None)
    assert refusal(client.get("/v1/embeddings"))[0] == 405
    with (
        openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="unused", max_retries=0) as official,
        pytest.raises(openai.NotFoundError, match="has no embeddings"),
    ):
        official.embeddings.create(model="base", input="Hello")
