"""`response_format` and forced tools on the demo's base, over HTTP: what comes back is of the form, or a clear 400."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionToolParam

from demo_server import demo_server
from heddle_demo.data import BASE_DIR
from strict_client import strict_client
from test_http_api import CHAT, events, refusal

QUESTION = {"role": "user", "content": "What is the capital of France?"}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}
# Shows no tools, so that the demo's base reads what it was trained on; but says how calls would be written.
TOOL_TEMPLATE = "{% if tools %}{# calls are written between <tool_call> marks #}{% endif %}"
LOOK_UP: ChatCompletionToolParam = {"type": "function", "function": {"name": "look_up", "parameters": CITY}}
TREE: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "tree",
        "parameters": {
            "$defs": {
                "leaf": {
                    "type": "object",
                    "properties": {"size": {"enum": [1, 2]}},
                    "required": ["size"],
                    "additionalProperties": False,
                }
            },
            "type": "object",
            "properties": {"leaf": {"$ref": "#/$defs/leaf"}},
            "required": ["leaf"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("server")
    base = shutil.copytree(BASE_DIR, folder / "base")
    template = base / "chat_template.jinja"
    template.write_text(TOOL_TEMPLATE + template.read_text())
    with demo_server(folder, base) as server, httpx.Client(base_url=server.address, timeout=60) as client:
        yield client


@pytest.fixture
def official(client: httpx.Client) -> Iterator[openai.OpenAI]:
    with strict_client(client.base_url) as official:
        yield official


def ask(client: httpx.Client, response_format: object, seed: int = 0, **fields: object) -> Any:
    body = {"messages": [QUESTION], "response_format": response_format, "seed": seed, "max_tokens": 120, **fields}
    reply = client.post(CHAT, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


def schema_format(schema: object) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_json_by_a_schema_whole_and_streamed(client: httpx.Client) -> None:
    choice = ask(client, schema_format(CITY))
    assert choice["finish_reason"] == "stop"
    content = json.loads(choice["message"]["content"])
    assert isinstance(content["city"], str)
    assert isinstance(content["big"], bool)
    body = {"messages": [QUESTION], "response_format": schema_format(CITY), "seed": 0, "stream": True}
    chunks = events(client.post(CHAT, json=body))
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert json.loads(text) == content


def test_any_json_object(client: httpx.Client) -> None:
    texts = [ask(client, {"type": "json_object"}, seed, temperature=0)["message"]["content"] for seed in range(2)]
    assert all(text.startswith("{") for text in texts)


@pytest.mark.parametrize(
    ("syntax", "definition", "pattern"),
    [
        ("regex", "(Paris|Rome), [0-9]{2}", "(Paris|Rome), [0-9]{2}"),
        ("lark", 'start: "The " CITY " is " /[a-z]{3,8}/ "."\nCITY: "city" | "town"', "The (city|town) is .{3,8}\\."),
        ("lark", 'start: "x=" %json {"type": "integer", "minimum": 0, "maximum": 9}', "x=[0-9]"),
    ],
)
def test_grammars(client: httpx.Client, syntax: str, definition: str, pattern: str) -> None:
    choice = ask(client, {"type": "grammar", "syntax": syntax, "definition": definition})
    assert re.fullmatch(pattern, choice["message"]["content"]), choice
    assert choice["finish_reason"] == "stop"


def test_plain_text_is_the_default(client: httpx.Client) -> None:
    assert ask(client, {"type": "text"}, temperature=0)["message"]["content"] == "The capital of France is Paris."


def test_completions_take_it_too(client: httpx.Client) -> None:
    body = {"prompt": "Number:", "response_format": {"type": "grammar", "syntax": "regex", "definition": "[0-9]{4}"}}
    assert re.fullmatch("[0-9]{4}", client.post("/v1/completions", json=body).json()["choices"][0]["text"])


@pytest.mark.parametrize(
    ("response_format", "says"),
    [
        (schema_format({"type": "objekt"}), "objekt"),
        (schema_format({"$ref": "https://example.com/schema.json"}), "example.com"),
        (schema_format({"$ref": "#/$defs/missing"}), "missing"),
        (schema_format({"type": "string", "pattern": "(?=a)b"}), "look"),
        (schema_format({"not": {"type": "string"}}), "not"),
        (schema_format(False), "dictionary"),
        ({"type": "grammar", "syntax": "regex", "definition": "(["}, "regex"),
        ({"type": "grammar", "syntax": "lark", "definition": "start: missing"}, "missing"),
        ({"type": "grammar", "syntax": "lark", "definition": 'start: <|nobody|> "x"'}, "nobody"),
        ({"type": "grammar", "syntax": "lark", "definition": 'start: "' + "x" * (64 << 10) + '"'}, "65536 bytes"),
        (schema_format({"enum": ["y" * 1000 + str(number) for number in range(70)]}), "65536 bytes"),
    ],
)
def test_what_cannot_be_followed_is_refused(client: httpx.Client, response_format: object, says: str) -> None:
    reply = client.post(CHAT, json={"messages": [QUESTION], "response_format": response_format})
    status, code, param = refusal(reply)
    assert (status, code) == (400, "invalid_request")
    assert param is not None
    assert param.startswith("response_format")
    assert says in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "definition",
    [
        "start: " + "(" * 30_000 + '"x"' + ")" * 30_000,
        "start: /" + "(" * 30_000 + "x" + ")" * 30_000 + "/",
        "start: /(((((x{1,90}){1,90}){1,90}){1,90}){1,90}){1,90}/",
        "start: /(.|\\n){0,60000}x(.|\\n){60000}/",
        "start: "
        + " ".join(f"a{number}?" for number in range(3000))
        + "\n"
        + "\n".join(f'a{number}: "{number}"' for number in range(3000)),
        "\n".join(f"a{number}: a{number + 1} a{number + 1}" for number in range(400)).replace("a0:", "start:", 1)
        + '\na400: "x"',
    ],
)
def test_grammars_made_to_hurt_hurt_nobody(client: httpx.Client, definition: str) -> None:
    """Whatever becomes of it, in seconds, the next request is answered as ever and no other is held up."""
    hostile = {"messages": [QUESTION], "max_tokens": 8, "temperature": 0}
    hostile["response_format"] = {"type": "grammar", "syntax": "lark", "definition": definition}
    with ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        sent = pool.submit(client.post, CHAT, json=hostile)
        neighbour = client.post(CHAT, json={"messages": [QUESTION], "temperature": 0, "max_tokens": 20})
        assert neighbour.json()["choices"][0]["message"]["content"] == "The capital of France is Paris."
        reply = sent.result()
    assert reply.status_code in (200, 400), reply.text
    assert time.monotonic() - started < 20
    if reply.status_code == 400:
        assert refusal(reply)[2] in ("response_format", None)  # none where it was too slow when it was followed
    assert json.loads(ask(client, schema_format(CITY))["message"]["content"])
    assert client.get("/readyz").status_code == 200


def test_a_tool_that_has_to_be_called(official: openai.OpenAI) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "tree"}}):
        reply = official.chat.completions.create(  # type: ignore[call-overload]
            model="base",
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            tools=[LOOK_UP, TREE],
            tool_choice=choice,
            parallel_tool_calls=False,
            max_tokens=200,
            seed=1,
        )
        (answer,) = reply.choices
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content is None
        assert answer.message.tool_calls is not None
        (call,) = answer.message.tool_calls
        assert call.type == "function"
        arguments = json.loads(call.function.arguments)
        if call.function.name == "tree":
            assert arguments["leaf"]["size"] in (1, 2)
        else:
            assert choice == "required"
            assert set(arguments) == {"city", "big"}


def test_a_call_streams_in_openais_pieces(official: openai.OpenAI) -> None:
    stream = official.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        tools=[TREE],
        tool_choice="required",
        parallel_tool_calls=False,
        stream=True,
        seed=1,
    )
    choices = [choice for chunk in stream for choice in chunk.choices]
    pieces = [piece for choice in choices for piece in choice.delta.tool_calls or ()]
    assert [piece.index for piece in pieces] == [0] * len(pieces)
    first, *rest = pieces
    assert first.id is not None
    assert first.function is not None
    assert first.function.name == "tree"
    assert all(piece.id is None and piece.function is not None and piece.function.name is None for piece in rest)
    arguments = "".join(piece.function.arguments or "" for piece in pieces if piece.function)
    assert json.loads(arguments)["leaf"]["size"] in (1, 2)
    assert choices[-1].finish_reason == "tool_calls"
    assert not any(choice.delta.content for choice in choices)


def test_tools_that_are_offered_need_not_be_called(client: httpx.Client) -> None:
    for choice in ("auto", "none"):
        body = {"messages": [QUESTION], "tools": [LOOK_UP], "tool_choice": choice, "temperature": 0}
        answer = client.post(CHAT, json=body).json()["choices"][0]
        assert answer["message"]["content"] == "The capital of France is Paris."
        assert answer["finish_reason"] == "stop"


def test_a_tool_whose_parameters_cannot_be_followed_is_refused(client: httpx.Client) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}
    body = {"messages": [QUESTION], "tools": [tool], "tool_choice": "required"}
    assert refusal(client.post(CHAT, json=body)) == (400, "invalid_request", "tools")
