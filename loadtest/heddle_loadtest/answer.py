"""A streamed chat answer, put together event by event. Knows the OpenAI chunk shapes, no HTTP and no clock."""

import json
from collections.abc import Callable

from heddle_loadtest.result import RequestError
from heddle_loadtest.sse import SseEvent

_MESSAGE_LIMIT = 300  # characters of a server's message that are kept: enough to read, short enough for a report


class StreamedAnswer:
    """Takes each event with its arrival time; holds what has come so far."""

    def __init__(self, on_text: Callable[[str], None] | None = None) -> None:
        self.text = ""
        self.chunk_seconds: list[float] = []
        self.finished_seconds: float | None = None
        self.finish_reason: str | None = None
        self.num_prompt_tokens: int | None = None
        self.error: RequestError | None = None
        self._num_reported_tokens: int | None = None
        self._is_done = False
        self._on_text = on_text

    @property
    def num_output_tokens(self) -> int:
        """As the server reported, else the number of chunks with content."""
        return len(self.chunk_seconds) if self._num_reported_tokens is None else self._num_reported_tokens

    def take(self, event: SseEvent, arrived_seconds: float) -> None:
        """Reads one event. Whatever follows an error or `[DONE]` is ignored."""
        if self._is_done or self.error is not None:
            return
        if event.data == "[DONE]":
            self._is_done = True
            return
        chunk = _read_object(event.data)
        if chunk is None:
            self.error = RequestError("malformed_event", f"an event is not a JSON object: {event.data[:80]!r}")
        elif chunk.get("error") or event.type == "error":
            self.error = read_error(chunk.get("error") or chunk, fallback_code="stream_error")
        else:
            self._take_usage(chunk.get("usage"))
            self._take_choices(chunk.get("choices"), arrived_seconds)

    def end(self) -> None:
        """The stream is over: an answer that was not finished by then is an error."""
        if self.error is None and not self._is_done and self.finish_reason is None:
            message = f"the stream ended after {len(self.chunk_seconds)} chunks, without finish_reason or [DONE]"
            self.error = RequestError("stream_interrupted", message)

    def _take_usage(self, usage: object) -> None:
        if not isinstance(usage, dict):
            return
        if isinstance(num_prompt_tokens := usage.get("prompt_tokens"), int):
            self.num_prompt_tokens = num_prompt_tokens
        if isinstance(num_output_tokens := usage.get("completion_tokens"), int):
            self._num_reported_tokens = num_output_tokens

    def _take_choices(self, choices: object, arrived_seconds: float) -> None:
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return  # the usage chunk has no choices
        self.finished_seconds = arrived_seconds
        if isinstance(finish_reason := choices[0].get("finish_reason"), str):
            self.finish_reason = finish_reason
        if isinstance(delta := choices[0].get("delta"), dict):
            self._take_delta(delta, arrived_seconds)

    def _take_delta(self, delta: dict[str, object], arrived_seconds: float) -> None:
        content = delta.get("content")
        # Reasoning is generated and counted in the usage like content, so it counts for the times, not for the text.
        if content or delta.get("reasoning_content") or delta.get("reasoning"):
            self.chunk_seconds.append(arrived_seconds)
        if content and isinstance(content, str):
            self.text += content
            if self._on_text is not None:
                self._on_text(content)


def read_error(error: object, fallback_code: str) -> RequestError:
    """The `error` value of an OpenAI envelope, which some servers fill with a bare string or a numeric code."""
    if not isinstance(error, dict):
        return RequestError(fallback_code, str(error)[:_MESSAGE_LIMIT])
    code, kind = error.get("code"), error.get("type")
    if isinstance(code, int):
        code = f"http_{code}"
    return RequestError(str(code or kind or fallback_code), str(error.get("message", error))[:_MESSAGE_LIMIT])


def read_error_body(http_status: int, body: str) -> RequestError:
    """The error that an answer with a failure status carries, in OpenAI's envelope or not."""
    envelope = _read_object(body)
    error = envelope.get("error") if envelope else None
    return read_error(error or body or "no message", fallback_code=f"http_{http_status}")


def _read_object(text: str) -> dict[str, object] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
