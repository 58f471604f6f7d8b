"""A streamed answer fed events by hand: shapes that servers send beside the ordinary one."""

import json

import pytest

from heddle_loadtest.answer import StreamedAnswer, read_error_body
from heddle_loadtest.result import RequestError
from heddle_loadtest.sse import SseEvent


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
