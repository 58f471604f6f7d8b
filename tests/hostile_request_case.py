"""What a hostile request is, and how the corpus makes them: the honest upload, sent in a way that must be refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.tensor_file import WEIGHTS_FILE
from hostile_case import Upload, honest

UPLOAD_PATH = "/v1/adapters"
BOUNDARY = "b0undary"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
MAX_UPLOAD_BYTES = 64 * 2**20  # of the server that these are aimed at


class RequestCase(NamedTuple):
    """A request that must be refused."""

    code: str | None  # None: HTTP's own parser refuses it, or the client is gone; any 4xx will do, or no answer
    param: str | None  # the field that the refusal must point to
    make: Callable[[], bytes]  # all that the client sends


RequestCases = dict[str, RequestCase]


class Part(NamedTuple):
    name: str
    content: bytes
    more: str = ""  # after the name, in the Content-Disposition
    headers: tuple[bytes, ...] = ()


def honest_parts(name: str | bytes = "hostile") -> list[Part]:
    text = name.encode() if isinstance(name, str) else name
    return [Part("name", text), Part(CONFIG_FILE, honest().config), Part(WEIGHTS_FILE, honest().weights)]


def parts_of(upload: Upload, name: str) -> list[Part]:
    return [Part("name", name.encode()), Part(CONFIG_FILE, upload.config), Part(WEIGHTS_FILE, upload.weights)]


def form(parts: Sequence[Part], boundary: str = BOUNDARY) -> bytes:
    """A multipart body."""
    edge = f"--{boundary}".encode()
    lines: list[bytes] = []
    for part in parts:
        disposition = f'Content-Disposition: form-data; name="{part.name}"{part.more}'.encode()
        lines += [edge, disposition, *part.headers, b"", part.content]
    return b"\r\n".join([*lines, edge + b"--", b""])


def post(
    body: bytes, *headers: str, content_type: str | None = FORM, path: str = UPLOAD_PATH, length: str = ""
) -> bytes:
    """A whole request; `length` replaces the true Content-Length."""
    head = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    head += [f"Content-Type: {content_type}"] if content_type is not None else []
    head += [f"Content-Length: {length or len(body)}", *headers]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def posts(
    code: str | None,
    param: str | None,
    body: bytes,
    *headers: str,
    content_type: str | None = FORM,
    path: str = UPLOAD_PATH,
) -> RequestCase:
    return RequestCase(code, param, lambda: post(body, *headers, content_type=content_type, path=path))


def sends(code: str, param: str | None, parts: Sequence[Part] | Callable[[], Sequence[Part]]) -> RequestCase:
    return RequestCase(code, param, lambda: post(form(parts() if callable(parts) else parts)))


ANY = "*"  # of the codes or fields
INVALID, UNKNOWN, TOO_LARGE = "invalid_request", "unknown_parameter", "body_too_large"
BAD_NAME, BAD_FILES, BAD_DETAIL = "invalid_adapter_name", "invalid_adapter", "invalid_adapter_request"
