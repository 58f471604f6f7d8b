"""Weights files that are wrong as files, whatever adapter they hold: their prefix, header, layout and names."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from heddle_adapters.canonical import Floats
from heddle_adapters.tensor_file import WEIGHTS_FILE
from hostile_case import (
    FIRST,
    Bytes,
    Case,
    Cases,
    Header,
    bad_entry,
    bad_field,
    bad_header,
    bad_weights,
    honest,
    honest_data,
    honest_header,
    ones,
    shown,
)

MIB = 2**20


def prefixes() -> Cases:
    short = {f"file of {size} bytes": bad_weights(f"only {size} bytes", b"\0" * size) for size in range(9)}
    lengths = [8 * MIB + 1, 2**24, 10**8, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1]
    lengths += [2**63, 2**63 + 64, 2**64 - 8, 2**64 - 1]
    rest = honest().weights[8:]
    announced = {
        f"header of {length}": bad_weights("announces a header", length.to_bytes(8, "little") + rest)
        for length in lengths
    }
    beyond = {
        f"header {more} beyond the file": bad_weights("is truncated", (len(rest) + more).to_bytes(8, "little") + rest)
        for more in (1, 2, 8, 4096, 8 * MIB - len(rest))
    }
    length = int.from_bytes(honest().weights[:8], "little")
    wrong = {
        "header of 0": bad_weights("is not JSON", bytes(8) + rest),
        "header of 1": bad_weights("is not JSON", (1).to_bytes(8, "little") + rest),
        "header some short": bad_weights("is not JSON", (length - 16).to_bytes(8, "little") + rest),
        "header one long": bad_weights(
            "JSON", (length + 1).to_bytes(8, "little") + rest[:length] + b"}" + rest[length:]
        ),
        "header over the data": bad_weights("UTF-8", len(rest).to_bytes(8, "little") + rest),
        "big-endian length": bad_weights("announces a header", length.to_bytes(8, "big") + rest),
        "length of 4 bytes": bad_weights("announces a header", length.to_bytes(4, "little") + rest),
        "no length": bad_weights("announces a header", rest),
        "length twice": bad_weights("no safetensors header", honest().weights[:8] + honest().weights),
    }
    starts = [b" ", b"\n", b"\t", b"\0", b"[", b'"', b"(", b"}", b"<", b"\xef\xbb\xbf", b"\xff", b"0", b"n"]
    begun = {
        f"header begins with {start!r}": bad_header(
            "no safetensors header", start + json.dumps(honest_header()).encode()
        )
        for start in starts
    }
    return short | announced | beyond | wrong | begun


def other_formats() -> Cases:
    weights, padding = honest().weights, b"\0" * 512
    pickles: dict[str, Bytes] = {
        f"pickle of protocol {protocol}": partial(pickle.dumps, {"weight": list(range(99))}, protocol=protocol)
        for protocol in range(6)
    }
    archives: dict[str, Bytes] = {
        "zip of the weights": partial(_zip, {WEIGHTS_FILE: weights}),
        "zip as torch.save writes it": partial(_zip, {"archive/data.pkl": pickle.dumps({}), "archive/version": b"3"}),
        "zip with a path": partial(_zip, {"../../../etc/cron.d/x": b"* * * * * root sh"}),
        "zip bomb": lambda: _zip({"bomb": bytes(32 * MIB)}),
        "empty zip": b"PK\x05\x06" + bytes(18),
        "zip after the weights": lambda: weights + _zip({"x": b"y"}),
        "tar": partial(_tar, WEIGHTS_FILE),
        "tar with a path": partial(_tar, "../../../etc/passwd"),
        "gzip": partial(gzip.compress, weights),
        "gzip bomb": lambda: gzip.compress(bytes(32 * MIB)),
        "zlib": partial(zlib.compress, weights),
        "bzip2": partial(bz2.compress, weights),
        "xz": partial(lzma.compress, weights),
        "zstandard": b"\x28\xb5\x2f\xfd" + weights,
    }
    magics: dict[str, Bytes] = {
        "GGUF": b"GGUF\x03\0\0\0" + padding,
        "GGML": b"lmgg" + padding,
        "HDF5": b"\x89HDF\r\n\x1a\n" + padding,
        "NumPy": lambda: _npy(ones(2, 8)),
        "ONNX": b"\x08\x07\x12\x07pytorch" + padding,
        "TFLite": b"\x1c\0\0\0TFL3" + padding,
        "SQLite": b"SQLite format 3\0" + padding,
        "Arrow": b"ARROW1\0\0" + padding,
        "Parquet": b"PAR1" + padding,
        "ELF": b"\x7fELF\x02\x01\x01" + padding,
        "Windows program": b"MZ\x90\0\x03\0\0\0" + padding,
        "Java class": b"\xca\xfe\xba\xbe" + padding,
        "WebAssembly": b"\0asm\x01\0\0\0" + padding,
        "PNG": b"\x89PNG\r\n\x1a\n" + padding,
        "PDF": b"%PDF-1.7\n" + padding,
        "login page": b"<!DOCTYPE html><html><title>Sign in</title></html>",
        "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n",
        "shell script": b"#!/bin/sh\nrm -rf /\n" + padding,
        "Python source": b"import os; os.system('id')\n",
        "the config": honest().config,
        "zeros": bytes(4096),
        "ones": b"\xff" * 4096,
    }
    says = {"zip": "PyTorch pickle", "pickle": "PyTorch pickle"}
    says |= {"empty zip": "announces", "zip after the weights": "trailing bytes", "zeros": "no safetensors header"}
    says |= {f"pickle of protocol {protocol}": "announces a header" for protocol in (0, 1)}
    says |= {"GGUF": "announces a header", "TFLite": "announces a header"}
    return {
        name: bad_weights(says.get(name, says.get(name.split()[0], "announces a header")), content)
        for name, content in (pickles | archives | magics).items()
    }


def _zip(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def _tar(name: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(honest().weights)
        archive.addfile(member, io.BytesIO(honest().weights))
    return file.getvalue()


def _npy(array: Floats) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


NOT_METADATA: list[Any] = [None, [], "x", 7, True, [["format", "pt"]], {"n": 1}, {"n": None}, {"n": {}}, {"n": ["x"]}]


def header_texts() -> Cases:
    text = json.dumps(honest_header()).encode()
    bare = text[:-1]  # without its last brace
    cut = {
        f"cut at {at}": bad_header("is not JSON", text[:at]) for at in (1, 2, 9, 60, 75, 90, 101, 120, len(text) - 1)
    }
    trailing = {
        f"then {more!r}": bad_header("is not JSON", text + more)
        for more in (b"x", b"{}", b",", b"}", b"]", b"\0", b"//", b"\n{}", b"null", b" \x0b")
    }
    changed = {
        "comment": text.replace(b"{", b"{/* */", 1),
        "single quotes": text.replace(b'"', b"'"),
        "no quotes": text.replace(b'"', b""),
        "trailing comma": bare + b",}",
        "two commas": text.replace(b", ", b",, ", 1),
        "no colon": text.replace(b": ", b" ", 1),
        "leading comma": b"{," + text[1:],
        "leading zero": text.replace(b"[2, 8]", b"[02, 8]", 1),
        "plus sign": text.replace(b"[2, 8]", b"[+2, 8]", 1),
        "hexadecimal": text.replace(b"[2, 8]", b"[0x2, 8]", 1),
        "underscore": text.replace(b"[2, 8]", b"[2, 1_6]", 1),
        "bare point": text.replace(b"[2, 8]", b"[2., 8]", 1),
        "Arabic digits": text.replace(b"[2, 8]", "[٢, 8]".encode(), 1),
        "line break in a name": text.replace(b"base_model", b"base\nmodel", 1),
        "NUL in a name": text.replace(b"base_model", b"base\0model", 1),
        "bad escape": text.replace(b"base_model", b"base\\xmodel", 1),
        "half an escape": text.replace(b"base_model", b"base\\u00", 1),
        "True": bare + b', "x": True}',
        "undefined": bare + b', "x": undefined}',
    }
    syntax = {name: bad_header("is not JSON", content) for name, content in changed.items()}
    encodings = {
        "lone continuation": b"\x80",
        "overlong slash": b"\xc0\xaf",
        "overlong NUL": b"\xc0\x80",
        "encoded surrogate": b"\xed\xa0\x80",
        "beyond Unicode": b"\xf4\x90\x80\x80",
        "five bytes": b"\xf8\x88\x80\x80\x80",
        "truncated character": b"\xe2\x82",
        "Latin-1": "é".encode("latin-1"),
        "byte FF": b"\xff",
    }
    encoded = {name: bad_header("not UTF-8", bare + b', "' + raw + b'": 1}') for name, raw in encodings.items()}
    wide = {
        encoding: bad_header(
            "no safetensors header" if encoding == "utf-16" else "JSON", text.decode().encode(encoding)
        )
        for encoding in ("utf-16", "utf-16-le", "utf-32-le")
    }
    constants = {
        f"{constant} in the {place}": bad_header("not finite", text.replace(b"[2, 8]", template % constant.encode(), 1))
        for constant in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999")
        for place, template in {"shape": b"[2, %s]", "data": b'[2, 8], "x": %s'}.items()
    }
    metadata = {
        f"metadata {shown(value)}": bad_header("__metadata__", {**honest_header(), "__metadata__": value})
        for value in NOT_METADATA
    }
    again = b', "%s": {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}}'
    repeated = {
        "tensor twice": bare + again % FIRST.encode(),
        "tensor twice, once escaped": bare + again % ("\\u0062" + FIRST[1:]).encode(),
        "tensor thrice": bare + (again % FIRST.encode())[:-1] + again % FIRST.encode(),
        "metadata twice": bare + b', "__metadata__": {}, "__metadata__": {}}',
        "key twice in metadata": bare + b', "__metadata__": {"format": "pt", "format": "np"}}',
        "dtype twice": text.replace(b'"dtype"', b'"dtype": "F16", "dtype"', 1),
        "shape twice": text.replace(b'"shape"', b'"shape": [1], "shape"', 1),
        "data_offsets twice": text.replace(b'"data_offsets"', b'"data_offsets": [0, 1], "data_offsets"', 1),
        "empty key twice": bare + b', "": 1, "": 1}',
    }
    twice = {name: bad_header("more than once", content) for name, content in repeated.items()}
    empty = {
        "no tensors": bad_header("holds no tensors", {}, b""),
        "no tensors over data": bad_header("holds no tensors", {}),
        "metadata only": bad_header("holds no tensors", {"__metadata__": {"format": "pt"}}),
    }
    return cut | trailing | syntax | encoded | wide | constants | metadata | twice | empty


TOO_MANY = "more than the 50000 objects and lists or the 200000 values"


def header_bombs() -> Cases:
    nested = {
        f"{count} times {opening.decode()}": bad_header("nested too deeply", partial(_nested, opening, count))
        for opening in (b"[", b'{"a":')
        for count in (1_000, 10_000, 40_000)
    }
    shallow = {
        f"{count} times {opening.decode()}": bad_header(
            "malformed shape", partial(_nested_shape, opening, closing, count)
        )
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"}"))
        for count in (2, 100, 500)
    }
    places = {
        "metadata": b'{"__metadata__": {"a": %s}}',
        "dtype": b'{"t": {"dtype": %s}}',
        "offsets": b'{"t": {"data_offsets": %s}}',
    }
    deep_places = {
        f"deep {place}": bad_header("nested too deeply", template % (b"[" * 5_000 + b"]" * 5_000))
        for place, template in places.items()
    }
    items = ("[]", "{}", "[[]]", "0", "-1", "1e1", "true", "null", '""', '"a"', '{"a":0}', '{"":[{}]}')
    broad = {f"8 MiB of {item}": bad_header(TOO_MANY, partial(_broad, item)) for item in items}
    wide = "is over 2097152 bytes long and not all plain ASCII"
    digits = {
        f"integer of {sign}{count} digits": bad_header("integer of", partial(_digits, sign, count))
        for count in (20, 5_000, 8_000_000)
        for sign in ("", "-")
    }
    text = json.dumps(honest_header()).encode()
    floods: dict[str, Case] = {
        "8 MiB of spaces": bad_header("is not JSON", lambda: b"{" + b" " * (8 * MIB - 1)),
        "8 MiB of line breaks": bad_header("is not JSON", lambda: b"{" + b"\r\n" * (4 * MIB - 1)),
        "8 MiB of spaces and nothing": bad_header("no safetensors header", lambda: b" " * 8 * MIB),
        "8 MiB and a byte of spaces": bad_header("announces", lambda: text + b" " * (8 * MIB + 1 - len(text))),
        "8 MiB in one name": bad_header("1 to 512", lambda: b'{"' + b"n" * (8 * MIB - 7) + b'":0}'),
        "8 MiB in one name and an emoji": bad_header(wide, lambda: '{"😀'.encode() + b"n" * (8 * MIB - 11) + b'":0}'),
        "8 MiB of emoji": bad_header(wide, lambda: b'{"' + "😀".encode() * (2 * MIB - 2) + b'":0}'),
        "8 MiB and an escaped emoji": bad_header(wide, lambda: b'{"\\ud83d\\ude00' + b"n" * 8_000_000 + b'":0}'),
        "8 MiB of escapes": bad_header("1 to 512", lambda: b'{"' + b"\\n" * (4 * MIB - 4) + b'":0}'),
        "8 MiB of surrogates": bad_header(wide, lambda: b'{"' + b"\\ud800" * 1_300_000 + b'":0}'),
        "2 MiB of emoji": bad_header("1 to 512", lambda: b'{"' + "😀".encode() * (MIB // 2 - 2) + b'":0}'),
        "2 MiB and an escaped emoji": bad_header("1 to 512", lambda: b'{"\\ud83d\\ude00' + b"n" * 2_000_000 + b'":0}'),
        "the most of everything": bad_header("must give dtype", _most_of_everything),
        "nothing but objects": bad_header("must give dtype", _nested_objects),
        "8 MiB of quotes": bad_header("is not JSON", lambda: b'{"' + b'"' * (8 * MIB - 2)),
        "8 MiB of backslashes": bad_header("is not JSON", lambda: b'{"' + b"\\" * (8 * MIB - 2)),
        "8 MiB of metadata": bad_header("no tensors", lambda: b'{"__metadata__":{"a":"' + b"x" * 8_000_000 + b'"}}'),
        "8 MiB of fraction": bad_header("must give dtype", lambda: b'{"t":0.' + b"1" * 8_000_000 + b"}"),
        "8 MiB of exponent": bad_header("not finite", lambda: b'{"t":1e' + b"1" * 8_000_000 + b"}"),
        "8 MiB of negative exponent": bad_header("must give dtype", lambda: b'{"t":1e-' + b"1" * 8_000_000 + b"}"),
        "8 MiB of leading zeros": bad_header("is not JSON", lambda: b'{"t":' + b"0" * 8_000_000 + b"}"),
        "a million empty tensors": bad_header("announces a header", partial(_empty_tensors, 1_000_000), b""),
        "a hundred thousand empty tensors": bad_header(TOO_MANY, partial(_empty_tensors, 100_000), b""),
        "16,385 empty tensors": bad_header("1 to 16384", partial(_empty_tensors, 16_385), b""),
        "16,384 empty tensors": bad_header("empty tensor", partial(_empty_tensors, 16_384), b""),
        "16,385 sound tensors": bad_header("1 to 16384", partial(_tiny_tensors, 16_385), bytes(2 * 16_385)),
        "16,386 sound tensors": bad_header("more than the 16385", partial(_tiny_tensors, 16_386), bytes(2 * 16_386)),
        "16,384 sound tensors": bad_header("16384 tensors that", partial(_tiny_tensors, 16_384), bytes(2 * 16_384)),
        "16,384 equal names": bad_header("more than once", lambda: b'{"t":0' + b',"t":0' * 16_383 + b"}"),
        "16,386 metadata entries": bad_header("more than the 16385", _crowded_metadata),
    }  # fmt: skip
    return nested | shallow | deep_places | broad | digits | floods


def _nested(opening: bytes, count: int) -> bytes:
    return b'{"t":' + opening * count


def _nested_shape(opening: bytes, closing: bytes, count: int) -> bytes:
    return b'{"t":{"dtype":"F32","data_offsets":[0,4],"shape":' + opening * count + b"1" + closing * count + b"}}"


def _broad(item: str) -> bytes:
    count = (8 * MIB - 20) // (len(item) + 1)
    return b'{"t":[' + b",".join([item.encode()] * count) + b"]}"


def _digits(sign: str, count: int) -> bytes:
    return b'{"t":{"dtype":"F32","data_offsets":[0,4],"shape":[' + sign.encode() + b"9" * count + b"]}}"


def _empty_tensors(count: int) -> bytes:
    entry = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(entry % number for number in range(count)) + b"}"


def _nested_objects() -> bytes:
    return b'{"t":[%s]}' % b",".join([b'{"":' * 490 + b"0" + b"}" * 490] * 101)


def _most_of_everything() -> bytes:
    """As many objects as are allowed, one in another, as many numbers and strings, and one long string beside them."""
    objects = b",".join([b'{"":' * 490 + b"0" + b"}" * 490] * 101)
    numbers = b",".join(b'1e%d,"%d"' % (number % 300, number) for number in range(74_000))
    return b'{"t":[%s],"u":[%s],"__metadata__":{"a":"%s"}}' % (objects, numbers, b"x" * 7_000_000)


def _crowded_metadata() -> bytes:
    return json.dumps({"__metadata__": {str(number): "" for number in range(16_386)}}).encode()


def _tiny_tensors(count: int) -> bytes:
    entry = b'"%d":{"dtype":"F16","shape":[1],"data_offsets":[%d,%d]}'
    return b"{" + b",".join(entry % (number, 2 * number, 2 * number + 2) for number in range(count)) + b"}"


WRONG_TYPES: tuple[Any, ...] = (None, True, 7, -7, 1.5, "x", "[2, 8]", {}, {"0": 2})
WRONG_TYPES += ([None], [True, 8], ["2", "8"], [[2, 8]], [2.0, 8])


def entries() -> Cases:
    whole = honest_header()[FIRST]
    missing = {
        f"without {field}": bad_entry("must give dtype", {key: whole[key] for key in whole if key != field})
        for field in whole
    }
    more = {
        f"with {field}": bad_field("and nothing else", **{field: value})
        for field, value in {
            "strides": [1, 0],
            "offset": 0,
            "file": "/etc/passwd",
            "url": "http://169.254.169.254/",
            "": 0,
            "__reduce__": "os.system",
            "Shape": [2, 8],
        }.items()
    }
    not_an_entry: list[Any] = [None, True, 7, 1.5, "F32", [], {}, ["F32", [2, 8], [0, 64]], [whole]]
    instead = {f"{shown(value)}": bad_entry("must give dtype", value) for value in not_an_entry}
    fields = {
        f"{field} {shown(value)}": bad_field(reason, **{field: value})
        for field, reason in {"dtype": "served are", "shape": "malformed", "data_offsets": "malformed"}.items()
        for value in WRONG_TYPES
    }
    return missing | more | instead | fields


def dtypes() -> Cases:
    sizes = {
        "F64": 8,
        "U64": 8,
        "C64": 8,
        "U32": 4,
        "U16": 2,
        "I8": 1,
        "BOOL": 1,
    }
    sizes |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1}
    right_size = {
        f"{dtype} of the right size": bad_header(
            f"as '{dtype}'; served are",
            {"t": {"dtype": dtype, "shape": [64 // size], "data_offsets": [0, 64]}},
            bytes(64),
        )
        for dtype, size in sizes.items()
    }
    whole = {"I64": 8, "I32": 4, "I16": 2, "U8": 1}  # which some methods' tensors are, and a LoRA's are not
    whole_numbers = {
        f"{dtype} of the right size": bad_header(
            "of the wrong type",
            {"t": {"dtype": dtype, "shape": [64 // size], "data_offsets": [0, 64]}},
            bytes(64),
        )
        for dtype, size in whole.items()
    }
    whole_numbers |= {
        "I32 over F32 data": bad_field("of the wrong type", dtype="I32"),
        "I64 over F32 data": bad_field("in I64 takes 128", dtype="I64"),
        "I16 over F32 data": bad_field("in I16 takes 32", dtype="I16"),
        "U8 over F32 data": bad_field("in U8 takes 16", dtype="U8"),
    }
    names = ["f32", "F32 ", " F32", "F32\0", "Ｆ32", "float32", "torch.float32", "FP32", "F", "", "F4", "F6_E2M3"]
    names += ["F128"]
    names += ["BF16\n", "__class__", "F32" * 1000, "F32,F16", "object", "O", "<f4", "|S8"]
    wrong = {f"named {shown(name)}": bad_field("served are", dtype=name) for name in names}
    half = {f"{dtype} over F32 data": bad_field(f"in {dtype} takes 32", dtype=dtype) for dtype in ("F16", "BF16")}
    return right_size | whole_numbers | wrong | half


def shapes_in_the_header() -> Cases:
    wrapping = [[2**62 + 16], [2**32, 2**32], [2**31, 2**31, 4], [2**61, 8, 4], [2**63], [2**62, 4], [10**19 - 1] * 8]
    wrapping += [[1, 2**60, 16], [2**33, 2**33], [65536] * 4]
    overflowing = {f"product of {shape}": bad_field("its shape", shape=shape) for shape in wrapping}
    mismatching: list[list[int]] = [[], [1], [8], [2, 9], [3, 8], [2, 8, 2], [16, 16], [10**6, 10**6], [2**31]]
    other = {f"{shape} over 64 bytes": bad_field("its shape", shape=shape) for shape in mismatching}
    empty: list[list[int]] = [[0], [0, 8], [2, 0], [0] * 8, [2**63, 0], [0, 2**63]]
    zero = {
        f"{shape} is empty": bad_field("empty tensor", shape=shape, data_offsets=[at, at])
        for shape in empty
        for at in (0, 64)
    }
    negative: list[list[int]] = [[-2, -8], [-16], [2, -8], [-1, 16], [-(2**63)], [-(10**18), 1]]
    below = {f"{shape} is negative": bad_field("malformed shape", shape=shape) for shape in negative}
    long = {
        f"{count} dimensions": bad_field("malformed shape", shape=[2, 8] + [1] * (count - 2))
        for count in (9, 64, 10_000)
    }
    return overflowing | other | zero | below | long


def offsets() -> Cases:
    header = honest_header()
    second = next(name for name in header if header[name]["data_offsets"][0] == 64)

    def both(first: list[int], then: list[int]) -> Header:
        return {
            **header,
            FIRST: {**header[FIRST], "data_offsets": first},
            second: {**header[second], "data_offsets": then},
        }

    moved = {
        f"{begin} to {begin + 64}": bad_field(reason, data_offsets=[begin, begin + 64])
        for begin, reason in {
            1: "hole", 32: "hole", 63: "hole", 64: "hole", 10**6: "hole", 2**40: "hole",
            2**53: "hole", 2**62: "hole", 2**63 - 64: "hole",
        }.items()
    }  # fmt: skip
    sized = {
        f"{begin} to {end}": bad_field("takes 64", data_offsets=[begin, end])
        for begin, end in ((0, 0), (0, 1), (0, 63), (0, 65), (0, 2**63), (64, 0), (2**63, 0), (2**63, 2**63), (128, 64))
    }
    not_a_pair: list[Any] = [[], [0], [64], [0, 64, 64], [0, 32, 64], [[0], [64]], list(range(1000)), {"begin": 0}]
    not_a_pair += [[-64, 0], [-1, 63], [-(2**63), 0], [0.0, 64.0], ["0", "64"], [False, 64], [None, 64]]
    malformed = {f"{shown(value)}": bad_field("malformed data_offsets", data_offsets=value) for value in not_a_pair}
    pairs = {
        "both in one place": bad_header("overlapping", both([0, 64], [0, 64])),
        "second in the first": bad_header("overlapping", both([0, 64], [32, 96])),
        "exchanged": bad_header("trailing", {FIRST: header[FIRST]}),
        "hole of a byte": bad_header("hole of 1 bytes", both([0, 64], [65, 129])),
        "hole at the start": bad_header("hole", {second: header[second]}, honest_data()),
        "all at zero": bad_header(
            "overlapping",
            {f"t{n}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in range(1000)},
            bytes(4),
        ),
    }
    return moved | sized | malformed | pairs


def cut_files() -> Cases:
    weights = honest().weights
    length = int.from_bytes(weights[:8], "little") + 8
    cut = {
        f"to {size} of {len(weights)} bytes": bad_weights("truncated", weights[:size])
        for size in (
            9,
            16,
            64,
            length // 2,
            length - 1,
            length,
            length + 1,
            length + 63,
            length + 100,
            len(weights) - 1,
        )
    }
    tails = {"a NUL": b"\0", "a line break": b"\n", "four bytes": b"\0" * 4, "a page": bytes(4096), "a MiB": bytes(MIB)}
    tails |= {"itself": weights, "a pickle": pickle.dumps({}), "a zip's end": b"PK\x05\x06" + bytes(18)}
    grown = {f"grown by {name}": bad_weights("trailing bytes", weights + tail) for name, tail in tails.items()}
    inner = {
        "a byte missing inside": bad_weights("truncated", weights[:length] + weights[length + 1 :]),
        "a byte more inside": bad_weights("trailing", weights[:length] + b"\0" + weights[length:]),
        "CRLF translation": bad_weights("trailing", weights[:length] + weights[length:] + b"\r\n"),
    }
    return cut | grown | inner
