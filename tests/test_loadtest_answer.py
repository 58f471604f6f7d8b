"""A streamed answer fed events by hand: shapes that servers send beside the ordinary one."""

import json

import pytest

from heddle_loadtest.client.answer import StreamedAnswer, read_error_body
from heddle_loadtest.client.result import RequestError, ServerReport
from heddle_loadtest.client.sse import SseEvent


def feed(answer: StreamedAnswer, *chunks: object) -> StreamedAnswer:
    for seconds, chunk in enumerate(chunks):
        data = chunk if isinstance(chunk, str) else json.dumps(chunk)
        answer.take(SseEvent(data), float(seconds))
    answer.end()
    return answer


def choice(delta: object, finish_reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def test_first_content_that_is_not_empty_counts_as_first_token() -> None:
    answer = feed(StreamedAnswer(), choice({"role": "assistant", "content": ""}), choice({"content": "a"}), "[DONE]")
    assert answer.chunk_seconds == [1.0]
    assert answer.error is None


def test_reasoning_counts_for_the_times_but_is_no_text() -> None:
    answer = feed(StreamedAnswer(), choice({"reasoning_content": "hm"}), choice({"content": "a"}, "stop"))
    assert (answer.chunk_seconds, answer.text, answer.finish_reason) == ([0.0, 1.0], "a", "stop")


def test_usage_wins_over_counted_chunks_and_does_not_prolong_the_answer() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 9}}
    answer = feed(StreamedAnswer(), choice({"content": "a b c"}, "stop"), usage, "[DONE]")
    assert (answer.num_prompt_tokens, answer.num_output_tokens, answer.finished_seconds) == (3, 9, 0.0)


def test_text_is_passed_on_as_it_arrives() -> None:
    pieces: list[str] = []
    feed(StreamedAnswer(pieces.append), choice({"content": "a"}), choice({"content": "b"}), "[DONE]")
    assert pieces == ["a", "b"]


def test_what_follows_an_error_or_the_end_is_ignored() -> None:
    answer = feed(StreamedAnswer(), choice({"content": "a"}), {"error": "first"}, {"error": "second"}, choice({}))
    assert answer.error == RequestError("stream_error", "first")
    answer = feed(StreamedAnswer(), choice({"content": "a"}), "[DONE]", {"error": "late"})
    assert answer.error is None


def test_event_of_type_error_is_an_error_whatever_its_shape() -> None:
    answer = StreamedAnswer()
    answer.take(SseEvent('{"message": "out of memory", "code": 500}', "error"), 0.0)
    assert answer.error == RequestError("http_500", "out of memory")


@pytest.mark.parametrize("chunk", [{"choices": None}, {"choices": [None]}, {"choices": [{"delta": None}]}, {}])
def test_odd_chunks_are_passed_over(chunk: object) -> None:
    assert feed(StreamedAnswer(), chunk, choice({"content": "a"}, "stop")).text == "a"


@pytest.mark.parametrize("data", ["{", "[1]", "null", "text"])
def test_event_that_is_no_json_object_is_an_error(data: str) -> None:
    error = feed(StreamedAnswer(), data).error
    assert error is not None
    assert error.code == "malformed_event"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"error": {"message": "m", "type": "t", "code": "c"}}', RequestError("c", "m")),
        ('{"error": {"message": "m", "type": "t", "code": null}}', RequestError("t", "m")),
        ('{"error": {"message": "m", "code": 404}}', RequestError("http_404", "m")),
        ('{"error": "Unauthorized"}', RequestError("http_400", "Unauthorized")),
        ('{"detail": "no"}', RequestError("http_400", '{"detail": "no"}')),
        ("<html>", RequestError("http_400", "<html>")),
        ("", RequestError("http_400", "no message")),
    ],
)
def test_error_body_is_read_in_every_usual_form(body: str, expected: RequestError) -> None:
    assert read_error_body(400, body) == expected


def test_plain_completions_bring_text() -> None:
    chunks = [{"choices": [{"index": 0, "text": text, "finish_reason": None}]} for text in ("a", "b")]
    answer = feed(StreamedAnswer(), *chunks, {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
    assert (answer.text, answer.chunk_seconds, answer.finish_reason) == ("ab", [0.0, 1.0], "length")
    assert answer.finished_seconds == 2.0


def test_heddles_own_part_is_read_in_seconds_wherever_it_stands() -> None:
    part = {"adapter": "sql", "version": 3, "cache": "disk", "load_ms": 182.0, "queue_ms": None, "ttft_ms": 231}
    for chunk in ({**choice({}, "stop"), "heddle": part}, {"choices": [], "usage": {}, "heddle": part}):
        answer = feed(StreamedAnswer(), choice({"content": "a"}), chunk, "[DONE]")
        assert answer.server == ServerReport(cache="disk", load_seconds=0.182, queue_seconds=None, ttft_seconds=0.231)


@pytest.mark.parametrize(
    "odd",
    [
        {"choices": [{"delta": {"content": "a", "reasoning": 3}, "finish_reason": 7}], "usage": "none"},
        {"choices": [{"delta": {"content": "a"}}], "usage": {"prompt_tokens": "three"}, "heddle": []},
        {"choices": [{"delta": {"content": "a", "tool_calls": [{}]}, "text": 5}, "another"]},
    ],
)
def test_fields_of_another_type_do_not_cost_the_others(odd: object) -> None:
    answer = feed(StreamedAnswer(), odd, choice({}, "stop"))
    assert (answer.text, answer.chunk_seconds, answer.error) == ("a", [0.0], None)
    assert answer.num_prompt_tokens is None


def test_usage_of_odd_chunks_is_kept() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 9, "details": None}
    answer = feed(StreamedAnswer(), choice({"content": "a"}, "stop"), {"choices": None, "usage": usage})
    assert (answer.num_prompt_tokens, answer.num_output_tokens) == (3, 9)
