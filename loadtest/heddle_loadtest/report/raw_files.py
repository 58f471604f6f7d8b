"""The raw files of one repeat: requests, scrapes and the rest of an outcome, as JSON. Knows no folder's layout.

Times in these files count from the repeat's start, in seconds, to the nanosecond: below that is rounding error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from os import replace as rename
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from heddle_loadtest.client.result import RequestResult
from heddle_loadtest.errors import SpecError
from heddle_loadtest.run.outcome import ClientHealth, Outcome, Scrape, UploadResult

_DIGITS = 9  # of a second
_Line = TypeVar("_Line")


class OutcomeHead(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """outcome.json: what has no file of its own."""

    seed: int
    started_at: str
    elapsed_seconds: float
    was_interrupted: bool
    uploads: tuple[UploadResult, ...]
    health: ClientHealth


class _ScrapeLine(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of metrics.jsonl: what differs from the line before."""

    at_seconds: float
    samples: dict[str, float | str]  # what JSON has no number for, as text: nan, inf
    gone: tuple[str, ...] = ()


def on_own_clock(outcome: Outcome) -> Outcome:
    """`outcome` with times that count from its start: what reading its files gives back."""
    start = outcome.started_seconds
    return msgspec.structs.replace(
        outcome,
        started_seconds=0.0,
        ended_seconds=_since(start, outcome.ended_seconds),
        results=tuple(_result_since(start, result) for result in outcome.results),
        uploads=tuple(_upload_since(start, upload) for upload in outcome.uploads),
        scrapes=tuple(
            msgspec.structs.replace(scrape, at_seconds=_since(start, scrape.at_seconds)) for scrape in outcome.scrapes
        ),
    )


def write_requests(outcome: Outcome, path: Path, *, keep_text: bool) -> None:
    """One RequestResult a line; without its text unless `keep_text`."""
    results = (_result_since(outcome.started_seconds, result) for result in outcome.results)
    write_lines(results if keep_text else (msgspec.structs.replace(result, text="") for result in results), path)


def read_requests(path: Path) -> tuple[RequestResult, ...]:
    """What `write_requests` wrote."""
    return tuple(_read_lines(path, RequestResult))


def write_scrapes(outcome: Outcome, path: Path) -> None:
    """One scrape a line, and of its samples those that changed: most of a server's series stand still."""
    write_lines(_scrape_lines(outcome), path)


def read_scrapes(path: Path) -> tuple[Scrape, ...]:
    """What `write_scrapes` wrote, every scrape whole again."""
    scrapes: list[Scrape] = []
    samples: dict[str, float] = {}
    for line in _read_lines(path, _ScrapeLine):
        kept = {name: value for name, value in samples.items() if name not in line.gone} if line.gone else samples
        samples = {**kept, **{name: float(value) for name, value in line.samples.items()}}
        scrapes.append(Scrape(at_seconds=line.at_seconds, samples=samples))
    return tuple(scrapes)


def head_of(outcome: Outcome) -> OutcomeHead:
    """The rest of `outcome`."""
    return OutcomeHead(
        seed=outcome.seed,
        started_at=outcome.started_at,
        elapsed_seconds=_since(outcome.started_seconds, outcome.ended_seconds),
        was_interrupted=outcome.was_interrupted,
        uploads=tuple(_upload_since(outcome.started_seconds, upload) for upload in outcome.uploads),
        health=outcome.health,
    )


def write_json(value: object, path: Path) -> None:
    """An indented JSON document, whole or not at all."""
    with_lines = msgspec.json.format(msgspec.json.encode(value), indent=2)
    _write_whole([with_lines, b"\n"], path)


def read_json(path: Path, type: type[_Line]) -> _Line:
    """A JSON document as `type`. Raises SpecError with the file's name if it is missing or malformed."""
    try:
        return msgspec.json.decode(read_bytes(path), type=type)
    except msgspec.MsgspecError as error:
        raise malformed(path, str(error)) from error


def write_lines(values: Iterable[object], path: Path) -> None:
    """One JSON object a line, whole or not at all."""
    encode = msgspec.json.Encoder().encode
    _write_whole((encode(value) + b"\n" for value in values), path)


def write_text(text: str, path: Path) -> None:
    """A text, whole or not at all."""
    _write_whole([text.encode()], path)


def read_bytes(path: Path) -> bytes:
    """A file's content. Raises SpecError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def malformed(path: Path, problem: str) -> SpecError:
    """The error for a file that is there and wrong."""
    return SpecError("folder", path, f"is malformed: {problem}", "Name a folder that `heddle-loadtest run` wrote")


def _read_lines(path: Path, type: type[_Line]) -> Iterator[_Line]:
    decode = msgspec.json.Decoder(type).decode
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield decode(line)
                except (msgspec.MsgspecError, ValueError) as error:
                    raise malformed(path, f"line {number}: {error}") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> SpecError:
    problem = error.strerror or "cannot be read"
    return SpecError("folder", path, problem, "Name a folder that `heddle-loadtest run` wrote to its end")


def _write_whole(parts: Iterable[bytes], path: Path) -> None:
    """Under another name first: a run that is killed leaves no file that looks whole and is not."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.writelines(parts)
    rename(partial, path)


def _scrape_lines(outcome: Outcome) -> Iterator[_ScrapeLine]:
    before: Mapping[str, float] = {}
    for scrape in outcome.scrapes:
        yield _ScrapeLine(
            at_seconds=_since(outcome.started_seconds, scrape.at_seconds),
            samples={
                name: value if math.isfinite(value) else str(value)
                for name, value in scrape.samples.items()
                if before.get(name) != value
            },
            gone=tuple(name for name in before if name not in scrape.samples),
        )
        before = scrape.samples


def _result_since(start: float, result: RequestResult) -> RequestResult:
    return msgspec.structs.replace(
        result,
        scheduled_seconds=_since(start, result.scheduled_seconds),
        started_seconds=_since(start, result.started_seconds),
        finished_seconds=_since(start, result.finished_seconds),
        chunk_seconds=tuple([round(at - start, _DIGITS) for at in result.chunk_seconds]),
    )


def _upload_since(start: float, upload: UploadResult) -> UploadResult:
    return msgspec.structs.replace(
        upload,
        scheduled_seconds=_since(start, upload.scheduled_seconds),
        finished_seconds=_since(start, upload.finished_seconds),
    )


def _since(start: float, seconds: float) -> float:
    return round(seconds - start, _DIGITS)
