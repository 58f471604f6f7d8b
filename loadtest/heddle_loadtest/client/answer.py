"""A streamed answer, put together event by event. Knows what chunks mean, no HTTP and no clock."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from heddle_loadtest.client.chunk import Choice, Chunk, decode_chunk
from heddle_loadtest.client.result import CLIENT_CODES, RequestError, ServerReport
from heddle_loadtest.client.sse import SseEvent

_CODE_LIMIT = 64
_MESSAGE_LIMIT = 300  # characters of a server's message that are kept: enough to read, short enough for a report


_GIVEN_UP = ("abort", "error")  # finish reasons of vLLM and SGLang


class StreamedAnswer:
    """Takes each event with its arrival time; holds what has come so far."""

    __slots__ = (
        "_is_done",
        "_num_reported_tokens",
        "_on_text",
        "_pieces",
        "chunk_seconds",
        "error",
        "finish_reason",
        "finished_seconds",
        "http_status",
        "num_prompt_tokens",
        "server",
    )

    def __init__(self, on_text: Callable[[str], None] | None = None) -> None:
        self.chunk_seconds: list[float] = []
        self.finished_seconds: float | None = None
        self.finish_reason: str | None = None
        self.num_prompt_tokens: int | None = None
        self.server: ServerReport | None = None
        self.http_status: int | None = None  # filled in by whoever reads the answer, as is an error of the connection
        self.error: RequestError | None = None
        self._num_reported_tokens: int | None = None
        self._is_done = False
        self._pieces: list[str] = []
        self._on_text = on_text

    @property
    def text(self) -> str:
        """All content so far."""
        return "".join(self._pieces)

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
        chunk = decode_chunk(event.data)
        if chunk is None:
            self.error = RequestError("malformed_event", f"an event is not a JSON object: {event.data[:80]!r}")
        elif chunk.error or event.type == "error":
            error = chunk.error or msgspec.json.decode(event.data)
            self.error = read_error(error, fallback_code="stream_error")
        else:
            self._take_chunk(chunk, arrived_seconds)

    @property
    def is_whole(self) -> bool:
        """Whether it has come to its end without an error."""
        return self._is_done and self.error is None

    def end(self) -> None:
        """The stream is over: an answer that was not finished by then is an error, and so is one given up."""
        if self.error is None and self.finish_reason in _GIVEN_UP:
            message = f"the server gave the answer up: finish_reason is {self.finish_reason!r}"
            self.error = RequestError("given_up", message)
        if self.error is None and not self._is_done and self.finish_reason is None:
            message = f"the stream ended after {len(self.chunk_seconds)} chunks, without finish_reason or [DONE]"
            self.error = RequestError("stream_interrupted", message)

    def _take_chunk(self, chunk: Chunk, arrived_seconds: float) -> None:
        if chunk.choices:  # the usage chunk has none
            self._take_choice(chunk.choices[0], arrived_seconds)
        usage = chunk.usage
        if usage is not None:
            if usage.prompt_tokens is not None:
                self.num_prompt_tokens = usage.prompt_tokens
            if usage.completion_tokens is not None:
                self._num_reported_tokens = usage.completion_tokens
        if chunk.heddle is not None:
            self.server = chunk.heddle.to_report()

    def _take_choice(self, choice: Choice, arrived_seconds: float) -> None:
        self.finished_seconds = arrived_seconds
        if choice.finish_reason is not None:
            self.finish_reason = choice.finish_reason
        delta = choice.delta
        content = choice.text if delta is None else delta.content
        if content:
            self.chunk_seconds.append(arrived_seconds)
            self._pieces.append(content)
            if self._on_text is not None:
                self._on_text(content)
        # Reasoning is generated and counted in the usage like content, so it counts for the times, not for the text.
        elif delta is not None and (delta.reasoning_content or delta.reasoning):
            self.chunk_seconds.append(arrived_seconds)


def read_error(error: object, fallback_code: str) -> RequestError:
    """The `error` value of an OpenAI envelope, which some servers fill with a bare string or a numeric code."""
    if not isinstance(error, dict):
        return RequestError(fallback_code, str(error)[:_MESSAGE_LIMIT])
    code, kind = error.get("code"), error.get("type")
    if isinstance(code, int):
        code = f"http_{code}"
    code = str(code or kind or fallback_code)[:_CODE_LIMIT]
    if code in CLIENT_CODES:
        code = f"server_{code}"  # these are the client's own to say
    return RequestError(code, str(error.get("message", error))[:_MESSAGE_LIMIT])


def read_error_body(http_status: int, body: str) -> RequestError:
    """The error that an answer with a failure status carries, in OpenAI's envelope or not."""
    envelope = decode_chunk(body)
    return read_error((envelope and envelope.error) or body or "no message", fallback_code=f"http_{http_status}")
