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


NO_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x"}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def tool(name: str, **function: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, **function}}


def schema_format(schema: object, name: str = "x") -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": MESSAGES, **fields})


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "Hello", **fields})


def refused(model: type[ChatCompletionRequest | CompletionRequest], body: dict[str, Any]) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    return invalid_body([{**report, "loc": ("body", *report["loc"])} for report in caught.value.errors()])


def test_neutral_values_of_what_is_not_served_are_accepted() -> None:
    chat(modalities=["text"], audio=None, functions=[], function_call="none", length_penalty=1, priority=0)
    completion(best_of=1, suffix=None, use_beam_search=False)


def test_what_cannot_change_the_answer_is_accepted() -> None:
    chat(user="u", metadata={"a": "b"}, store=True, service_tier="auto", safety_identifier="s", prompt_cache_key="k")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("best_of", 2),
        ("best_of", True),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("web_search_options", {}),
    ],
)
def test_what_is_not_served_is_refused_and_named(field: str, value: object) -> None:
    error = refused(ChatCompletionRequest, {"messages": MESSAGES, field: value})
    assert (kind_of(error).status, kind_of(error).code, error.param) == (400, "unsupported_parameter", field)
    assert "not served yet" in error.message


@pytest.mark.parametrize(("field", "value"), [("suffix", "x"), ("best_of", 4), ("use_beam_search", True)])
def test_what_completions_do_not_serve(field: str, value: object) -> None:
    error = refused(CompletionRequest, {"prompt": "x", field: value})
    assert (kind_of(error).code, error.param) == ("unsupported_parameter", field)


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("lora", "adapter"),
        ("lora_path", "adapter"),
        ("adapters", "adapter"),
        ("temprature", "temperature"),
        ("max_completion_token", "max_completion_tokens"),
        ("guided_json", "response_format"),
        ("guided_regex", "response_format"),
        ("structured_outputs", "response_format"),
        ("grammar", "response_format"),
        ("chat_template", "chat_template_kwargs"),
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
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": True}, "n"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": True}}, "logit_bias"),
        ({"logit_bias": {"5": float("nan")}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": schema_format({}, name="a b")}, "response_format.json_schema.name"),
        ({"response_format": NO_SCHEMA}, "response_format.json_schema.schema"),
        ({"response_format": schema_format(5)}, "response_format.json_schema.schema"),
        ({"response_format": schema_format(nested(65))}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "grammar", "syntax": "gbnf", "definition": "x"}}, "response_format.syntax"),
        ({"response_format": {"type": "grammar", "syntax": "regex", "definition": ""}}, "response_format.definition"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools.0.type"),
        ({"tools": [tool("a b")]}, "tools.0.function.name"),
        ({"tools": [tool("f")] * 129}, "tools"),
        ({"tools": [tool("f"), tool("f")]}, "tools"),
        ({"tools": [tool("f", parameters=nested(65))]}, "tools.0.function.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "always", "tools": [tool("f")]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [tool("f")]}, "tool_choice"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages.0.tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "assistant"}]}, "messages.0.content"),
        ({"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {str(number): 1 for number in range(17)}}, "chat_template_kwargs"),
    ],
)
def test_out_of_bounds_and_wrong_types_name_the_field(fields: dict[str, Any], param: str) -> None:
    error = refused(ChatCompletionRequest, {"messages": MESSAGES, **fields})
    assert (kind_of(error).status, kind_of(error).code, error.param) == (400, "invalid_request", param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"min_tokens": 5, "max_completion_tokens": 4}, "min_tokens"),
        ({"adapter": "a", "adapter_id": "a"}, "adapter_id"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"tools": [tool("f")], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, Any], param: str) -> None:
    error = refused(ChatCompletionRequest, {"messages": MESSAGES, **fields})
    assert (kind_of(error).code, error.param) == ("invalid_request", param)


def test_tools_that_may_and_that_must_be_called() -> None:
    tools = [tool("f"), tool("g")]
    named = {"type": "function", "function": {"name": "g"}}
    assert [each.function.name for each in chat(tools=tools).offered_tools] == ["f", "g"]
    assert chat(tools=tools).forced_tools == chat(tools=tools, tool_choice="auto").forced_tools == []
    assert chat(tools=tools, tool_choice="none").offered_tools == []
    assert [each.function.name for each in chat(tools=tools, tool_choice="required").forced_tools] == ["f", "g"]
    assert [each.function.name for each in chat(tools=tools, tool_choice=named).forced_tools] == ["g"]
    assert chat(tools=[], tool_choice="auto").offered_tools == []


@pytest.mark.parametrize(
    "prompt", [5, None, [], [1, "a"], ["a", 1], ["a", [1]], [True], [[-1]], {"a": 1}, "\ud800", ["a"] * 65]
)
def test_prompts_that_are_none(prompt: object) -> None:
    if prompt == []:
        assert completion(prompt=[]).prompt == [[]]  # refused at admission, with "no tokens"
        return
    assert refused(CompletionRequest, {"prompt": prompt}).param == "prompt"


def test_forms_are_brought_to_one() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].content == "Hello"
    assert chat(stop="x").stop == ["x"]
    assert chat().stop == []
    assert completion(prompt="Hello").prompt == completion(prompt=["Hello"]).prompt == ["Hello"]
    assert completion(prompt=[1, 2]).prompt == completion(prompt=[[1, 2]]).prompt == [[1, 2]]
    assert completion(prompt=["a", "b"]).prompt == ["a", "b"]
    assert chat(logit_bias={"5": 1, "0": -2.5}).logit_bias == {5: 1.0, 0: -2.5}
    assert chat(logit_bias=None).logit_bias == chat().logit_bias == {}
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


def test_a_chat_with_calls_and_their_results_can_be_sent_back() -> None:
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Let me look."},
        {"role": "tool", "content": "12 degrees", "tool_call_id": "c"},
    ]
    asked, answered = chat(messages=[*MESSAGES, *turns]).messages[1:]
    assert asked.tool_calls is not None
    assert asked.tool_calls[0].function.arguments == "{}"
    assert answered.tool_call_id == "c"
