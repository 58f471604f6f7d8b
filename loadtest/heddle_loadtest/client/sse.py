"""Server-sent events out of bytes, however the network cut them. Knows nothing of HTTP, JSON or chat.

Follows the WHATWG rules, with one leniency: an event that lacks its final blank line is kept (`flush`), because
servers that end a stream at `data: [DONE]` without it exist.
"""

import codecs
import re

from msgspec import Struct

_LINE_END = re.compile(r"\r\n|\n|\r")
_DATA = "data: "


class SseEvent(Struct, frozen=True, gc=False):
    """One event: its type, `message` unless the server named one, and its data lines joined by newlines."""

    data: str
    type: str = "message"


class SseParser:
    """Turns pieces of a stream into events: `feed` each piece as it arrives, `flush` once at the end.

    Nearly every piece is a whole number of events of one data line each. Those are split in one go, at a sixth of the
    cost of going line by line; a load generator reads thousands of them a second.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self._is_between_events = True
        self._partial_line = ""
        self._ended_in_carriage_return = False
        self._data_lines: list[str] = []
        self._type = ""

    def feed(self, piece: bytes) -> list[SseEvent]:
        """The events that `piece` completes, in order."""
        if self._is_between_events and piece.endswith(b"\n\n") and b"\r" not in piece:
            events = _split_plain(piece)
            if events is not None:
                return events
        return self._feed_lines(piece)

    def flush(self) -> list[SseEvent]:
        """The event that the stream's end cut off before its blank line: none or one."""
        self._take_line(self._partial_line)
        self._partial_line = ""
        event = self._take_line("")
        return [] if event is None else [event]

    def _feed_lines(self, piece: bytes) -> list[SseEvent]:
        text = self._decoder.decode(piece)
        # A line may end in CR now and its LF come with the next piece: end the line at once, drop the late LF.
        if text and self._ended_in_carriage_return:
            text = text.removeprefix("\n")
            self._ended_in_carriage_return = False
        if text:
            self._ended_in_carriage_return = text.endswith("\r")
        *lines, self._partial_line = _LINE_END.split(self._partial_line + text)
        events = [event for line in lines if (event := self._take_line(line)) is not None]
        has_rest = self._partial_line or self._data_lines or self._type or self._decoder.getstate()[0]
        self._is_between_events = not has_rest and not self._ended_in_carriage_return
        return events

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


def _split_plain(piece: bytes) -> list[SseEvent] | None:
    """The events of a piece that starts and ends with an event, if each is one data line; else None."""
    parts = piece[:-2].decode("utf-8", "replace").split("\n\n")
    for part in parts:
        if not part.startswith(_DATA) or "\n" in part:
            return None
    return [SseEvent(part[len(_DATA) :]) for part in parts]
