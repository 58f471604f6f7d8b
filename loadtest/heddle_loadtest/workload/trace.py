"""Traces of real services: three published formats to one list of times and lengths. Draws nothing, sends nothing.

burstgpt   CSV, a header, then a request a line: `Timestamp` (seconds from midnight of the first day), `Request tokens`
           and `Response tokens`; `Model`, `Total tokens`, `Log Type` and, since BurstGPT_3, `Session ID` and `Elapsed
           time` are not used. Source: README of HPMLL/BurstGPT; Wang et al., "BurstGPT", KDD 2025, arXiv 2401.17644.
azure      CSV, a header, then a request a line: `TIMESTAMP` (date and time, up to seven digits after the seconds, in
           the week of 2024 with `+00:00` after them), `ContextTokens`, `GeneratedTokens`. Source: AzurePublicDataset,
           AzureLLMInferenceDataset2023.md and 2024.md.
mooncake   JSON lines: `timestamp` (milliseconds), `input_length`, `output_length`, and `hash_ids`, one for each block
           of 512 prompt tokens, equal where the prompt up to there is equal. Source: kvcache-ai/Mooncake,
           FAST25-release/README.md.

What the formats leave open is decided here: a request with an answer of no tokens failed (BurstGPT says so of its own)
and is left out; a prompt of no tokens counts as one of 1 token, since nothing less can be asked.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from heddle_loadtest.errors import SpecError

FORMATS = ("burstgpt", "azure", "mooncake")
MAX_TOKENS = 1_000_000  # of a prompt or an answer; more is a damaged file
MAX_BACKWARD_SECONDS = 60  # lines that go back no further are put in order: machines that log together disagree a bit
_MAX_LINE_BYTES = 1 << 20  # the longest line of Mooncake's traces has 4 KiB
_MAX_SECONDS = 10**9
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CORRECT_IT = "Correct the line or take it out"

_Line = tuple[int, str]  # its number, from 1, and its text


class TraceEntry(Struct, frozen=True):
    """One request of a trace."""

    at_seconds: float  # after the first one
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()  # of each block of 512 prompt tokens; empty where the format has none


class _Row(Struct, frozen=True):
    """One line as it stands in the file."""

    line: int
    microseconds: int  # whole, so that no clock time loses digits
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()


class _MooncakeLine(Struct):
    timestamp: Annotated[float, Meta(ge=0, le=_MAX_SECONDS * 1000)]
    input_length: Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
    output_length: Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path, format: str = "auto", *, num_requests: int | None = None) -> tuple[TraceEntry, ...]:
    """The trace's requests by their times, the first at 0; the file is read line by line, `num_requests` at most.

    `format` is one of FORMATS, or `auto`: whatever the first line looks like. Raises SpecError with file and line
    number for a line that is malformed, too long, out of bounds or more than a minute earlier than one before it.
    """
    if format not in (*FORMATS, "auto"):
        raise SpecError("format", format, "is no trace format", f"Give one of auto, {', '.join(FORMATS)}")
    lines = _lines(path)
    first = next(lines, None)
    if first is None:
        raise SpecError("trace", path, "is empty", "Name a file with a trace")
    if format == "auto":
        format = _detect(first[1], path)
    rows = _mooncake_rows(first, lines, path) if format == "mooncake" else _csv_rows(format, first, lines, path)
    entries = _in_order(rows, path, num_requests)
    if not entries:
        problem = "holds no request that got an answer"
        raise SpecError("trace", path, problem, "Name a file with at least one answer of a token or more")
    return entries


def _detect(first_line: str, path: Path) -> str:
    """The format that a first line is of."""
    if first_line.lstrip().startswith("{"):
        return "mooncake"
    columns = _split(first_line)
    for format, (names, _) in _CSV_FORMATS.items():
        if set(names) & set(columns):
            return format
    problem = f"line 1 is of no known format: {_shorten(first_line)}"
    raise SpecError("trace", path, problem, f"Name a trace of {', '.join(FORMATS)}, with its header where it is CSV")


def _lines(path: Path) -> Iterator[_Line]:
    """The lines that are not blank. Raises SpecError for what cannot be read."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > _MAX_LINE_BYTES:
                    raise _malformed(path, number, f"is longer than {_MAX_LINE_BYTES:,} bytes")
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, text
    except OSError as error:
        raise SpecError("trace", path, error.strerror or "cannot be read", "Name a file with a trace") from error
    except UnicodeDecodeError as error:
        raise _malformed(path, number, "is not UTF-8 text") from error


def _csv_rows(format: str, header: _Line, lines: Iterable[_Line], path: Path) -> Iterator[_Row]:
    names, parse_time = _CSV_FORMATS[format]
    columns = _split(header[1])
    if missing := [name for name in names if name not in columns]:
        problem = f"line {header[0]} lacks the column {', '.join(map(repr, missing))}; it has {_shorten(header[1])}"
        raise SpecError("trace", path, problem, f"A {format} trace starts with {', '.join(names)} in its header")
    time_at, prompt_at, output_at = (columns.index(name) for name in names)
    for number, line in lines:
        values = _split(line)
        if len(values) != len(columns):
            raise _malformed(path, number, f"has {len(values)} columns, the header has {len(columns)}")
        try:
            column = names[0]
            microseconds = parse_time(values[time_at])
            column = names[1]
            num_prompt_tokens = _parse_tokens(values[prompt_at])
            column = names[2]
            num_output_tokens = _parse_tokens(values[output_at])
        except ValueError as error:
            raise _malformed(path, number, f"{error}", column) from error
        yield _Row(number, microseconds, num_prompt_tokens, num_output_tokens)


def _mooncake_rows(first: _Line, lines: Iterable[_Line], path: Path) -> Iterator[_Row]:
    decoder = msgspec.json.Decoder(_MooncakeLine)

    def row(number: int, text: str) -> _Row:
        try:
            line = decoder.decode(text)
        except msgspec.MsgspecError as error:
            raise _malformed(path, number, f"is malformed: {error}") from error
        microseconds = round(line.timestamp * 1000)
        return _Row(number, microseconds, line.input_length, line.output_length, line.hash_ids)

    yield row(*first)
    for number, text in lines:
        yield row(number, text)


def _in_order(rows: Iterable[_Row], path: Path, num_requests: int | None) -> tuple[TraceEntry, ...]:
    """Sorted, counted from the first; a line that goes back far means that files were joined, or one is damaged."""
    kept: list[_Row] = []
    latest = -math.inf
    for row in rows:
        if row.microseconds < latest - MAX_BACKWARD_SECONDS * 1_000_000:
            problem = f"is {(latest - row.microseconds) / 1e6:g} seconds earlier than a line before it"
            raise _malformed(
                path, row.line, problem, remedy="Sort the file by time, or give each part a run of its own"
            )
        latest = max(latest, row.microseconds)
        if row.num_output_tokens:
            kept.append(row)
        if len(kept) == num_requests:
            break
    kept.sort(key=lambda row: row.microseconds)
    return tuple(
        TraceEntry(
            (row.microseconds - kept[0].microseconds) / 1e6,
            max(row.num_prompt_tokens, 1),
            row.num_output_tokens,
            row.hash_ids,
        )
        for row in kept
    )


def _split(line: str) -> list[str]:
    """The columns of a CSV line; none of the formats breaks a line inside quotes."""
    return [value.strip() for value in next(csv.reader([line]))]


def _parse_seconds(text: str) -> int:
    """Microseconds of a number of seconds. Raises ValueError."""
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(f"{_shorten(text)} is no number of seconds") from None
    if not 0 <= seconds <= _MAX_SECONDS:
        raise ValueError(f"{_shorten(text)} is not from 0 to {_MAX_SECONDS:,} seconds")
    return round(seconds * 1_000_000)


def _parse_date(text: str) -> int:
    """Microseconds since 1970 of a date and time, UTC where it names no zone. Raises ValueError."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{_shorten(text)} is no date and time") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // timedelta(microseconds=1)


def _parse_tokens(text: str) -> int:
    """Raises ValueError."""
    if not text.removeprefix("-").isdecimal() or len(text) > 12:
        raise ValueError(f"{_shorten(text)} is no number of tokens")
    if not 0 <= int(text) <= MAX_TOKENS:
        raise ValueError(f"{text} is not from 0 to {MAX_TOKENS:,} tokens")
    return int(text)


_CSV_FORMATS: dict[str, tuple[tuple[str, str, str], Callable[[str], int]]] = {
    "burstgpt": (("Timestamp", "Request tokens", "Response tokens"), _parse_seconds),
    "azure": (("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _parse_date),
}


def _malformed(
    path: Path, number: int, problem: str, column: str | None = None, remedy: str = _CORRECT_IT
) -> SpecError:
    where = f"line {number}" if column is None else f"line {number}, column {column!r}:"
    return SpecError("trace", path, f"{where} {problem}", remedy)


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")
