"""POST /v1/responses: shapes and events as OpenAI's client validates them, refusals that name the field, answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import httpx
import openai
import pytest
from openai.types.responses import FunctionToolParam, Response, ResponseStreamEvent, ToolChoiceFunctionParam
from pydantic import BaseModel, Field, TypeAdapter

import scripted_engine
from byte_tokenizer import save_tokenizer
from demo_server import demo_server
from heddle_demo.data import ADAPTERS_DIR, BASE_DIR
from heddle_server.api.responses_chat import chat_of
from heddle_server.api.responses_protocol import ResponsesRequest
from live_server import live_server, server_config, wait_until
from strict_client import strict_client
from test_http_api import CHAT, refusal
from test_structured_output import CITY, TOOL_TEMPLATE

RESPONSES = "/v1/responses"
QUESTION = "What is the capital of France?"
PLAIN, PIRATE = "The capital of France is Paris.", "Arrr! The capital of France be Paris, matey!"
LOOK_UP: FunctionToolParam = {"type": "function", "name": "look_up", "parameters": CITY, "strict": True}
CALL = {"type": "function_call", "call_id": "c1", "name": "look_up", "arguments": '{"city": "Oslo"}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "Rain."}
THINKING_TEMPLATE = """\
{% if tools %}{# calls are written between <tool_call> marks #}{% endif %}
{%- for message in messages if message.role == 'user' %}<|user|>{{ message.content }}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{# <think> #}{% endif %}
"""
WRITTEN_CALL = '<tool_call>\n{"name": "look_up", "arguments": {"city": "Oslo"}}\n</tool_call>'
TURN = f"<think>\nWhich city?\n</think>\n\nI look.\n{WRITTEN_CALL}\n{WRITTEN_CALL}"
EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
MESSAGE_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with live_server(server_config(tmp_path_factory.mktemp("server"))) as client:
        yield client


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A base that says what its user does, and marks reasoning and calls as Qwen3 does."""
    folder = tmp_path_factory.mktemp("thinking")
    save_tokenizer(folder / "model", THINKING_TEMPLATE)
    with live_server(server_config(folder, max_model_len=1024)) as client:
        yield client


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The demo's base, whose chat template says how calls would be written."""
    folder = tmp_path_factory.mktemp("demo")
    base = shutil.copytree(BASE_DIR, folder / "base")
    template = base / "chat_template.jinja"
    template.write_text(TOOL_TEMPLATE + template.read_text())
    with (
        demo_server(folder, base, pool_bytes=16 << 20, adapters=ADAPTERS_DIR) as server,
        httpx.Client(base_url=server.address, timeout=60) as client,
    ):
        yield client


def official(client: httpx.Client) -> openai.OpenAI:
    """OpenAI's client, which refuses what is not of its types."""
    return strict_client(client.base_url)


def schema_format(schema: object) -> dict[str, object]:
    return {"type": "json_schema", "name": "city", "schema": schema}


class City(BaseModel):
    city: Annotated[str, Field(max_length=20)]
    big: bool


def post(client: httpx.Client, **body: object) -> httpx.Response:
    """In ASCII, so that text that is no Unicode arrives as well."""
    return client.post(RESPONSES, content=json.dumps(body), headers={"content-type": "application/json"})


def respond(client: httpx.Client, input: object, **fields: object) -> Any:
    """A whole reply, validated."""
    reply = post(client, input=input, **fields)
    assert reply.status_code == 200, reply.text
    Response.model_validate_json(reply.content, strict=False)
    return reply.json()


def stream(client: httpx.Client, input: object, **fields: object) -> list[Any]:
    """The events of a stream; checks their names, numbers and types on the way."""
    reply = post(client, input=input, stream=True, **fields)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *frames, end = reply.text.split("\n\n")
    assert end == ""
    events = []
    for frame in frames:
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def names(events: list[Any]) -> list[str]:
    """The types of events in their order, of deltas in a row one."""
    kinds = [event["type"] for event in events]
    return [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before]


def without_ids(response: Any) -> Any:
    """What two runs of one request have in common."""
    response = {**response, "id": "", "created_at": 0, "completed_at": 0, "heddle": {}}
    return {**response, "output": [{**item, "id": "", "call_id": ""} for item in response["output"]]}


def test_a_whole_response(client: httpx.Client) -> None:
    reply = respond(client, "Hello", model="base", metadata={"trace": "7"}, temperature=0.5)
    (message,) = reply["output"]
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}],
    }
    assert reply["id"].startswith("resp_")
    assert (reply["object"], reply["status"], reply["model"]) == ("response", "completed", "base")
    assert reply["completed_at"] >= reply["created_at"]
    assert reply["usage"] == {
        "input_tokens": 8,  # bos, user, five bytes, assistant
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 14,
    }
    assert (reply["metadata"], reply["temperature"], reply["top_p"]) == ({"trace": "7"}, 0.5, 1.0)
    assert (reply["store"], reply["truncation"], reply["error"]) == (False, "disabled", None)
    assert reply["heddle"]["adapter"] is None
    assert reply["heddle"]["ttft_ms"] > 0


def test_the_events_of_a_message_in_openais_order(client: httpx.Client) -> None:
    events = stream(client, "Grüße")
    assert names(events) == MESSAGE_EVENTS
    assert [event["response"]["status"] for event in events[:2]] == ["in_progress"] * 2
    assert events[0]["response"]["output"] == []
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert len(deltas) == 5
    assert "".join(deltas) == events[-4]["text"] == events[-3]["part"]["text"] == "Grüße"
    assert len({event["item_id"] for event in events if "item_id" in event}) == 1
    final = events[-1]["response"]
    assert final["output"] == [events[-2]["item"]]
    assert without_ids(final) == without_ids(respond(client, "Grüße"))


def test_the_official_client(client: httpx.Client) -> None:
    with official(client) as sdk:
        whole = sdk.responses.create(model="base", input="Hello", instructions="Be brief.")
        assert whole.output_text == "Be brief.Hello"
        assert whole.instructions == "Be brief."
        assert whole.usage is not None
        assert whole.usage.total_tokens == 18 + 15
        with sdk.responses.stream(model="base", input="Hello") as events:
            assert [event.type for event in events][-1] == "response.completed"
            assert events.get_final_response().output_text == "Hello"
        raw = sdk.responses.with_raw_response.create(model="base", input="Hello")
        assert "x-heddle-adapter" not in raw.headers
        with pytest.raises(openai.NotFoundError, match="Model 'nobody' does not exist"):
            sdk.responses.create(model="nobody", input="Hello")


def test_an_answer_that_was_cut_is_incomplete(client: httpx.Client) -> None:
    reply = respond(client, "Hello", max_output_tokens=3)
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert reply["completed_at"] is None
    assert (reply["output"][0]["status"], reply["output"][0]["content"][0]["text"]) == ("incomplete", "Hel")
    assert names(stream(client, "Hello", max_output_tokens=3)) == [*MESSAGE_EVENTS[:-1], "response.incomplete"]


def test_an_answer_that_says_nothing_is_an_empty_message(client: httpx.Client) -> None:
    assert [item["content"][0]["text"] for item in respond(client, "")["output"]] == [""]
    assert names(stream(client, "")) == MESSAGE_EVENTS


def test_logprobs_of_the_text_and_nothing_else(client: httpx.Client) -> None:
    wanted = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (message,) = respond(client, "Hü", **wanted)["output"]
    logprobs = message["content"][0]["logprobs"]
    assert bytes(byte for entry in logprobs for byte in entry["bytes"]).decode() == "Hü"
    assert [len(entry["top_logprobs"]) for entry in logprobs] == [2, 2, 2]
    events = stream(client, "Hü", **wanted)
    told = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    assert [len(each) for each in told] == [1, 2]  # the two bytes of a letter come together
    assert [entry for each in told for entry in each] == logprobs
    assert all(event["logprobs"] == [] for event in stream(client, "Hü") if event["type"].endswith("text.delta"))


def test_reasoning_words_and_calls_are_items(thinking: httpx.Client) -> None:
    reply = respond(thinking, TURN, tools=[LOOK_UP])
    reasoning, message, *calls = reply["output"]
    assert (reasoning["type"], reasoning["summary"]) == ("reasoning", [])
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Which city?"}]
    assert message["content"][0]["text"] == "I look."
    assert [(call["type"], call["name"], json.loads(call["arguments"])) for call in calls] == [
        ("function_call", "look_up", {"city": "Oslo"})
    ] * 2
    assert len({call["call_id"] for call in calls}) == 2
    assert reply["status"] == "completed"
    assert reply["usage"]["output_tokens_details"] == {"reasoning_tokens": len("Whichcity?")}  # the space came later


def test_the_events_of_reasoning_words_and_calls(thinking: httpx.Client) -> None:
    events = stream(thinking, TURN, tools=[LOOK_UP])
    call = [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    reasoning = [kind.replace("output_text", "reasoning_text") for kind in MESSAGE_EVENTS[2:-1]]
    assert names(events) == [*MESSAGE_EVENTS[:2], *reasoning, *MESSAGE_EVENTS[2:-1], *call, *call, "response.completed"]
    added = [event for event in events if event["type"] == "response.output_item.added"]
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert [event["output_index"] for event in added] == [event["output_index"] for event in done] == [0, 1, 2, 3]
    assert [event["item"]["id"] for event in added] == [event["item"]["id"] for event in done]
    assert events[-1]["response"]["output"] == [event["item"] for event in done]
    assert without_ids(events[-1]["response"]) == without_ids(respond(thinking, TURN, tools=[LOOK_UP]))
    with official(thinking) as sdk, sdk.responses.stream(model="base", input=TURN, tools=[LOOK_UP]) as told:
        final = told.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]


def test_reasoning_that_was_cut(thinking: httpx.Client) -> None:
    reply = respond(thinking, TURN, max_output_tokens=15, include=["message.output_text.logprobs"])
    (reasoning,) = reply["output"]
    assert (reasoning["status"], reasoning["content"][0]["text"]) == ("incomplete", "Which c")
    assert names(stream(thinking, TURN, max_output_tokens=15))[-2:] == [
        "response.output_item.done",
        "response.incomplete",
    ]


def test_an_answer_can_be_sent_back_as_it_came(thinking: httpx.Client) -> None:
    output = respond(thinking, TURN, tools=[LOOK_UP])["output"]
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": [{"type": "input_text", "text": "Rain"}]}
        for item in output
        if item["type"] == "function_call"
    ]
    items = [{"role": "user", "content": "Hm?"}, *output, *results, {"role": "user", "content": "So?"}]
    assert respond(thinking, items, tools=[LOOK_UP])["status"] == "completed"
    asked, turn, first, second, _ = chat_of(ResponsesRequest.model_validate({"input": items})).messages
    assert asked.content == "Hm?"
    assert (turn.role, turn.reasoning_content, turn.content) == ("assistant", "Which city?", "I look.")
    assert turn.tool_calls is not None
    assert [call.id for call in turn.tool_calls] == [first.tool_call_id, second.tool_call_id]
    assert (first.role, first.content) == ("tool", "Rain")


@pytest.mark.parametrize(
    ("kinds", "turns"),
    [
        ("rmc", ["rmc"]),
        ("cmc", ["cmc"]),  # after a call the turn goes on
        ("mm", ["m", "m"]),
        ("rmrm", ["rm", "rm"]),
        ("rcormo", ["rc", "rm"]),
        ("r", ["r"]),
    ],
)
def test_what_is_one_turn_of_the_assistants(kinds: str, turns: list[str]) -> None:
    items = {
        "r": {"type": "reasoning", "summary": [{"type": "summary_text", "text": "r"}]},
        "m": {"role": "assistant", "content": [{"type": "output_text", "text": "m", "annotations": []}]},
        "c": CALL,
        "o": RESULT,
    }
    chat = chat_of(ResponsesRequest.model_validate({"input": [items[kind] for kind in kinds]}))
    told = [
        (message.reasoning_content, message.content, len(message.tool_calls or ()))
        for message in chat.messages
        if message.role == "assistant"
    ]
    assert told == [("r" * turn.count("r"), "m" * turn.count("m"), turn.count("c")) for turn in turns]


def test_logprobs_leave_out_reasoning_and_marks(thinking: httpx.Client) -> None:
    reply = respond(thinking, "<think>\nHm.\n</think>\n\nOslo.", include=["message.output_text.logprobs"])
    _, message = reply["output"]
    logprobs = message["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in logprobs) == message["content"][0]["text"] == "Oslo."


def test_items_become_turns(client: httpx.Client) -> None:
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be "}]},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        *respond(client, "answered")["output"],  # as it came
        {"role": "user", "content": "c"},
    ]
    turns = [("developer", "Be "), ("user", "ab"), ("assistant", "answered"), ("user", "c")]
    messages = [{"role": role, "content": content} for role, content in turns]
    chat = client.post(CHAT, json={"messages": messages}).json()
    reply = respond(client, items)
    assert reply["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert reply["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]


def test_what_chats_have_besides_means_the_same(client: httpx.Client) -> None:
    fields: dict[str, Any] = {"stop": ["l"], "seed": 3, "logit_bias": {"65": -5}, "adapter": "base", "top_k": 4}
    reply = respond(client, "Hello", user="\ud800", service_tier="auto", text={"verbosity": "low"}, **fields)
    assert reply["output"][0]["content"][0]["text"] == "He"
    reply = post(client, input="Hello", adapter_id="base")
    assert "adapter_id is read as adapter" in reply.headers["warning"]


def test_fields_that_say_no_more_than_what_is_done_are_accepted(client: httpx.Client) -> None:
    respond(
        client,
        "Hello",
        store=False,
        background=False,
        previous_response_id=None,
        truncation="disabled",
        include=["reasoning.encrypted_content"],
        reasoning={"effort": None, "summary": "auto"},
        stream_options=None,
        tools=[],
        tool_choice="auto",
        parallel_tool_calls=True,
        max_tool_calls=3,
        text={"format": {"type": "text"}},
    )


IMAGE = {"type": "input_image", "image_url": "data:,"}
USAGE_STATS = "stream_options.continuous_usage_stats"
FILE = {"type": "input_file", "file_id": "f"}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"store": True}, "store", "nothing is kept"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation"),
        ({"conversation": "conv_1"}, "conversation", "send the whole conversation"),
        ({"conversation": {"id": "conv_1"}}, "conversation", "send the whole conversation"),
        ({"background": True}, "background", "while the client waits"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "no prompts are stored"),
        ({"truncation": "auto"}, "truncation", "never cut"),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "web_search"),
        ({"tools": [LOOK_UP, {"type": "file_search", "vector_store_ids": []}]}, "tools.1", "file_search"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools.0", "custom"),
        ({"tools": [{"type": "function", "name": "no spaces"}]}, "tools.0.name", "pattern"),
        ({"tools": [{"type": "function", "function": {"name": "x"}}]}, "tools.0.function", "function"),
        ({"tools": [{"name": "x"}]}, "tools.0.type", "required"),
        ({"tools": [LOOK_UP]}, "tools", "chat template knows none"),
        ({"tools": [LOOK_UP, LOOK_UP]}, "tools", "same name"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tool_choice": {"type": "function", "name": "x"}, "tools": [LOOK_UP]}, "tool_choice", "'x'"),
        ({"tool_choice": {"type": "function"}, "tools": [LOOK_UP]}, "tool_choice.name", "required"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "web_search"),
        ({"tool_choice": "always"}, "tool_choice", "'required'"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input.0.content", "input_image"),
        ({"input": [{"role": "user", "content": [FILE]}]}, "input.0.content", "input_file"),
        ({"input": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "input.0.content", "'text'"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content", "input_text"),
        ({"input": [{"role": "user"}]}, "input.0.content", "required"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input.0.role", "'assistant'"),
        ({"input": [{"role": "user", "content": "a", "name": "b"}]}, "input.0.name", "name"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0", "send the item itself"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input.0", "web_search_call"),
        ({"input": [{"type": 5}]}, "input.0", "reasoning"),
        ({"input": ["Hello"]}, "input.0", "object"),
        ({"input": []}, "input", "at least 1"),
        ({"input": None}, "input", "a string or a list"),
        ({"input": {"role": "user"}}, "input", "a string or a list"),
        ({"input": [{"role": "user", "content": "a"}] * 512}, "input", "at most 511"),
        ({"input": [CALL, {**RESULT, "call_id": "c2"}]}, "input.1.call_id", "'c2'"),
        ({"input": [RESULT, CALL]}, "input.0.call_id", "'c1'"),
        ({"input": [{**CALL, "name": ""}]}, "input.0.name", "pattern"),
        ({"input": [{"role": "user", "content": "a"}] + [CALL] * 129}, "input", "at most 128"),
        ({"input": [CALL, RESULT]}, "input", "Unknown role tool"),  # says this base's template
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input.0.encrypted_content", "only the server"),
        ({"input": "x" * 100}, "input", "context length is 64 tokens"),
        ({"input": "\ud800"}, "input.0.content", "unicode"),
        ({"instructions": "\ud800"}, "instructions", "unicode"),
        ({"input": [{**CALL, "arguments": "\ud800"}]}, "input.0.arguments", "unicode"),
        ({"tools": [{**LOOK_UP, "parameters": {"enum": ["\ud800"]}}]}, "tools.0.parameters", "Unicode"),
        ({"chat_template_kwargs": {"mood": "\ud800"}}, "chat_template_kwargs", "Unicode"),
        ({"max_output_tokens": 100}, "max_output_tokens", "context length is 64 tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"max_output_tokens": 2, "min_tokens": 3}, "min_tokens", "more than the 2"),
        ({"max_tokens": 5}, "max_tokens", "max_output_tokens"),
        ({"response_format": {"type": "text"}}, "response_format", "text.format"),
        ({"n": 2}, "n", "one answer"),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "json_schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "required"),
        ({"text": {"format": schema_format({"type": "objekt"})}}, "text.format", "objekt"),
        ({"text": {"format": schema_format({"enum": ["\ud800"]})}}, "text.format.schema", "Unicode"),
        ({"text": {"formats": {}}}, "text.formats", "format"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "knows no reasoning effort"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "without a summary"),
        ({"top_logprobs": 3}, "top_logprobs", "message.output_text.logprobs"),
        ({"top_logprobs": 21}, "top_logprobs", "20"),
        ({"include": ["file_search_call.results"]}, "include.0", "message.output_text.logprobs"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata", "16"),
        ({"metadata": {"a": 5}}, "metadata.a", "string"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "'stream'"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, USAGE_STATS, "last event"),
        ({"temperature": 3}, "temperature", "2"),
        ({"adapter": "a", "adapter_id": "a"}, "adapter_id", "same thing"),
        ({"lora": "a"}, "lora", "'adapter'"),
        ({"max_output_token": 5}, "max_output_token", "'max_output_tokens'"),
        ({"messages": []}, "messages", "no parameter of this request"),
    ],
)  # fmt: skip
def test_what_is_refused_names_the_field_and_says_why(
    client: httpx.Client, fields: dict[str, Any], param: str, says: str
) -> None:
    reply = post(client, **{"input": "Hello", **fields})
    status, _, named = refusal(reply)
    assert (status, named) == (400, param), reply.text
    assert says in reply.json()["error"]["message"]


def test_a_message_names_no_field_of_chats(client: httpx.Client, demo: httpx.Client) -> None:
    text = {"format": {"type": "json_object"}}
    error = post(demo, input="Hi", tools=[LOOK_UP], tool_choice="required", text=text).json()["error"]
    assert error["param"] == "tool_choice"
    assert "text.format for something else" in error["message"]
    assert "'input'" in post(client).json()["error"]["message"]


def test_a_failure_after_the_200_is_told_in_the_stream(client: httpx.Client) -> None:
    failing = {"seed": scripted_engine.ADAPTER_DAMAGED}
    assert refusal(post(client, input="Hello", **failing)) == (422, "adapter_damaged", "adapter")
    events = stream(client, "Hello", **failing)
    assert names(events) == ["response.created", "response.in_progress", "error", "response.failed"]
    assert (events[2]["code"], events[2]["param"]) == ("adapter_damaged", "adapter")
    failed = events[3]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
    assert "upload it again" in failed["error"]["message"]
    with official(client) as sdk:
        told = [event.type for event in sdk.responses.create(input="Hello", stream=True, extra_body=failing)]
    assert told == names(events)


def test_a_failure_in_the_middle_keeps_what_was_said(client: httpx.Client) -> None:
    *_, last = stream(client, "Hello", seed=scripted_engine.DIES)
    assert last["type"] == "response.failed"
    (message,) = last["response"]["output"]
    assert (message["status"], message["content"][0]["text"]) == ("incomplete", "He")
    wait_until(lambda: client.get("/readyz").status_code == 200)


def test_the_demo_answers_with_an_adapter(demo: httpx.Client) -> None:
    for fields, expected in (({}, PLAIN), ({"model": "pirate"}, PIRATE), ({"adapter": "pirate"}, PIRATE)):
        reply = respond(demo, QUESTION, temperature=0, **fields)
        assert reply["output"][0]["content"][0]["text"] == expected
        assert reply["heddle"]["adapter"] == ("pirate" if expected == PIRATE else None)
    headers = post(demo, input=QUESTION, adapter="pirate").headers
    assert headers["x-heddle-adapter"] == "pirate@1"
    assert float(headers["x-heddle-adapter-load-ms"]) >= 0
    with official(demo) as sdk, sdk.responses.stream(model="pirate", input=QUESTION, temperature=0) as events:
        assert events.get_final_response().output_text == PIRATE


def test_the_demo_follows_a_format(demo: httpx.Client) -> None:
    formats: list[dict[str, object]] = [
        schema_format(CITY),
        {"type": "json_object"},
        {"type": "grammar", "syntax": "regex", "definition": "[0-9]{4}"},
    ]
    replies = [respond(demo, QUESTION, text={"format": each}, seed=1, max_output_tokens=200) for each in formats]
    by_schema, json_object, by_grammar = (reply["output"][0]["content"][0]["text"] for reply in replies)
    assert set(json.loads(by_schema)) == {"city", "big"}
    assert json_object.startswith("{")
    assert by_grammar.isdecimal()
    assert [reply["text"]["format"] for reply in replies] == [
        {**formats[0], "description": None, "strict": None},
        formats[1],
        None,
    ]
    with official(demo) as sdk:
        parsed = sdk.responses.parse(model="base", input=QUESTION, text_format=City, extra_body={"seed": 1})
    assert isinstance(parsed.output_parsed, City)


def test_a_tool_that_has_to_be_called(demo: httpx.Client) -> None:
    choices: list[Literal["required"] | ToolChoiceFunctionParam] = ["required", {"type": "function", "name": "look_up"}]
    with official(demo) as sdk:
        for choice in choices:
            reply = sdk.responses.create(
                model="base",
                input=QUESTION,
                tools=[LOOK_UP],
                tool_choice=choice,
                parallel_tool_calls=False,
                max_output_tokens=200,
                extra_body={"seed": 1},
            )
            (call,) = reply.output
            assert call.type == "function_call"
            assert set(json.loads(call.arguments)) == {"city", "big"}
            assert call.call_id.startswith("call_")
            assert (reply.status, call.status) == ("completed", "completed")
    assert call.type == "function_call"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Paris"}
    items = [{"role": "user", "content": QUESTION}, call.to_dict(), result]
    assert respond(demo, items, tools=[LOOK_UP])["status"] == "completed"


def test_the_events_of_a_call(demo: httpx.Client) -> None:
    events = stream(demo, QUESTION, tools=[LOOK_UP], tool_choice="required", parallel_tool_calls=False, seed=1)
    assert names(events) == [
        *("response.created", "response.in_progress", "response.output_item.added"),
        *("response.function_call_arguments.delta", "response.function_call_arguments.done"),
        *("response.output_item.done", "response.completed"),
    ]
    added, delta, done, item = events[2:6]
    assert (added["item"]["arguments"], added["item"]["status"]) == ("", "in_progress")
    assert delta["delta"] == done["arguments"] == item["item"]["arguments"]
    assert events[-1]["response"]["output"] == [item["item"]]
    assert events[-1]["response"]["tools"][0]["name"] == "look_up"
