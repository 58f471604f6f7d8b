"""One packed adapter as one file: a cache of what compiling its content gave, for the machine that made it.

    8 bytes   MAGIC, which ends in the version of this format
    4 bytes   length of the header, little-endian
    32 bytes  sha256 of the header
    header    msgpack: RowsHeader, with the sha256 of the pages
    pages     num_pages * page_bytes, to the end of the file

Nothing is made of a byte before its checksum has been proven, and no length is believed beyond the file's own size.
Numbers lie as they do in memory, little-endian on every machine that is served.
"""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from heddle_adapters.packed_adapter import PackedAdapter
from heddle_adapters.positions import Positions

MAGIC = b"hdlrows\x02"
LENGTH_BYTES, CHECKSUM_BYTES = 4, 32
PREFIX_BYTES = len(MAGIC) + LENGTH_BYTES + CHECKSUM_BYTES
CHUNK_BYTES = 1 << 20  # read and hashed in turns, while they are still in the processor's cache
UNFINISHED_SUFFIX = ".tmp"

ARRAYS: dict[str, type[np.generic]] = {  # the fields of PackedAdapter that are kept in the header, in this order
    "run_lengths": np.int32,
    "site": np.int32,
    "count": np.int32,
    "in_scale": np.int64,
    "out_scale": np.int64,
    "bias": np.int64,
    "a_offset": np.int64,
    "b_offset": np.int64,
    "gain": np.float32,
    "c": np.float32,
    "activation": np.int8,
    "delta_site": np.int32,
    "delta_offset": np.int64,
    "token_id": np.int64,
    "token_offset": np.int64,
}
PLAIN = ("used_bytes", "tokens_reach_head", "num_prefix_tokens", "num_prefix_pages", "positions")  # kept as they are


class RowsDamaged(Exception):
    """The file is missing, or not what was written for this adapter: compile it again from its content."""


class RowsHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of a packed adapter but its pages."""

    digest: str
    num_pages: int
    page_bytes: int
    used_bytes: int
    tokens_reach_head: bool
    num_prefix_tokens: int
    num_prefix_pages: int
    positions: Positions
    arrays: tuple[bytes, ...]  # those of ARRAYS
    pages_sha256: bytes


def numpy_allocate(num_bytes: int) -> NDArray[np.uint8]:
    """Ordinary memory, uninitialised."""
    return np.empty(num_bytes, np.uint8)


def write_rows(path: Path, packed: PackedAdapter) -> None:
    """Writes the file in one rename, so that no half of it is ever found. Raises OSError.

    It is not synced: what a power cut tears, the checksum finds, and it is compiled again.
    """
    pages = packed.pages.reshape(-1).data
    header = msgspec.msgpack.encode(
        RowsHeader(
            digest=packed.digest,
            num_pages=packed.num_pages,
            page_bytes=packed.page_bytes,
            **{name: getattr(packed, name) for name in PLAIN},
            arrays=tuple(getattr(packed, name).astype(dtype).tobytes() for name, dtype in ARRAYS.items()),
            pages_sha256=sha256(pages).digest(),
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(secrets.token_hex(8) + UNFINISHED_SUFFIX)
    try:
        with unfinished.open("xb") as file:
            file.write(MAGIC + len(header).to_bytes(LENGTH_BYTES, "little") + sha256(header).digest())
            file.write(header)
            file.write(pages)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def read_rows(path: Path, digest: str, allocate: Callable[[int], NDArray[np.uint8]] = numpy_allocate) -> PackedAdapter:
    """Reads the pages straight into `allocate(num_bytes)`, flat uint8; others run while it waits and hashes.

    Raises `RowsDamaged` for anything that is not bit for bit what `write_rows` wrote for this digest.
    """
    try:
        with path.open("rb") as file:
            header = _read_header(file, os.fstat(file.fileno()).st_size)
            if header.digest != digest:
                raise RowsDamaged(f"the rows file {path.name} is that of {header.digest}, not of {digest}")
            pages = allocate(header.num_pages * header.page_bytes)
            if _read_and_hash(file, pages) != header.pages_sha256:
                raise RowsDamaged(f"the pages in {path.name} do not match their checksum")
    except OSError as error:
        raise RowsDamaged(f"the rows file {path.name} cannot be read: {error.strerror or error}") from error
    return PackedAdapter(
        digest=digest,
        pages=pages.reshape(header.num_pages, header.page_bytes),
        **{name: getattr(header, name) for name in PLAIN},
        **_arrays(header),
    )


def _read_header(file: io.BufferedReader, size_bytes: int) -> RowsHeader:
    prefix = file.read(PREFIX_BYTES)
    if len(prefix) < PREFIX_BYTES or not prefix.startswith(MAGIC):
        raise RowsDamaged("not a rows file, or one of another version")
    begin = len(MAGIC) + LENGTH_BYTES
    header_bytes = int.from_bytes(prefix[len(MAGIC) : begin], "little")
    if header_bytes > size_bytes - PREFIX_BYTES:
        raise RowsDamaged("the rows file ends before its header does")
    encoded = file.read(header_bytes)
    if sha256(encoded).digest() != prefix[begin:]:
        raise RowsDamaged("the rows file's header does not match its checksum")
    header = msgspec.msgpack.decode(encoded, type=RowsHeader)
    if PREFIX_BYTES + header_bytes + header.num_pages * header.page_bytes != size_bytes:
        raise RowsDamaged("the rows file is longer or shorter than its header says")
    return header


def _read_and_hash(file: io.BufferedReader, pages: NDArray[np.uint8]) -> bytes:
    """Fills `pages`; the sha256 of what was there to fill it with."""
    hasher, target = sha256(), pages.data
    for begin in range(0, len(target), CHUNK_BYTES):
        chunk = target[begin : begin + CHUNK_BYTES]
        hasher.update(chunk[: file.readinto(chunk)])
    return hasher.digest()


def _arrays(header: RowsHeader) -> dict[str, Any]:
    """Copies, so that they can be written to and do not keep the whole header alive."""
    return {
        name: np.frombuffer(data, dtype).copy()
        for (name, dtype), data in zip(ARRAYS.items(), header.arrays, strict=True)
    }
