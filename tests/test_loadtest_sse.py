"""The SSE parser against every way a network or a server can cut and write events."""

import random
from itertools import pairwise

import pytest

from heddle_loadtest.client.sse import SseEvent, SseParser

STREAM = (
    "\ufeff: keep-alive\n\n"
    'data: {"text": "gr\u00fc\u00df dich \U0001f9f5"}\n\n'
    "event: error\r\ndata: first\r\ndata:second\r\n\r\n"
    "id: 3\rdata:  two spaces\r\r"
    "event: no data, no event\n\n"
    "data\n\n"
    "data: [DONE]\n\n"
).encode()
EVENTS = [
    SseEvent('{"text": "gr\u00fc\u00df dich \U0001f9f5"}'),
    SseEvent("first\nsecond", "error"),
    SseEvent(" two spaces"),
    SseEvent(""),
    SseEvent("[DONE]"),
]


@pytest.mark.parametrize("piece_size_bytes", [1, 2, 3, 7, 64, len(STREAM)])
def test_events_do_not_depend_on_how_the_stream_is_cut(piece_size_bytes: int) -> None:
    parser = SseParser()
    starts = range(0, len(STREAM), piece_size_bytes)
    events = [event for start in starts for event in parser.feed(STREAM[start : start + piece_size_bytes])]
    assert events + parser.flush() == EVENTS


@pytest.mark.parametrize("cut", range(len(STREAM) + 1))
def test_events_do_not_depend_on_where_the_stream_is_cut(cut: int) -> None:
    parser = SseParser()
    assert parser.feed(STREAM[:cut]) + parser.feed(STREAM[cut:]) + parser.flush() == EVENTS


def test_event_is_given_out_as_soon_as_it_is_complete() -> None:
    parser = SseParser()
    assert parser.feed(b"data: now\r\n") == []
    assert parser.feed(b"\r") == [SseEvent("now")]
    assert parser.feed(b"\n") == []


def test_last_event_without_its_blank_line_is_kept() -> None:
    parser = SseParser()
    assert parser.feed(b"data: a\n\ndata: [DONE]") == [SseEvent("a")]
    assert parser.flush() == [SseEvent("[DONE]")]
    assert parser.flush() == []


def test_bytes_that_are_no_utf8_do_not_stop_the_stream() -> None:
    assert SseParser().feed(b"data: \xff\n\n") == [SseEvent("\ufffd")]


def test_events_that_come_together_are_split_without_losing_one() -> None:
    """The short way through the parser, taken only between events, against the long one."""
    draws = random.Random(3)
    plain, odd = (
        ['data: {"a": 1}\n\n', "data: gr\u00fc\u00df\n\n"],
        ["event: x\ndata: y\n\n", ": note\n\n", "data: z\r\n\r\n"],
    )
    for _ in range(300):
        written = "".join(draws.choice(plain * 4 + odd) for _ in range(12)).encode()
        at_once, in_pieces, by_byte = SseParser(), SseParser(), SseParser()
        cuts = sorted(draws.sample(range(len(written) + 1), 5))
        pieces = [written[start:end] for start, end in pairwise([0, *cuts, len(written)])]
        expected = [event for byte in written for event in by_byte.feed(bytes([byte]))]
        assert at_once.feed(written) == expected
        assert [event for piece in pieces for event in in_pieces.feed(piece)] == expected
