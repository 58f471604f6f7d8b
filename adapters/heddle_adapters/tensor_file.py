"""Reads safetensors files that strangers uploaded, without trusting a byte of them.

The format (https://huggingface.co/docs/safetensors, "Format"): 8 bytes little-endian header length, a JSON object
from tensor name to `{dtype, shape, data_offsets}`, then the tensors' bytes, offsets counted from the header's end.
This reader is stricter than the library, which takes the last of duplicate keys and a million empty tensors: the
header is bounded, every byte of the file belongs to exactly one tensor, and no tensor is empty. It knows nothing of
adapters or bases.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from heddle_adapters.bounded_json import Json, parse_object
from heddle_adapters.canonical import Floats
from heddle_adapters.errors import InvalidAdapter, quoted

WEIGHTS_FILE = "adapter_model.safetensors"

MAX_HEADER_BYTES = 8 * 2**20
MAX_TENSORS = 16_384
MAX_NAME_CHARS = 512
MAX_DIMENSIONS = 8
PREFIX_BYTES = 8
CHUNK_ELEMENTS = 2**20  # bounds the copies made while looking for NaN to 4 MiB

PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class ElementType:
    """How one of the format's dtypes lies in memory; all are little-endian IEEE 754 or its upper half."""

    storage: np.dtype[Any]
    exponent_bits: int  # all of them set: infinite or NaN; 0 for whole numbers


ELEMENT_TYPES = {
    "F32": ElementType(np.dtype("<u4"), 0x7F80_0000),
    "F16": ElementType(np.dtype("<u2"), 0x7C00),
    "BF16": ElementType(np.dtype("<u2"), 0x7F80),
    "I64": ElementType(np.dtype("<i8"), 0),
    "I32": ElementType(np.dtype("<i4"), 0),
    "I16": ElementType(np.dtype("<i2"), 0),
    "U8": ElementType(np.dtype("u1"), 0),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in its file."""

    name: str
    dtype: str  # a key of ELEMENT_TYPES
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int

    @property
    def is_integer(self) -> bool:
        """Whether it holds whole numbers."""
        return ELEMENT_TYPES[self.dtype].exponent_bits == 0


class TensorFile:
    """A checked safetensors file, memory-mapped read-only; the file must not change while it is in use."""

    def __init__(self, path: Path) -> None:
        """Maps the file and checks its structure, not its values; raises `InvalidAdapter`."""
        with path.open("rb") as file:
            self.size_bytes = os.fstat(file.fileno()).st_size
            if self.size_bytes <= PREFIX_BYTES:
                _refuse(f"is only {self.size_bytes} bytes long")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(_parse(self._map))

    def read(self, name: str) -> Floats:
        """A copy of one floating-point tensor, widened to float32 exactly."""
        tensor = self.tensors[name]
        assert not tensor.is_integer, f"{name} holds whole numbers"
        bits = self._bits(tensor).reshape(tensor.shape)
        if tensor.dtype == "F32":
            return bits.view("<f4").astype(np.float32)
        if tensor.dtype == "F16":
            return bits.view("<f2").astype(np.float32)
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def read_integers(self, name: str) -> NDArray[np.int64]:
        """A copy of one tensor of whole numbers."""
        tensor = self.tensors[name]
        assert tensor.is_integer, f"{name} holds floating-point numbers"
        return self._bits(tensor).reshape(tensor.shape).astype(np.int64)

    def bytes_of(self, name: str) -> memoryview:
        """One tensor's stored bytes, without a copy."""
        tensor = self.tensors[name]
        return memoryview(self._map)[tensor.begin : tensor.end]

    def first_non_finite(self) -> str | None:
        """The name of the first tensor that holds an infinity or a NaN."""
        return next((tensor.name for tensor in self.tensors.values() if self._has_non_finite(tensor)), None)

    def _has_non_finite(self, tensor: TensorInfo) -> bool:
        if tensor.is_integer:
            return False
        bits = self._bits(tensor)
        exponent = bits.dtype.type(ELEMENT_TYPES[tensor.dtype].exponent_bits)
        chunks = (bits[start : start + CHUNK_ELEMENTS] for start in range(0, bits.size, CHUNK_ELEMENTS))
        return any((chunk & exponent).max() == exponent for chunk in chunks)

    def _bits(self, tensor: TensorInfo) -> NDArray[Any]:
        storage = ELEMENT_TYPES[tensor.dtype].storage
        return np.frombuffer(self._map, storage, math.prod(tensor.shape), tensor.begin)


def _refuse(problem: str) -> NoReturn:
    raise InvalidAdapter(
        f"{WEIGHTS_FILE} {problem}; it must be an intact safetensors file, as PEFT's save_pretrained writes it.",
        param=WEIGHTS_FILE,
    )


def _parse(data: mmap.mmap) -> dict[str, TensorInfo]:
    header_bytes = _header_bytes(data)
    data_begin = PREFIX_BYTES + header_bytes
    header = parse_object(
        data[PREFIX_BYTES:data_begin],
        what=f"the header of {WEIGHTS_FILE}",
        param=WEIGHTS_FILE,
        max_members=MAX_TENSORS + 1,
    )
    _check_metadata(header.pop("__metadata__", {}))
    if not 0 < len(header) <= MAX_TENSORS:
        _refuse(f"holds {len(header) or 'no'} tensors; it may hold 1 to {MAX_TENSORS}")
    tensors = [_tensor(name, entry, data_begin) for name, entry in header.items()]
    _check_every_byte_is_owned(tensors, data_begin, len(data))
    return {tensor.name: tensor for tensor in tensors}


def _header_bytes(data: mmap.mmap) -> int:
    start = data[:PREFIX_BYTES]
    header_bytes = int.from_bytes(start, "little")
    is_header = data[PREFIX_BYTES : PREFIX_BYTES + 1] == b"{"
    if start.startswith(PICKLE_STARTS) and not is_header:  # a header of 640 bytes begins like a pickle of protocol 2
        raise InvalidAdapter(
            f"{WEIGHTS_FILE} is a PyTorch pickle, which could run code and is never opened here; convert it to "
            "safetensors where you trained it, with "
            "PeftModel.from_pretrained(base, folder).save_pretrained(folder, safe_serialization=True).",
            param=WEIGHTS_FILE,
        )
    if header_bytes > MAX_HEADER_BYTES:
        _refuse(f"announces a header of {header_bytes} bytes, more than the {MAX_HEADER_BYTES} allowed")
    if PREFIX_BYTES + header_bytes > len(data):
        _refuse(f"is truncated: it announces a header of {header_bytes} bytes and has {len(data) - PREFIX_BYTES}")
    if not is_header:
        _refuse("has no safetensors header")
    return header_bytes


def _check_metadata(metadata: Json) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse("has a __metadata__ entry that is not an object of strings")


def _tensor(name: str, entry: Json, data_begin: int) -> TensorInfo:
    if not name or len(name) > MAX_NAME_CHARS or not (name.isascii() and name.isprintable()):
        _refuse(f"has the tensor name {quoted(name)}; names are 1 to {MAX_NAME_CHARS} printable ASCII characters")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(f"must give dtype, shape and data_offsets, and nothing else, for tensor {quoted(name)}")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_TYPES:
        _refuse(f"stores tensor {quoted(name)} as {quoted(dtype)}; served are {', '.join(ELEMENT_TYPES)}")
    shape = _whole_numbers(entry["shape"])
    if shape is None or len(shape) > MAX_DIMENSIONS:
        _refuse(f"has a malformed shape for tensor {quoted(name)}")
    if 0 in shape:
        _refuse(f"has the empty tensor {quoted(name)} of shape {list(shape)}")
    offsets = _whole_numbers(entry["data_offsets"])
    if offsets is None or len(offsets) != 2:
        _refuse(f"has malformed data_offsets for tensor {quoted(name)}")
    begin, end = offsets
    size_bytes = math.prod(shape) * ELEMENT_TYPES[dtype].storage.itemsize
    if end - begin != size_bytes:
        _refuse(
            f"gives tensor {quoted(name)} {end - begin} bytes; its shape {list(shape)} in {dtype} takes {size_bytes}"
        )
    return TensorInfo(name, dtype, shape, data_begin + begin, data_begin + end)


def _whole_numbers(value: Json) -> tuple[int, ...] | None:
    """A list of integers >= 0 as a tuple; None for anything else (JSON's true is not 1 here)."""
    if not isinstance(value, list):
        return None
    numbers = tuple(item for item in value if type(item) is int and item >= 0)
    return numbers if len(numbers) == len(value) else None


def _check_every_byte_is_owned(tensors: list[TensorInfo], data_begin: int, file_bytes: int) -> None:
    position = data_begin
    for tensor in sorted(tensors, key=lambda tensor: tensor.begin):
        if tensor.begin < position:
            _refuse(f"has tensor {quoted(tensor.name)} overlapping another")
        if tensor.begin > position:
            _refuse(f"has a hole of {tensor.begin - position} bytes before tensor {quoted(tensor.name)}")
        position = tensor.end
    if position > file_bytes:
        _refuse(f"is truncated: its tensors end at byte {position} and the file at byte {file_bytes}")
    if position < file_bytes:
        _refuse(f"has {file_bytes - position} trailing bytes after its last tensor")
