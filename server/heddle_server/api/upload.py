"""Reads an adapter upload: a multipart body of named parts, the weights streamed to a file.

Nothing the client names becomes a path, and no part is held in memory beyond its small limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser
from starlette.requests import Request

from heddle_adapters.adapter_config import CONFIG_FILE, MAX_CONFIG_BYTES
from heddle_adapters.errors import quoted
from heddle_adapters.store_index import VISIBILITIES, AdapterDetails, Visibility
from heddle_adapters.tensor_file import WEIGHTS_FILE
from heddle_server.api.body_limit import MAX_DISCARDED_BYTES
from heddle_server.api.errors import BodyTooLarge, InvalidRequest, QuotaExceeded, UnknownParameter

NAME_PART = "name"
_DETAIL_PARTS = {
    "alias": 1024,
    "tags": 8192,
    "description": 16 * 1024,
    "pinned": 16,
    "ttl_seconds": 32,
    "visibility": 32,
}
_SMALL_PARTS = {NAME_PART: 1024, CONFIG_FILE: MAX_CONFIG_BYTES, **_DETAIL_PARTS}  # to the bytes they may have
_PARTS = (NAME_PART, CONFIG_FILE, WEIGHTS_FILE, *_DETAIL_PARTS)
_MAX_HEADER_BYTES = 16 * 1024
_REST_BYTES = sum(_SMALL_PARTS.values()) + len(_PARTS) * _MAX_HEADER_BYTES  # of an upload beside its weights, at most
_MAX_CONTENT_TYPE_CHARS = 1024
_WRITE_BYTES = 1 << 20  # one trip to the worker thread per MiB


@dataclass(frozen=True)
class Upload:
    """The parts of one upload."""

    name: str | None  # None: the client gave none
    config: bytes
    weights_path: Path
    details: AdapterDetails


@dataclass(frozen=True)
class UploadBounds:
    """How many bytes an upload may have, counted while it comes."""

    max_bytes: int  # of any upload
    stored_bytes: int | None = None  # of weights, that the owner may have at all; None = any number

    def check(self, num_bytes: int) -> None:
        """Raises `BodyTooLarge` and `QuotaExceeded`."""
        if num_bytes > self.max_bytes:
            raise BodyTooLarge(f"The upload is over this server's limit of {self.max_bytes} bytes.")
        if self.stored_bytes is not None and num_bytes > self.stored_bytes + _REST_BYTES:
            raise QuotaExceeded(
                f"The upload is larger than all your adapters may be together: they may take {self.stored_bytes} bytes "
                "on disk. Ask the server's operator for more."
            )


async def read_upload(request: Request, bounds: UploadBounds, folder: Path) -> Upload:
    """The upload in `request`, its weights in a file in `folder`; raises `InvalidRequest` and `QuotaExceeded`.

    Beside the two files and the name, which only a dry run can do without, it may have the parts alias, tags
    (separated by commas), description, pinned (true or false), ttl_seconds and visibility (private or public); an
    empty one counts as left out.
    """
    chunks = request.stream()
    try:
        return await _read(request, chunks, bounds, folder / WEIGHTS_FILE)
    except (InvalidRequest, QuotaExceeded):
        await discard(chunks)
        raise


async def _read(
    request: Request, chunks: AsyncGenerator[bytes, None], bounds: UploadBounds, weights_path: Path
) -> Upload:
    bounds.check(int(request.headers.get("content-length", "0")))
    parts = _Parts()
    parser = _parser(request, parts)
    num_bytes = 0
    with weights_path.open("xb") as file:
        async for chunk in chunks:
            num_bytes += len(chunk)
            bounds.check(num_bytes)
            _feed(parser, chunk)
            if len(parts.weights) >= _WRITE_BYTES:
                await _write(file, parts)
        await _write(file, parts)
    return parts.finished(weights_path)


async def discard(chunks: AsyncGenerator[bytes, None]) -> None:
    """Reads, and drops, of a refused upload what its client may still be sending."""
    num_bytes = 0
    async for chunk in chunks:
        num_bytes += len(chunk)
        if num_bytes > MAX_DISCARDED_BYTES:
            return


@dataclass
class _Parts:
    """What the parser has seen so far."""

    values: dict[str, bytearray] = field(default_factory=dict)
    weights: bytearray = field(default_factory=bytearray)  # received and not yet written
    current: str | None = None
    header_name: bytearray = field(default_factory=bytearray)
    header_value: bytearray = field(default_factory=bytearray)
    is_complete: bool = False

    def begin(self) -> None:
        self.current = None

    def end_header(self) -> None:
        if bytes(self.header_name).lower() == b"content-disposition":
            self._name_part(bytes(self.header_value).decode("utf-8", "replace"))
        self.header_name.clear()
        self.header_value.clear()

    def end_headers(self) -> None:
        if self.current is None:
            raise InvalidRequest("A part of the upload has no name.")

    def add(self, data: bytes) -> None:
        assert self.current is not None
        if self.current == WEIGHTS_FILE:
            self.weights += data
            return
        value = self.values[self.current]
        value += data
        if len(value) > _SMALL_PARTS[self.current]:
            limit = _SMALL_PARTS[self.current]
            raise BodyTooLarge(f"The part {self.current!r} is over its limit of {limit} bytes.", param=self.current)

    def end(self) -> None:
        self.is_complete = True

    def finished(self, weights_path: Path) -> Upload:
        if not self.is_complete:
            raise InvalidRequest("The upload ends in the middle: its last boundary is missing.")
        missing = next((name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in self.values), None)
        if missing:
            raise InvalidRequest(f"The upload has no part named {missing!r}.", param=missing)
        name = self._text(NAME_PART) if NAME_PART in self.values else None
        return Upload(name, bytes(self.values[CONFIG_FILE]), weights_path, self._details())

    def _details(self) -> AdapterDetails:
        texts = {part: self._text(part) for part in _DETAIL_PARTS if self.values.get(part)}
        return AdapterDetails(
            alias=texts.get("alias"),
            tags=_tags(texts["tags"]) if "tags" in texts else None,
            description=texts.get("description"),
            is_pinned=_flag("pinned", texts["pinned"]) if "pinned" in texts else None,
            ttl_seconds=_whole_number("ttl_seconds", texts["ttl_seconds"]) if "ttl_seconds" in texts else None,
            visibility=_visibility(texts["visibility"]) if "visibility" in texts else None,
        )

    def _text(self, part: str) -> str:
        try:
            return bytes(self.values[part]).decode()
        except UnicodeDecodeError:
            raise InvalidRequest(f"The part {part!r} is not valid UTF-8 text.", param=part) from None

    def _name_part(self, disposition: str) -> None:
        header = Message()
        header["content-disposition"] = disposition
        name = str(header.get_param("name", "", "content-disposition"))
        if name not in _PARTS:
            raise UnknownParameter(
                f"Unknown part {name[:64]!r}. An upload has the parts {NAME_PART!r}, {CONFIG_FILE!r} and "
                f"{WEIGHTS_FILE!r}, and may have {', '.join(_DETAIL_PARTS)}.",
                param=name[:64],
            )
        if name in self.values:
            raise InvalidRequest(f"The part {name!r} is there twice.", param=name)
        self.values[name] = bytearray()
        self.current = name


def _tags(text: str) -> tuple[str, ...]:
    return tuple(tag.strip() for tag in text.split(",") if tag.strip())


def _flag(part: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise InvalidRequest(f"{part!r} is {quoted(text)}; it must be true or false.", param=part)
    return text == "true"


def _visibility(text: str) -> Visibility:
    for visibility in VISIBILITIES:
        if text == visibility:
            return visibility
    raise InvalidRequest(f"'visibility' is {quoted(text)}; it must be private or public.", param="visibility")


def _whole_number(part: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise InvalidRequest(f"{part!r} is {quoted(text)}; it must be a whole number of 0 or more.", param=part)
    return int(text)


def _parser(request: Request, parts: _Parts) -> MultipartParser:
    header = Message()
    # The standard library takes seconds to read 60,000 quoted semicolons; a boundary has 70 characters at most.
    header["content-type"] = request.headers.get("content-type", "")[:_MAX_CONTENT_TYPE_CHARS]
    boundary = header.get_param("boundary")
    if header.get_content_type() != "multipart/form-data" or not isinstance(boundary, str) or not boundary:
        raise InvalidRequest(
            f"An adapter is uploaded as multipart/form-data: curl -F {NAME_PART}=NAME "
            f"-F {CONFIG_FILE}=@{CONFIG_FILE} -F {WEIGHTS_FILE}=@{WEIGHTS_FILE}"
        )
    try:
        return MultipartParser(
            boundary.encode("latin-1", "replace"),
            {
                "on_part_begin": parts.begin,
                "on_header_field": lambda data, start, end: _extend(parts.header_name, data[start:end]),
                "on_header_value": lambda data, start, end: _extend(parts.header_value, data[start:end]),
                "on_header_end": parts.end_header,
                "on_headers_finished": parts.end_headers,
                "on_part_data": lambda data, start, end: parts.add(data[start:end]),
                "on_end": parts.end,
            },
        )
    except FormParserError as error:
        raise _malformed(error) from error


def _extend(header: bytearray, data: bytes) -> None:
    header += data
    if len(header) > _MAX_HEADER_BYTES:
        raise InvalidRequest("A part of the upload has headers that are too long.")


def _feed(parser: MultipartParser, chunk: bytes) -> None:
    try:
        parser.write(chunk)
    except FormParserError as error:
        raise _malformed(error) from error


def _malformed(error: FormParserError) -> InvalidRequest:
    return InvalidRequest(f"The upload is not valid multipart/form-data: {error}.")


async def _write(file: BinaryIO, parts: _Parts) -> None:
    waiting, parts.weights = parts.weights, bytearray()
    await asyncio.to_thread(file.write, waiting)
