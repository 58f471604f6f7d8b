"""The identity of an adapter version: a sha256 of what it computes, not of how it was packed.

Two uploads with equal tensors and equal meaningful scalars are one version, whatever their paths, dropout or library
versions say; any change of a tensor's bytes, type, shape or name, or of a scalar such as alpha, is another.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

from heddle_adapters.bounded_json import Json
from heddle_adapters.tensor_file import TensorFile

FORMAT_TAG = b"heddle adapter 1"
DIGEST = re.compile(r"sha256:(?P<hex>[0-9a-f]{64})")


def version_digest(method: str, scalars: Mapping[str, Json], file: TensorFile) -> str:
    """The digest, "sha256:<hex>", over fields that each begin with a type letter and their length.

    So no field can pass for another. They are the format tag, the method, the scalars as canonical JSON, and for each
    tensor by name its name, dtype, shape and stored bytes.
    """
    hasher = hashlib.sha256()

    def add(kind: bytes, payload: bytes | memoryview) -> None:
        hasher.update(kind + len(payload).to_bytes(8, "little"))
        hasher.update(payload)

    add(b"F", FORMAT_TAG)
    add(b"M", method.encode())
    add(b"J", json.dumps(scalars, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())
    for name, tensor in sorted(file.tensors.items()):
        add(b"N", name.encode())
        add(b"T", tensor.dtype.encode())
        add(b"S", b"".join(size.to_bytes(8, "little") for size in tensor.shape))
        add(b"B", file.bytes_of(name))
    return f"sha256:{hasher.hexdigest()}"


def digest_hex(digest: str) -> str:
    """The 64 hex digits of a digest: the only text that content paths are made of."""
    match = DIGEST.fullmatch(digest)
    if match is None:
        raise ValueError(f"not a digest: {digest!r}")
    return match["hex"]
