"""The JSON of the fake server: what it reads of a request, and answers shaped as heddle's own. Knows no times.

Chunks of a stream differ in their text alone, so a stream keeps the bytes around it and each chunk is one join.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

DONE = b"data: [DONE]\n\n"
DEFAULT_MAX_TOKENS = 16  # as OpenAI's completions
_MARK = "\u0000"  # stands for the text while a chunk's frame is made


class Message(Struct):
    """One message of a chat; content may also come as a list of parts, which count as nothing here."""

    role: str
    content: Any = None


class Body(Struct):
    """What matters here of a request's body; all else is ignored."""

    model: str | None = None
    adapter: str | None = None
    messages: list[Message] = []
    prompt: str | list[int] = ""
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None

    @property
    def num_tokens(self) -> int:
        """Of the answer."""
        return max(1, self.max_completion_tokens or self.max_tokens or DEFAULT_MAX_TOKENS)

    @property
    def num_prompt_tokens(self) -> int:
        """Words, or token ids."""
        if isinstance(self.prompt, list):
            return len(self.prompt)
        texts = [self.prompt, *(message.content for message in self.messages if isinstance(message.content, str))]
        return max(1, sum(len(text.split()) for text in texts))

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end in a chunk with the usage."""
        return bool(self.stream_options and self.stream_options.get("include_usage"))


class Answer:
    """One answer: its bytes, whole or chunk by chunk."""

    def __init__(self, number: int, model: str, body: Body, *, is_chat: bool) -> None:
        self._is_chat = is_chat
        self._body = body
        prefix, whole = ("chatcmpl", "chat.completion") if is_chat else ("cmpl", "text_completion")
        self._head = {"id": f"{prefix}-{number:08x}", "object": whole, "created": 0, "model": model}
        self._chunk_head = self._head | {"object": "chat.completion.chunk" if is_chat else whole}
        before, after = _event(self._chunk(_MARK, None)).split(msgspec.json.encode(_MARK)[1:-1])
        self._frame = before, after

    def opening(self) -> bytes:
        """The event before the first token: a chat says whose turn it is."""
        delta = {"role": "assistant", "content": ""}
        return _event(self._chunk_of({"delta": delta}, None)) if self._is_chat else b""

    def token(self, index: int) -> bytes:
        """The event of a token that is not the last."""
        return b"%b%d %b" % (self._frame[0], index, self._frame[1])

    def last_token(self, report: dict[str, object]) -> bytes:
        """The event of the last token, with heddle's own part."""
        return _event(self._chunk(f"{self._body.num_tokens - 1} ", "length") | {"heddle": report})

    def closing(self) -> bytes:
        """The events after the last token."""
        usage = {**self._chunk_head, "choices": [], "usage": self._usage()}
        return (_event(usage) if self._body.wants_usage else b"") + DONE

    def whole(self, report: dict[str, object]) -> bytes:
        """The answer to a request that does not stream."""
        text = "".join(f"{index} " for index in range(self._body.num_tokens))
        message = {"message": {"role": "assistant", "content": text, "refusal": None}}
        choice = {"index": 0, **(message if self._is_chat else {"text": text}), "logprobs": None}
        choice["finish_reason"] = "length"
        return msgspec.json.encode({**self._head, "choices": [choice], "usage": self._usage(), "heddle": report})

    def _chunk(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        return self._chunk_of({"delta": {"content": text}} if self._is_chat else {"text": text}, finish_reason)

    def _chunk_of(self, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "logprobs": None, **content, "finish_reason": finish_reason}
        return {**self._chunk_head, "choices": [choice], **({"usage": None} if self._body.wants_usage else {})}

    def _usage(self) -> dict[str, Any]:
        prompt, generated = self._body.num_prompt_tokens, self._body.num_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": 0},
        }


def envelope(message: str, kind: str, code: str, param: str | None = None) -> bytes:
    """OpenAI's form of an error."""
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
