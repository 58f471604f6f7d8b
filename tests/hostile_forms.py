"""Upload requests that are wrong as forms: their list of parts, a part's headers, the frame, the name, the details."""

from __future__ import annotations

from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.tensor_file import WEIGHTS_FILE
from hostile_case import honest
from hostile_request_case import (
    ANY,
    BAD_DETAIL,
    BAD_FILES,
    BAD_NAME,
    BOUNDARY,
    INVALID,
    MAX_UPLOAD_BYTES,
    TOO_LARGE,
    UNKNOWN,
    Part,
    RequestCase,
    RequestCases,
    form,
    honest_parts,
    post,
    posts,
    sends,
)


def part_lists() -> RequestCases:
    name, config, weights = honest_parts()
    missing = {
        "no name": sends(INVALID, "name", [config, weights]),
        "no config": sends(INVALID, CONFIG_FILE, [name, weights]),
        "no weights": sends(INVALID, WEIGHTS_FILE, [name, config]),
        "name alone": sends(INVALID, CONFIG_FILE, [name]),
        "weights alone": sends(INVALID, CONFIG_FILE, [weights]),
        "empty config": sends(BAD_FILES, CONFIG_FILE, [name, Part(CONFIG_FILE, b""), weights]),
        "empty weights": sends(BAD_FILES, WEIGHTS_FILE, [name, config, Part(WEIGHTS_FILE, b"")]),
        "config and weights exchanged": sends(
            BAD_FILES,
            CONFIG_FILE,
            lambda: [name, Part(CONFIG_FILE, weights.content), Part(WEIGHTS_FILE, config.content)],
        ),
    }
    twice = {
        f"{part.name} twice": sends(INVALID, part.name, [name, config, weights, part])
        for part in (name, config, weights, )
    } | {
        "two different names": sends(INVALID, "name", [Part("name", b"a"), *honest_parts("b")]),
        "two different weights": sends(INVALID, WEIGHTS_FILE, [Part(WEIGHTS_FILE, b"x"), *honest_parts()]),
        "two aliases": sends(INVALID, "alias", [Part("alias", b"a"), Part("alias", b"b"), *honest_parts()]),
        "100,000 names": RequestCase(INVALID, "name", lambda: post(form([name] * 100_000))),
    }  # fmt: skip
    unknown_names = ["file", "files[]", "model", "adapter", "Name", "NAME", "name ", " name", "name\\", "_charset_"]
    unknown_names += ["config"]
    unknown_names += ["adapter_config.JSON", "adapter_model.bin", "adapter_model.safetensors.index.json"]
    unknown_names += ["tokenizer.json"]
    unknown_names += ["../adapter_model.safetensors", "./name", "/etc/passwd", "C:\\x", "chat_template.jinja", "path"]
    unknown_names += ["url"]
    unknown_names += ["owner", "digest", "version", "trust_remote_code", "nam\u0435", "\u202ename", "name\0"]
    unknown_names += ["x" * 3_000, "__proto__"]
    unknown = {
        f"unknown {ascii(each)[:40]}": sends(UNKNOWN, ANY, [*honest_parts(), Part(each, b"x")])
        for each in unknown_names
    } | {
        "100,000 unknown parts": RequestCase(
            UNKNOWN, "part0", lambda: post(form([Part(f"part{number}", b"") for number in range(100_000)]))
        ),
        "an unknown part of 33 MiB": sends(UNKNOWN, "bomb", lambda: [Part("bomb", bytes(33 * 2**20)), *honest_parts()]),
    }  # fmt: skip
    sizes = {
        "name of 2 KiB": sends(TOO_LARGE, "name", lambda: honest_parts("n" * 2048)),
        "name of 10 MiB": sends(TOO_LARGE, "name", lambda: honest_parts("n" * 10 * 2**20)),
        "config of a MiB and a byte": sends(
            TOO_LARGE, CONFIG_FILE, lambda: [name, Part(CONFIG_FILE, bytes(2**20 + 1)), weights]
        ),
        "config of 20 MiB": sends(TOO_LARGE, CONFIG_FILE, lambda: [Part(CONFIG_FILE, bytes(20 * 2**20)), weights]),
        "weights over the limit": sends(
            TOO_LARGE, None, lambda: [name, config, Part(WEIGHTS_FILE, bytes(MAX_UPLOAD_BYTES))]
        ),
    }  # fmt: skip
    return missing | twice | unknown | sizes


def part_headers() -> RequestCases:
    def headed(code: str, param: str | None, *lines: bytes) -> RequestCase:
        """A first part with these header lines, before the honest ones."""
        body = b"\r\n".join([b"--" + BOUNDARY.encode(), *lines, b"", b"x", form(honest_parts())])
        return posts(code, param, body)

    disposition = b"Content-Disposition: form-data"
    return {
        "no headers": headed(INVALID, None),
        "no disposition": headed(INVALID, None, b"Content-Type: text/plain"),
        "disposition without a name": headed(UNKNOWN, "", disposition),
        "empty name": headed(UNKNOWN, "", disposition + b'; name=""'),
        "file name alone": headed(UNKNOWN, "", disposition + b'; filename="adapter_model.safetensors"'),
        "attachment": headed(UNKNOWN, "", b"Content-Disposition: attachment"),
        "two names": headed(
            INVALID, "name", disposition + b'; name="name"; name="alias"', disposition + b"; name=name"
        ),
        "two dispositions": headed(INVALID, "name", disposition + b"; name=name", disposition + b"; name=name"),
        "name in another charset": headed(UNKNOWN, ANY, disposition + b"; name*=utf-16''name"),
        "name in bad UTF-8": headed(UNKNOWN, ANY, disposition + b'; name="\xff\xfe"'),
        "header without a colon": headed(INVALID, None, b"nonsense"),
        "header of NUL": headed(INVALID, None, b"\0\0\0: x"),
        "header with a space": headed(INVALID, None, b"Content Disposition: form-data"),
        "header name of 20 KiB": headed(INVALID, None, b"x" * 20_000 + b": y"),
        "header value of 20 KiB": headed(INVALID, None, b"X: " + b"y" * 20_000),
        "disposition of 20 KiB": headed(INVALID, None, disposition + b'; name="' + b"n" * 20_000 + b'"'),
        "name of 10,000": headed(INVALID, None, disposition + b'; name="' + b"n" * 10_000 + b'"'),
        "semicolons": headed(INVALID, None, disposition + b'; name="' + b";" * 16_000 + b'"'),
        "quotes": headed(INVALID, None, disposition + b'; name="' + b';"' * 8_000),
        "10,000 headers": headed(INVALID, None, *(b"X-%d: y" % number for number in range(10_000))),
        "a million headers": headed(INVALID, None, *[b"X: y"] * 1_000_000),
        "folded header": headed(UNKNOWN, "", disposition + b";", b' name="name"'),
        "headers without an end": posts(INVALID, None, b"--" + BOUNDARY.encode() + b"\r\nX: " + b"y" * 10_000),
    }


def frames() -> RequestCases:
    body = form(honest_parts())
    edge = f"--{BOUNDARY}".encode()
    start = edge + b'\r\nContent-Disposition: form-data; name="name"\r\n\r\n'
    return {
        "empty": posts(INVALID, None, b""),
        "nonsense": posts(INVALID, None, b"nonsense"),
        "zeros": posts(INVALID, None, bytes(100_000)),
        "line breaks": posts(INVALID, None, b"\r\n" * 50_000),
        "hyphens": posts(INVALID, None, b"-" * 100_000),
        "boundary alone": posts(INVALID, None, edge),
        "last boundary alone": posts(INVALID, ANY, edge + b"--\r\n"),
        "100,000 boundaries": posts(INVALID, None, (edge + b"\r\n") * 100_000),
        "no last boundary": posts(INVALID, None, body[: -len(edge) - 6]),
        "last boundary of other hyphens": posts(INVALID, None, body.removesuffix(b"--\r\n") + b"-+\r\n"),
        "bare line feeds": posts(INVALID, None, body.replace(b"\r\n", b"\n")),
        "bare carriage returns": posts(INVALID, None, body.replace(b"\r\n", b"\r")),
        "raw weights": posts(INVALID, None, honest().weights),
        "almost boundaries": posts(TOO_LARGE, "name", start + b"\r\n--b0undar" * 100_000),
        "name without an end": posts(INVALID, None, start + b"a"),
        "one form in another": posts(INVALID, None, form([Part("name", form(honest_parts())[:-4])])),
    }


def names() -> RequestCases:
    bad = ["", " ", ".", "..", "../a", "../../etc/passwd", "/etc/passwd", "a/../b", "a/b/c", "a//b", "/a", "a/"]
    bad += ["./a", "~", "~root"]
    bad += ["a\\b", "..\\..\\a", "C:\\a", "\\\\host\\a", "a\0", "\0", "a\0.safetensors", "a\n", "\na"]
    bad += ["a\r\nX-Evil: 1", "a\tb", "a\x7f"]
    bad += ["\x1b[2J", "a b", " a", "a ", ".hidden", "-rf", "--help", "_a", "a,b", "a;b", "a:b", "a@1", "a@latest"]
    bad += ["@", "a@", "a#b"]
    bad += ["a?b", "a&b", "a=b", "a%2fb", "%2e%2e", "%00", "a*", "*", "?", "[a]", "{a}", "a|b", "<a>", "$(id)"]
    bad += ["`id`", "${jndi:x}"]
    bad += ["'; DROP TABLE names; --", '"a"', "a'b", "sha256:" + "0" * 64, "a@sha256:" + "0" * 64, "file://host/a"]
    bad += ["http://a/b"]
    bad += ["n" * 97, "n" * 1000, f"{'n' * 97}/a", f"a/{'n' * 97}", "base", "BASE", "Base", "scripted-model"]
    bad += ["a/versions", "aliases"]
    bad += ["\u0430dapter", "a\u200bb", "\u202ea", "ａ", "é", "e\u0301", "a\u2215b", "a\uff0fb", "\u2024\u2024/a"]
    bad += ["😀", "\ufeffa", "a\u00a0b", "ﬁ", "①"]
    raw = {
        "bytes that are not UTF-8": b"\xff\xfe",
        "an overlong slash": b"a\xc0\xafb",
        "an encoded surrogate": b"\xed\xa0\x80",
        "half a character": b"a\xe2\x82",
        "Latin-1": "é".encode("latin-1"),
    }
    utf16 = {encoding: "hostile".encode(encoding) for encoding in ("utf-16-le", "utf-16-be", "utf-32-le")}
    named = {f"{ascii(name)[:60]} of {len(name)}": sends(BAD_NAME, "name", honest_parts(name)) for name in bad}
    coded = {f"in {encoding}": sends(BAD_NAME, "name", honest_parts(content)) for encoding, content in utf16.items()}
    undecodable = {name: sends(INVALID, "name", honest_parts(content)) for name, content in raw.items()}
    return named | coded | undecodable


def details() -> RequestCases:
    texts: dict[str, tuple[str, list[str]]] = {
        "alias": (
            BAD_NAME,
            ["1", "latest", "LATEST", "../x", "a b", "a@b", "a/b", "sha256", "é", "a\0", "n" * 97, "-x"],
        ),
        "tags": (BAD_DETAIL, ["a\0", "a\nb", "t" * 500, "\u202ex", ",".join(str(number) for number in range(1000))]),
        "description": (BAD_DETAIL, ["d" * 10_000]),
        "pinned": (INVALID, ["yes", "1", "True", " true", "null", "\0", "truetrue"]),
        "ttl_seconds": (
            INVALID,
            ["-1", "+1", "1.5", "1e9", "NaN", "Infinity", " 5", "0x10", "1_000", "٣", "²", "soon"],
        ),
    }
    cases = {
        f"{part} {ascii(text)[:40]}": sends(code, part, [Part(part, text.encode()), *honest_parts()])
        for part, (code, values) in texts.items()
        for text in values
    }
    undecodable = {
        f"{part} not in UTF-8": sends(INVALID, part, [Part(part, b"\xff"), *honest_parts()]) for part in texts
    }
    sizes = {"alias": 2000, "tags": 10_000, "description": 20_000, "pinned": 20, "ttl_seconds": 40}
    large = {
        f"{part} of {size} bytes": sends(TOO_LARGE, part, [Part(part, b"1" * size), *honest_parts()])
        for part, size in sizes.items()
    }
    endless = {
        f"ttl_seconds of {digits} nines": sends(
            BAD_DETAIL, "ttl_seconds", [Part("ttl_seconds", b"9" * digits), *honest_parts()]
        )
        for digits in (18, 19, 32)
    }
    return cases | undecodable | large | endless
