"""The base's weights as one flat file: written once by the engine as it holds them, mapped by the compile worker.

    8 bytes   MAGIC, which ends in the version of this format
    8 bytes   length of the header, little-endian
    header    msgpack: list of StoredWeight
    arrays    each from a multiple of ALIGNMENT_BYTES on

Of every weight there is a checksum, over its entry and its arrays, which is proven whenever the weight is asked for.

A 4-bit weight lies as bitsandbytes packs it: two values a byte, the first in the upper half, each the index of one of
16 levels, which a block's scale multiplies (bitsandbytes 0.50, `functional.quantize_4bit`). An int8 weight has a scale
for every output (`functional.int8_vectorwise_quant`).
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from heddle_adapters.canonical import Floats
from heddle_adapters.errors import StoreUnusable

MAGIC = b"hdlbase\x01"
LENGTH_BYTES = 8
ALIGNMENT_BYTES = 64
SUFFIX, UNFINISHED_SUFFIX = ".weights", ".tmp"

Encoding = Literal["float32", "float16", "bfloat16", "4bit", "int8"]
STORAGE: dict[Encoding, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,  # the upper halves of float32 numbers
    "4bit": np.uint8,
    "int8": np.int8,
}
INT8_LEVELS = 127.0
SCALE_BYTES = 4  # of a float32


class StoredWeight(msgspec.Struct, frozen=True):
    """Where one site's weight lies, and what its numbers mean."""

    path: str
    encoding: Encoding
    shape: tuple[int, ...]
    begin: int = 0  # bytes from the end of the header
    scale_begin: int = 0  # "4bit": float32, one a block; "int8": float32, one an output
    block_size: int = 0  # "4bit": values that share a scale
    levels: tuple[float, ...] = ()  # "4bit": what the 16 indices mean
    bias: bytes = b""  # float32 [out_features]
    checksum: bytes = b""  # sha256 of this entry without it, and of the arrays

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def values_bytes(self) -> int:
        if self.encoding == "4bit":
            return -(-self.num_values // 2)
        return self.num_values * int(np.dtype(STORAGE[self.encoding]).itemsize)

    @property
    def scales_bytes(self) -> int:
        if self.encoding == "4bit":
            return -(-self.num_values // self.block_size) * SCALE_BYTES
        return self.shape[0] * SCALE_BYTES if self.encoding == "int8" else 0


@dataclass(frozen=True)
class WeightArrays:
    """One site's weight as it is written."""

    stored: StoredWeight  # without its offsets
    read: Callable[[], tuple[NDArray[Any], Floats | None]]  # values, of STORAGE[encoding], and scales if it has some


def write_base_file(path: Path, weights: Sequence[WeightArrays]) -> None:
    """Writes the file in one rename after its bytes have reached the disk. Raises `OSError`.

    One weight is read after another, and twice, so that no copy of the whole base is ever in memory.
    """
    entries, position = list[StoredWeight](), 0
    for each in weights:
        stored = each.stored
        begin, position = position, _aligned(position + stored.values_bytes)
        scale_begin, position = position, _aligned(position + stored.scales_bytes)
        placed = msgspec.structs.replace(stored, begin=begin, scale_begin=scale_begin)
        entries.append(msgspec.structs.replace(placed, checksum=_checksum(placed, *each.read())))
    header = msgspec.msgpack.encode(entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(secrets.token_hex(8) + UNFINISHED_SUFFIX)
    try:
        with unfinished.open("xb") as file:
            file.write(MAGIC + len(header).to_bytes(LENGTH_BYTES, "little") + header)
            first = _aligned(file.tell())
            file.truncate(first + position)
            for entry, each in zip(entries, weights, strict=True):
                values, scales = each.read()
                _write_at(file, first + entry.begin, values, entry.values_bytes)
                if scales is not None:
                    _write_at(file, first + entry.scale_begin, scales, entry.scales_bytes)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_at(file: IO[bytes], position: int, array: NDArray[Any], size_bytes: int) -> None:
    assert array.nbytes == size_bytes, f"{array.nbytes} bytes where {size_bytes} belong"
    file.seek(position)
    file.write(np.ascontiguousarray(array).data)


class BaseFile:
    """`source.BaseWeights` out of such a file: a weight is dequantised when it is asked for, and not kept."""

    def __init__(self, path: Path) -> None:
        """Maps the file. Raises `StoreUnusable` where it is missing or not what `write_base_file` wrote."""
        self._path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: it is empty
            reason = getattr(error, "strerror", None) or "the file is empty"
            message = f"The base's weights beside the store cannot be read: {reason}; start the server again."
            raise StoreUnusable(message, param="adapter") from error
        prefix = len(MAGIC) + LENGTH_BYTES
        header_bytes = int.from_bytes(self._map[len(MAGIC) : prefix], "little")
        try:
            entries = msgspec.msgpack.decode(self._map[prefix : prefix + header_bytes], type=list[StoredWeight])
        except msgspec.MsgspecError:
            entries = []
        self._first = _aligned(prefix + header_bytes)
        ends = [max(entry.begin + entry.values_bytes, entry.scale_begin + entry.scales_bytes) for entry in entries]
        if self._map[: len(MAGIC)] != MAGIC or self._first + max(ends, default=len(self._map)) > len(self._map):
            raise StoreUnusable(
                "The base's weights beside the store are damaged or of another version; start the server again.",
                param="adapter",
            )
        self._entries = {entry.path: entry for entry in entries}

    def weight(self, path: str) -> Floats:
        """[out_features, in_features] of a linear, [vocabulary, hidden_size] of an embedding, [width] of a norm."""
        entry = self._entries[path]
        values = self._array(STORAGE[entry.encoding], entry.begin, entry.values_bytes)
        scales = self._array(np.float32, entry.scale_begin, entry.scales_bytes) if entry.scales_bytes else None
        if _checksum(entry, values, scales) != entry.checksum:
            self._path.unlink(missing_ok=True)  # the next start writes it anew
            message = "The base's weights beside the store are damaged; start the server again, which writes them anew."
            raise StoreUnusable(message, param="adapter")
        if entry.encoding == "4bit":
            return _four_bit(entry, values, scales)
        values = values.reshape(entry.shape)
        if scales is not None:
            factors: Floats = (scales / INT8_LEVELS).astype(np.float32)
            return np.asarray(values * factors[:, None], np.float32)
        if entry.encoding == "bfloat16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)

    def bias(self, path: str) -> Floats | None:
        """[out_features]; None where the base adds none."""
        stored = self._entries[path].bias
        return np.frombuffer(stored, np.float32) if stored else None

    def _array(self, dtype: Any, begin: int, size_bytes: int) -> NDArray[Any]:
        return np.frombuffer(self._map, dtype, size_bytes // np.dtype(dtype).itemsize, self._first + begin)


class LazyBase:
    """The base's weights for the methods that ask for them; most do not, and then the file is not even opened."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _file(self) -> BaseFile:
        return BaseFile(self._path)

    def weight(self, path: str) -> Floats:
        return self._file.weight(path)

    def bias(self, path: str) -> Floats | None:
        return self._file.bias(path)


def _four_bit(entry: StoredWeight, packed: NDArray[np.uint8], scales: Floats | None) -> Floats:
    assert scales is not None, "every block has a scale"
    num_values, levels = entry.num_values, np.array(entry.levels, np.float32)
    values = levels[np.stack([packed >> 4, packed & 15], axis=-1)].reshape(-1)[:num_values]
    weight: Floats = (values * np.repeat(scales, entry.block_size)[:num_values]).reshape(entry.shape)
    return weight


def _checksum(entry: StoredWeight, values: NDArray[Any], scales: Floats | None) -> bytes:
    hasher = sha256(msgspec.msgpack.encode(msgspec.structs.replace(entry, checksum=b"")))
    for array in (values, scales):
        if array is not None:
            hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return hasher.digest()


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def base_file_path(store_path: Path, fingerprint: str, dtype: str) -> Path:
    """Where the weights of a base lie: its fingerprint, "sha256:<hex>" or "dummy:<hex>", and the dtype that it was
    loaded in name the file."""
    return store_path / "base" / f"{fingerprint.replace(':', '-')}-{dtype}{SUFFIX}"


def encoded_floats(values: Sequence[float] | NDArray[Any]) -> bytes:
    """As `StoredWeight.bias` holds them."""
    return np.ascontiguousarray(values, np.float32).tobytes()
