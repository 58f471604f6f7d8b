"""Upload requests that must be refused before anything looks into the files, as HTTP or as forms.

The two files in them are honest, and aimed at a server with the base of `adapter_samples`.
"""

from __future__ import annotations

import base64
import gzip
import zlib
from collections.abc import Callable
from functools import partial

import hostile_forms as forms
from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.tensor_file import WEIGHTS_FILE
from hostile_case import honest
from hostile_request_case import (
    ANY,
    BAD_FILES,
    BOUNDARY,
    FORM,
    INVALID,
    MAX_UPLOAD_BYTES,
    TOO_LARGE,
    Part,
    RequestCase,
    RequestCases,
    form,
    honest_parts,
    post,
    posts,
    sends,
)


def hostile_requests() -> RequestCases:
    """Every case by its name."""
    families: dict[str, Callable[[], RequestCases]] = {
        "encoding": encodings,
        "type": content_types,
        "length": lengths,
        "chunks": chunks,
        "cut": cut_bodies,
        "parts": forms.part_lists,
        "part": forms.part_headers,
        "frame": forms.frames,
        "name": forms.names,
        "detail": forms.details,
        "route": routes,
    }
    return {f"{family}: {name}": case for family, cases in families.items() for name, case in cases().items()}


def encodings() -> RequestCases:
    body = form(honest_parts())
    packed = {
        "gzip": gzip.compress(body),
        "x-gzip": gzip.compress(body),
        "GZIP": gzip.compress(body),
        "deflate": zlib.compress(body),
        "br": b"\x0b\x02\x80" + body,
        "zstd": b"\x28\xb5\x2f\xfd" + body,
        "compress": body,
        "gzip, gzip": gzip.compress(gzip.compress(body)),
        "identity, gzip": gzip.compress(body),
        "gzip, identity": gzip.compress(body),
        "aes128gcm": body,
        "*": body,
        "none": body,
    }
    refused = {
        name: posts("unsupported_encoding", None, content, f"Content-Encoding: {name}")
        for name, content in packed.items()
    }  # fmt: skip
    bomb = gzip.compress(bytes(32 * 2**20))
    return refused | {
        "gzip bomb": RequestCase("unsupported_encoding", None, lambda: post(bomb, "Content-Encoding: gzip")),
        "gzip and nothing said": posts(INVALID, None, gzip.compress(body)),
        "two headers": RequestCase(
            INVALID, None, lambda: post(gzip.compress(body), "Content-Encoding: identity", "Content-Encoding: gzip")
        ),
        "config in gzip": sends(
            BAD_FILES,
            CONFIG_FILE,
            lambda: [
                *honest_parts()[::2],
                Part(CONFIG_FILE, gzip.compress(honest().config), headers=(b"Content-Encoding: gzip",)),
            ],
        ),
        "weights in gzip": sends(
            BAD_FILES,
            WEIGHTS_FILE,
            lambda: [
                *honest_parts()[:2],
                Part(WEIGHTS_FILE, gzip.compress(honest().weights), headers=(b"Content-Encoding: gzip",)),
            ],
        ),
        "config in base64": sends(
            BAD_FILES,
            CONFIG_FILE,
            lambda: [
                *honest_parts()[::2],
                Part(
                    CONFIG_FILE,
                    base64.b64encode(honest().config),
                    headers=(b"Content-Transfer-Encoding: base64",),
                ),
            ],
        ),
    }


def content_types() -> RequestCases:
    body = form(honest_parts())
    types: dict[str, str | None] = {
        "none": None,
        "empty": "",
        "text": "text/plain",
        "JSON": "application/json",
        "URL-encoded": "application/x-www-form-urlencoded",
        "octets": "application/octet-stream",
        "zip": "application/zip",
        "tar": "application/x-tar",
        "pickle": "application/x-pickle",
        "mixed": f"multipart/mixed; boundary={BOUNDARY}",
        "related": f"multipart/related; boundary={BOUNDARY}",
        "byteranges": f"multipart/byteranges; boundary={BOUNDARY}",
        "form-data alone": f"form-data; boundary={BOUNDARY}",
        "no boundary": "multipart/form-data",
        "boundary without a value": "multipart/form-data; boundary",
        "empty boundary": "multipart/form-data; boundary=",
        "empty quoted boundary": 'multipart/form-data; boundary=""',
        "another boundary": "multipart/form-data; boundary=other",
        "longer boundary": f"{FORM}y",
        "shorter boundary": FORM[:-1],
        "boundary of other case": FORM.upper(),
        "boundary of 300": f"multipart/form-data; boundary={'x' * 300}",
        "boundary of 40,000": f"multipart/form-data; boundary={'x' * 40_000}",
        "boundary in another charset": f"multipart/form-data; boundary*=utf-16''{BOUNDARY}",
        "boundary in UTF-8": "multipart/form-data; boundary=\u00e9\u00ff",
        "boundary of spaces": 'multipart/form-data; boundary="   "',
        "semicolons": f'multipart/form-data; boundary="{";" * 60_000}"',
        "open quotes": 'multipart/form-data; boundary="' + ';"' * 20_000,
        "many parameters": "multipart/form-data" + "; a=b" * 8_000,
        "two types": f"application/json, {FORM}",
    }
    return {name: posts(INVALID, None, body, content_type=content_type) for name, content_type in types.items()} | {
        "JSON of an upload": posts(
            INVALID, None, b'{"name": "a", "path": "/etc/passwd"}', content_type="application/json"
        ),
        "JSON of a link": posts(
            INVALID, None, b'{"name": "a", "url": "file://host/etc/passwd"}', content_type="application/json"
        ),
    }


def lengths() -> RequestCases:
    body = form(honest_parts())

    def said(length: str, *headers: str, code: str | None = None) -> RequestCase:
        return RequestCase(code, None, lambda: post(body, *headers, length=length))

    return {
        "over the limit": said(str(MAX_UPLOAD_BYTES + 1)),
        "of a terabyte": said(str(2**40)),
        "of 2^63": said(str(2**63)),
        "of 30 digits": said("9" * 30),
        "of 5,000 digits": said("9" * 5_000),
        "negative": said("-1"),
        "with a plus sign": said(f"+{len(body)}"),
        "a fraction": said(f"{len(body)}.0"),
        "hexadecimal": said(hex(len(body))),
        "with a unit": said(f"{len(body)} bytes"),
        "a word": said("large"),
        "Arabic digits": RequestCase(None, None, lambda: post(body, length="1").replace(b"h: 1", "h: ١".encode(), 1)),
        "twice and different": said(str(len(body)), f"Content-Length: {len(body) + 5}"),
        "a list of two": said(f"{len(body)}, {len(body) + 5}"),
        "too small": said(str(len(body) - 20), code=INVALID),
        "zero": RequestCase(INVALID, None, lambda: post(body, length="0")),
        "one": said("1", code=INVALID),
        "too large": said(str(len(body) + 100)),
    }


def chunks() -> RequestCases:
    body = form(honest_parts())

    def chunked(*pieces: bytes, length: str | None = None) -> bytes:
        head = post(b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
        if length is not None:
            head = head.replace(b"\r\n\r\n", f"\r\nContent-Length: {length}\r\n\r\n".encode())
        return head + b"".join(pieces)

    def sized(piece: bytes) -> bytes:
        return b"%x\r\n%s\r\n" % (len(piece), piece)

    weights = Part(WEIGHTS_FILE, bytes(2**20))
    mebibyte = sized(bytes(2**20))
    return {
        "over the limit": RequestCase(
            TOO_LARGE,
            None,
            lambda: chunked(sized(form([weights])[:-50]), mebibyte * (MAX_UPLOAD_BYTES // 2**20 + 1), b"0\r\n\r\n"),
        ),
        "no size": RequestCase(None, None, lambda: chunked(b"\r\n" + body)),
        "a negative size": RequestCase(None, None, lambda: chunked(b"-5\r\n" + body)),
        "a size of words": RequestCase(None, None, lambda: chunked(b"large\r\n" + body)),
        "a size of 2^64": RequestCase(None, None, lambda: chunked(b"10000000000000000\r\n" + body)),
        "a size of 1,000 digits": RequestCase(None, None, lambda: chunked(b"f" * 1000 + b"\r\n" + body)),
        "a size too small": RequestCase(None, None, lambda: chunked(b"5\r\n" + body + b"\r\n0\r\n\r\n")),
        "an extension of 100,000": RequestCase(None, None, lambda: chunked(b"5;" + b"x" * 100_000 + b"\r\n" + body)),
        "no end": RequestCase(None, None, lambda: chunked(sized(body))),
        "half": RequestCase(INVALID, None, lambda: chunked(sized(body[: len(body) // 2]), b"0\r\n\r\n")),
        "nothing": RequestCase(INVALID, None, lambda: chunked(b"0\r\n\r\n")),
        "a length beside it": RequestCase(INVALID, None, lambda: chunked(b"0\r\n\r\n", sized(body), length="0")),
        "another coding": RequestCase(
            None, None, lambda: post(body, "Transfer-Encoding: gzip, chunked").replace(b"Content-Length", b"X", 1)
        ),
    }  # fmt: skip


def cut_bodies() -> RequestCases:
    """The client is gone in the middle of its body."""
    whole = post(form(honest_parts()))
    head = whole.index(b"\r\n\r\n") + 4
    places = {
        "in the request line": 9,
        "in the headers": head - 20,
        "after the headers": head,
        "after a byte": head + 1,
        "in the first boundary": head + 5,
        "in a part's header": head + 40,
        "in the config": whole.index(b"lora_alpha"),
        "before the weights": whole.index(WEIGHTS_FILE.encode()),
        "in the weights' header": whole.index(b"data_offsets"),
        "in the weights": len(whole) - 100,
        "in the last boundary": len(whole) - 5,
        "before the last byte": len(whole) - 1,
    }
    return {name: RequestCase(None, None, partial(bytes, whole[:place])) for name, place in places.items()}


def routes() -> RequestCases:
    body = form(honest_parts())
    paths = {
        "up": "/v1/adapters/../adapters/x",
        "double slash": "/v1//adapters",
        "another": "/v1/adapters/hostile",
        "upper case": "/V1/Adapters",
        "encoded slash": "/v1%2fadapters/x",
        "NUL": "/v1/adapters/%00",
        "local": "/v1/load_lora_adapter",
    }
    return {
        name: posts(ANY, None, body, path=path)
        for name, path in paths.items()
    } | {
        f"method {method}": RequestCase(ANY, None, partial(bytes, post(body).replace(b"POST", method.encode(), 1)))
        for method in ("PUT", "PATCH", "DELETE", "PROPFIND")
    }  # fmt: skip
