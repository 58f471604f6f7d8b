"""One chunk of a streamed answer, decoded: OpenAI's shapes, and heddle's own part. Knows no stream and no clock.

A chunk of the expected shape is decoded in one go. Any other JSON object goes through the lenient reader, which takes
what it understands and leaves the rest: servers differ.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from heddle_loadtest.client.result import ServerReport

_Count = Annotated[int, Meta(ge=0, le=1 << 31)]


class Usage(Struct, frozen=True, gc=False):
    """The tokens as the server counted them."""

    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None


class HeddlePart(Struct, frozen=True, gc=False):
    """The `heddle` object of a reply; times in milliseconds."""

    cache: str | None = None
    load_ms: float | None = None
    queue_ms: float | None = None
    ttft_ms: float | None = None

    def to_report(self) -> ServerReport:
        """The same in seconds."""
        return ServerReport(
            cache=self.cache,
            load_seconds=_seconds(self.load_ms),
            queue_seconds=_seconds(self.queue_ms),
            ttft_seconds=_seconds(self.ttft_ms),
        )


class Delta(Struct, frozen=True, gc=False):
    """What a chat chunk adds. Reasoning has one name in vLLM, another in most others."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(Struct, frozen=True):
    """The first choice of a chunk: `delta` of a chat, `text` of a plain completion."""

    delta: Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class Chunk(Struct, frozen=True):
    """One chunk."""

    choices: list[Choice] = []
    usage: Usage | None = None
    heddle: HeddlePart | None = None
    error: Any = None


_Part = TypeVar("_Part", bound=Struct)
_decoder = msgspec.json.Decoder(Chunk)


def decode_chunk(data: str) -> Chunk | None:
    """None if `data` is not a JSON object."""
    try:
        return _decoder.decode(data)
    except msgspec.ValidationError:
        return _read_leniently(_decode_any(data))
    except (msgspec.DecodeError, RecursionError):
        return None


def _decode_any(data: str) -> object:
    """A shape that is not the expected one is noticed before the end of the text, which may be no JSON after all."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError):
        return None


def _read_leniently(value: object) -> Chunk | None:
    if not isinstance(value, dict):
        return None
    choices = value.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return Chunk(
        choices=[_read_choice(first)] if isinstance(first, dict) else [],
        usage=_read_known(value.get("usage"), Usage),
        heddle=_read_known(value.get("heddle"), HeddlePart),
        error=value.get("error"),
    )


def _read_choice(choice: dict[str, Any]) -> Choice:
    plain = {name: value for name, value in choice.items() if name in ("text", "finish_reason")}
    read = _read_known(plain, Choice) or Choice()
    return msgspec.structs.replace(read, delta=_read_known(choice.get("delta"), Delta))


def _read_known(value: object, kind: type[_Part]) -> _Part | None:
    """Field by field, those of another type than expected left out."""
    if not isinstance(value, dict):
        return None
    known = {}
    for field in msgspec.structs.fields(kind):
        try:
            known[field.name] = msgspec.convert(value.get(field.name), field.type)
        except msgspec.ValidationError:
            continue
    return kind(**known)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
