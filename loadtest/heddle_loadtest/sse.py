"""Server-sent events out of bytes, however the network cut them. Knows nothing of HTTP, JSON or chat.

Follows the WHATWG rules, with one leniency: an event that lacks its final blank line is kept (`flush`), because
servers that end a stream at `data: [DONE]` without it exist.
"""

import codecs
import re
from dataclasses import dataclass

_LINE_END = re.compile(r"\r\n|\n|\r")


@dataclass(frozen=True, slots=True)
class SseEvent:
    """One event: its type, `message` unless the server named one, and its data lines joined by newlines."""

    data: str
    type: str = "message"


class SseParser:
    """Turns pieces of a stream into events: `feed` each piece as it arrives, `flush` once at the end."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self._partial_line = ""
        self._ended_in_carriage_return = False
        self._data_lines: list[str] = []
        self._type = ""

    def feed(self, piece: bytes) -> list[SseEvent]:
        """The events that `piece` completes, in order."""
        text = self._decoder.decode(piece)
        if not text:
            return []
        # A line may end in CR now and its LF come with the next piece: end the line at once, drop the late LF.
        if self._ended_in_carriage_return:
            text = text.removeprefix("\n")
        self._ended_in_carriage_return = text.endswith("\r")
        *lines, self._partial_line = _LINE_END.split(self._partial_line + text)
        return [event for line in lines if (event := self._take_line(line)) is not None]

    def flush(self) -> list[SseEvent]:
        """The event that the stream's end cut off before its blank line: none or one."""
        self._take_line(self._partial_line)
        self._partial_line = ""
        event = self._take_line("")
        return [] if event is None else [event]

    def _take_line(self, line: str) -> SseEvent | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")  # a comment starts with the colon, so its name is empty
        value = value.removeprefix(" ")
        if name == "data":
            self._data_lines.append(value)
        elif name == "event":
            self._type = value
        return None

    def _dispatch(self) -> SseEvent | None:
        event = SseEvent("\n".join(self._data_lines), self._type or "message") if self._data_lines else None
        self._data_lines = []
        self._type = ""
        return event
