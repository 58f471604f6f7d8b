"""An answer's text taken apart: words, reasoning and tool calls, in the forms of several families, piece by piece."""

from __future__ import annotations

import json

import pytest

from heddle_server.api.answer_format import AnswerFormat, answer_format
from heddle_server.api.answer_reader import AnswerReader, Parts

# What the chat templates of these families contain, as far as it tells them apart.
HERMES = "{% if tools %}<tool_call>{% endif %}"
THINKING = HERMES + "<think>"
LLAMA3 = '{"name": function name, "parameters": dictionary of argument name and its value}'
MISTRAL = "{% if tools %}[TOOL_CALLS]{% endif %}"
PHI4 = "<|tool_call|>"
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def format_of(chat_template: str) -> AnswerFormat:
    found = answer_format({}, chat_template, {})
    assert found is not None
    return found


def read(
    text: str, chat_template: str, prefix: str = "", *, piece: int = 1, has_tools: bool = True, is_parallel: bool = True
) -> Parts:
    """All of an answer, `piece` characters at a time; checks that no part of it is told twice or late."""
    template = format_of(chat_template).template(has_tools)
    reader = AnswerReader(template, prefix, [WEATHER] if has_tools else [], is_parallel=is_parallel)
    parts = Parts()
    for begin in range(0, len(text), piece):
        parts += reader.feed(text[begin : begin + piece])
    return parts + reader.finish()


def calls(parts: Parts) -> list[tuple[str, object]]:
    return [(call.name, json.loads(call.arguments)) for call in parts.tool_calls]


@pytest.mark.parametrize("piece", [1, 3, 1000])
@pytest.mark.parametrize(
    ("chat_template", "text"),
    [
        (HERMES, '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'),
        (LLAMA3, '{"name": "weather", "parameters": {"city": "Oslo"}}'),
        (LLAMA3, '<|python_tag|>{"name": "weather", "parameters": {"city": "Oslo"}}'),
        (MISTRAL, '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}}]'),
        (PHI4, '<|tool_call|>[{"name": "weather", "arguments": {"city": "Oslo"}}]<|/tool_call|>'),
    ],
)
def test_a_call_in_each_familys_form(chat_template: str, text: str, piece: int) -> None:
    parts = read(text, chat_template, piece=piece)
    assert calls(parts) == [("weather", {"city": "Oslo"})]
    assert (parts.content, parts.reasoning) == ("", "")
    assert parts.tool_calls[0].id.startswith("call_")


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_words_reasoning_and_two_calls(piece: int) -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>'
    text = f"<think>\nWhich city?\n</think>\n\nI look it up.\n{call % 'Oslo'}\n{call % 'Rome'}"
    parts = read(text, THINKING, piece=piece)
    assert parts.reasoning == "Which city?"
    assert parts.content == "I look it up."
    assert calls(parts) == [("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"})]
    assert len({each.id for each in parts.tool_calls}) == 2


@pytest.mark.parametrize("piece", [1, 1000])
def test_reasoning_that_the_prompt_has_begun(piece: int) -> None:
    parts = read("Hm.\n</think>\n\nYes.", THINKING, "<|im_start|>assistant\n<think>\n", piece=piece)
    assert (parts.reasoning, parts.content) == ("Hm.", "Yes.")
    parts = read("Yes.", THINKING, "<|im_start|>assistant\n<think>\n\n</think>\n\n", piece=piece)
    assert (parts.reasoning, parts.content) == ("", "Yes.")


@pytest.mark.parametrize("text", ["", " A line.\n\nAnother, with spaces at its end.  \n", "a < b <tool", "{}", "\n"])
@pytest.mark.parametrize("piece", [1, 1000])
@pytest.mark.parametrize("chat_template", [HERMES, LLAMA3, PHI4, THINKING])
def test_words_alone_stay_as_they_are(text: str, piece: int, chat_template: str) -> None:
    assert read(text, chat_template, piece=piece) == Parts(text)


def test_words_are_told_as_they_come() -> None:
    reader = AnswerReader(format_of(HERMES).template(True), "", [WEATHER])
    assert [reader.feed(word).content for word in ("It", " is", " cold.")] == ["It", " is", " cold."]


@pytest.mark.parametrize("piece", [1, 1000])
@pytest.mark.parametrize(
    "broken",
    [
        '<tool_call>\n{"name": "weather", "arguments": {"city":\n</tool_call> and more',
        '<tool_call>\n{"name": "weather"}\n</tool_call>',
        '<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>',
        "<tool_call>\n[1, 2]\n</tool_call>",
        "<tool_call>\nnothing of the kind",
    ],
)
def test_a_call_that_is_none_comes_out_as_the_words_it_is(broken: str, piece: int) -> None:
    text = f"Well. {broken}"
    assert read(text, HERMES, piece=piece) == Parts(text)


@pytest.mark.parametrize("piece", [1, 4, 1000])
def test_a_good_call_before_a_bad_one_stays_a_call(piece: int) -> None:
    good = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    parts = read(f"a {good} then <tool_call>bad</tool_call> z", HERMES, piece=piece)
    assert calls(parts) == [("weather", {})]
    assert parts.content == "a  then <tool_call>bad</tool_call> z"


@pytest.mark.parametrize("piece", [1, 1000])
@pytest.mark.parametrize("arguments", ['{"a": "\\ud800"}', '{"a": NaN}'])
def test_arguments_that_cannot_be_sent_are_words(arguments: str, piece: int) -> None:
    text = f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>'
    assert read(text, HERMES, piece=piece) == Parts(text)
    assert read("[TOOL_CALLS] oops", MISTRAL, piece=piece) == Parts("[TOOL_CALLS] oops")


def test_marks_that_are_tokens_and_no_text_are_known() -> None:
    for chat_template, token, expected in (
        (HERMES, "<|im_start|>", False),
        (HERMES, "<tool_call>", True),
        (MISTRAL, "[TOOL_CALLS]", True),
    ):
        found = answer_format({}, chat_template, {token: 9})
        assert found is not None
        assert found.has_special_marks == expected


def test_without_tools_nothing_is_taken_for_a_call() -> None:
    text = '{"name": "weather", "parameters": {}}'
    assert read(text, LLAMA3, has_tools=False) == Parts(text)
    assert "tool_calls" in format_of(HERMES).template(has_tools=True)["fields"]
    assert "tool_calls" not in format_of(HERMES).template(has_tools=False)["fields"]


def test_one_call_is_all_where_no_more_are_wanted() -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>\n'
    reader = AnswerReader(format_of(HERMES).template(True), "", [WEATHER], is_parallel=False)
    parts = reader.feed(call * 3)
    assert len(parts.tool_calls) == 1
    assert reader.is_over
    assert parts + reader.feed("more") + reader.finish() == parts


def test_a_tokenizers_own_description_comes_first() -> None:
    own = {
        "start_anchor": "<bot>",
        "fields": {"content": {}, "thinking": {"open": "[[", "close": "]]"}},
        "defaults": {"role": "assistant"},
    }
    found = answer_format({"response_template": own}, "[[ ]]", {})
    assert found is not None
    reader = AnswerReader(found.template(False), "<bot>", [])
    parts = reader.feed("[[Hm]] Yes") + reader.finish()
    assert (parts.reasoning, parts.content) == ("Hm", "Yes")
    assert answer_format({}, "{{ messages }}", {}) is None
    assert answer_format({}, None, {}) is None
