"""Which request bodies are accepted, and what is said about the others."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from heddle_server.api.errors import ApiError, kind_of
from heddle_server.api.protocol import ChatCompletionRequest, CompletionRequest
from heddle_server.api.validation import invalid_body
from heddle_server.api.wire_fields import ScaledAdapter

MESSAGES = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": MESSAGES, **fields})


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "Hello", **fields})


def refused(model: type[ChatCompletionRequest | CompletionRequest], body: dict[str, Any]) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    return invalid_body([{**report, "loc": ("body", *report["loc"])} for report in caught.value.errors()])


def test_neutral_values_of_what_is_not_served_are_accepted() -> None:
    chat(
        n=1,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        modalities=["text"],
        min_p=0,
        reasoning_effort=None,
        audio=None,
    )
    completion(echo=False, best_of=1, suffix=None, n=1)


def test_what_cannot_change_the_answer_is_accepted() -> None:
    chat(user="u", metadata={"a": "b"}, store=True, service_tier="auto", safety_identifier="s", prompt_cache_key="k")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("n", True),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("repetition_penalty", 1.1),
        ("logit_bias", {"5": 1}),
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "auto"),
        ("reasoning_effort", "low"),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("min_p", 0.1),
        ("min_tokens", 3),
        ("best_of", 2),
    ],
)
def test_what_is_not_served_is_refused_and_named(field: str, value: object) -> None:
    error = refused(ChatCompletionRequest, {"messages": MESSAGES, field: value})
    assert (kind_of(error).status, kind_of(error).code, error.param) == (400, "unsupported_parameter", field)
    assert "not served yet" in error.message


@pytest.mark.parametrize(("field", "value"), [("echo", True), ("suffix", "x"), ("prompt", ["a", "b"])])
def test_what_completions_do_not_serve(field: str, value: object) -> None:
    error = refused(CompletionRequest, {"prompt": "x", field: value})
    assert (kind_of(error).code, error.param) == ("unsupported_parameter", field)


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("lora", "adapter"),
        ("lora_path", "adapter"),
        ("adapter_id", "adapter"),
        ("adapters", "adapter"),
        ("temprature", "temperature"),
        ("max_completion_token", "max_completion_tokens"),
    ],
)
def test_unknown_fields_point_to_the_known_one(field: str, hint: str) -> None:
    error = refused(ChatCompletionRequest, {"messages": MESSAGES, field: "x"})
    assert (kind_of(error).code, error.param) == ("unknown_parameter", field)
    assert repr(field) in error.message
    assert repr(hint) in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 2**70}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x" * 65]}, "stop"),
        ({"stop": list("abcde")}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"adapter": 5}, "adapter"),
        ({"adapter": True}, "adapter"),
        ({"adapter": "x" * 300}, "adapter"),
        ({"adapter": []}, "adapter"),
        ({"adapter": ["a"] * 9}, "adapter"),
        ({"adapter": {}}, "adapter.name"),
        ({"adapter": {"name": 5}}, "adapter.name"),
        ({"adapter": {"name": "a", "scale": "1"}}, "adapter.scale"),
        ({"adapter": {"name": "a", "scale": True}}, "adapter.scale"),
        ({"adapter": {"name": "a", "scale": None}}, "adapter.scale"),
        ({"adapter": {"name": "a", "scale": 100.5}}, "adapter.scale"),
        ({"adapter": {"name": "a", "scale": float("nan")}}, "adapter.scale"),
        ({"adapter": {"name": "a", "scale": float("-inf")}}, "adapter.scale"),
        ({"adapter": ["a", {"name": "b", "scale": -101}]}, "adapter.1.scale"),
        ({"adapter": ["a", 5]}, "adapter.1"),
        ({"adapter": [["a"]]}, "adapter.0"),
        ({"adapter": [None]}, "adapter.0"),
        ({"model": "x" * 300}, "model"),
        ({"stream": "true"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": MESSAGES * 513}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "pirate", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
        ({"messages": ["x"]}, "messages.0"),
    ],
)
def test_out_of_bounds_and_wrong_types_name_the_field(fields: dict[str, Any], param: str) -> None:
    error = refused(ChatCompletionRequest, {"messages": MESSAGES, **fields})
    assert (kind_of(error).status, kind_of(error).code, error.param) == (400, "invalid_request", param)


@pytest.mark.parametrize(
    "fields",
    [
        {"top_logprobs": 2},
        {"stream_options": {"include_usage": True}},
        {"max_tokens": 3, "max_completion_tokens": 4},
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, Any]) -> None:
    assert kind_of(refused(ChatCompletionRequest, {"messages": MESSAGES, **fields})).code == "invalid_request"


@pytest.mark.parametrize("prompt", [5, None, [], [1, "a"], [True], [[-1]], {"a": 1}, "\ud800"])
def test_prompts_that_are_none(prompt: object) -> None:
    if prompt == []:
        assert completion(prompt=[]).prompt == []  # refused at admission, with "no tokens"
        return
    assert refused(CompletionRequest, {"prompt": prompt}).param == "prompt"


def test_forms_are_brought_to_one() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].content == "Hello"
    assert chat(stop="x").stop == ["x"]
    assert chat().stop == []
    assert completion(prompt=["Hello"]).prompt == "Hello"
    assert completion(prompt=[[1, 2]]).prompt == [1, 2]
    assert chat(max_completion_tokens=3).token_limit == 3
    assert chat(max_tokens=3).token_limit == 3
    assert completion().token_limit == 16


def test_forms_of_the_adapter_field() -> None:
    assert chat().adapter is None
    assert chat(adapter="team/sql@prod").adapter == "team/sql@prod"
    assert chat(adapter={"name": "sql"}).adapter == ScaledAdapter(name="sql", scale=1.0)
    assert chat(adapter=["sql", {"name": "pirate", "scale": -2}]).adapter == [
        "sql",
        ScaledAdapter(name="pirate", scale=-2.0),
    ]
    longest = f"{'n' * 96}/{'a' * 96}@sha256:{'f' * 64}"
    assert chat(adapter=longest).adapter == chat(model=longest).model == longest


def test_a_misspelt_scale_is_named() -> None:
    error = refused(ChatCompletionRequest, {"messages": MESSAGES, "adapter": [{"name": "a", "scales": 2}]})
    assert (kind_of(error).code, error.param) == ("unknown_parameter", "adapter.0.scales")
    assert "'scale'" in error.message


def test_image_parts_are_refused_by_name() -> None:
    image = {"type": "image_url", "image_url": {"url": "x"}}
    error = refused(ChatCompletionRequest, {"messages": [{"role": "user", "content": [image]}]})
    assert (kind_of(error).code, error.param) == ("unsupported_parameter", "messages.0.content")
    assert "image_url" in error.message


def test_an_assistants_turn_can_be_sent_back_as_it_came() -> None:
    turn: dict[str, Any] = {
        "role": "assistant",
        "content": "Hi",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
        "audio": None,
    }
    assert chat(messages=[*MESSAGES, turn]).messages[1].content == "Hi"
