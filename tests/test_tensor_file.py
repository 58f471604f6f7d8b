"""The safetensors reader: exact on honest files, a typed error on every other."""

from __future__ import annotations

import json
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from heddle_adapters import tensor_file
from heddle_adapters.errors import InvalidAdapter
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorFile

Header = dict[str, Any]


def file_bytes(header: Header | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32", **more: Any) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def open_bytes(tmp_path: Path, data: bytes) -> TensorFile:
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(data)
    return TensorFile(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_the_library_wrote_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {"a.weight": torch.randn(3, 5).to(dtype), "scalar": torch.tensor(7.0).to(dtype)}
    save_file(tensors, tmp_path / WEIGHTS_FILE, metadata={"format": "pt"})
    file = TensorFile(tmp_path / WEIGHTS_FILE)
    assert file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert file.tensors[name].shape == tuple(tensor.shape)
        assert file.read(name).dtype == np.float32
        np.testing.assert_array_equal(file.read(name), tensor.float().numpy())
        assert bytes(file.bytes_of(name)) == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert file.first_non_finite() is None


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_reads_whole_numbers_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    tensors = {
        "indices": torch.tensor([[limits.min, 0, 1], [limits.max, limits.max - 1, 7]], dtype=dtype),
        "one": torch.tensor(3, dtype=dtype),
        "weight": torch.ones(2),
    }
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    file = TensorFile(tmp_path / WEIGHTS_FILE)
    assert {name: tensor.is_integer for name, tensor in file.tensors.items()} == {
        "indices": True,
        "one": True,
        "weight": False,
    }
    for name in ("indices", "one"):
        assert file.read_integers(name).dtype == np.int64
        np.testing.assert_array_equal(file.read_integers(name), tensors[name].numpy())
        with pytest.raises(AssertionError, match="whole numbers"):
            file.read(name)
    with pytest.raises(AssertionError, match="floating-point numbers"):
        file.read_integers("weight")
    assert file.first_non_finite() is None, "no bits of a whole number are those of a NaN"


def test_reads_tensors_that_lie_at_odd_addresses(tmp_path: Path) -> None:
    header = json.dumps({"t": entry()}).encode()
    values = np.array([1.5, -2], np.float32)
    for padding in range(4):
        file = open_bytes(tmp_path, file_bytes(header + b" " * padding, values.tobytes()))
        np.testing.assert_array_equal(file.read("t"), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finds_a_non_finite_value_anywhere(
    tmp_path: Path, dtype: torch.dtype, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK_ELEMENTS", 16)
    for position in (0, 15, 16, 39):
        values = torch.full((40,), torch.finfo(dtype).max, dtype=dtype)
        values[position] = bad
        save_file({"good": torch.ones(3, dtype=dtype), "wrong": values}, tmp_path / WEIGHTS_FILE)
        assert TensorFile(tmp_path / WEIGHTS_FILE).first_non_finite() == "wrong"


EIGHT = b"\0" * 8
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "only 0 bytes"),
    "prefix only": (EIGHT, "only 8 bytes"),
    "zip pickle": (b"PK\x03\x04" + b"\0" * 64, "PyTorch pickle"),
    "plain pickle": (pickle.dumps({"weight": list(range(99))}), "PyTorch pickle"),
    "pickle protocol 2": (pickle.dumps({"weight": list(range(99))}, protocol=2), "PyTorch pickle"),
    "header of 2**63 bytes": ((2**63).to_bytes(8, "little") + b"{}", "announces a header"),
    "header over the limit": ((8 * 2**20 + 1).to_bytes(8, "little") + b"{" * 99, "announces a header"),
    "header longer than the file": ((4096).to_bytes(8, "little") + b"{}", "truncated"),
    "header cut off": (file_bytes({"t": entry()})[:20], "truncated"),
    "data cut off": (file_bytes({"t": entry()}, EIGHT[:7]), "truncated"),
    "no data at all": (file_bytes({"t": entry()}), "truncated"),
    "trailing byte": (file_bytes({"t": entry()}, EIGHT + b"x"), "1 trailing bytes"),
    "hole at the start": (file_bytes({"t": entry(4, 12)}, EIGHT + EIGHT[:4]), "hole of 4 bytes"),
    "hole between": (file_bytes({"t": entry(), "u": entry(12, 20)}, EIGHT * 3), "hole of 4 bytes before tensor 'u'"),
    "overlap": (file_bytes({"t": entry(), "u": entry(4, 12)}, EIGHT * 2), "overlapping"),
    "two on one place": (file_bytes({"t": entry(), "u": entry()}, EIGHT), "overlapping"),
    "not a header": (file_bytes(b"[1, 2, 3]"), "no safetensors header"),
    "text": (b"hello, this is not a tensor file", "announces a header"),
    "not JSON": (file_bytes(b"{]"), "is not JSON"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'), "not UTF-8"),
    "two values": (file_bytes(b"{} {}"), "is not JSON"),
    "deep nesting": (file_bytes(b'{"t":' + b"[" * 40_000), "nested too deeply"),
    "deep objects": (file_bytes(b'{"t":' * 40_000), "nested too deeply"),
    "integer bomb": (file_bytes(b'{"t": ' + b"9" * 1_000_000 + b"}"), "integer of 1000000 digits"),
    "NaN": (file_bytes(b'{"t": NaN}'), "'NaN', which is not finite"),
    "duplicate tensor": (file_bytes(b'{"t": 1, "t": 2}'), "the key 't' more than once"),
    "duplicate field": (file_bytes(b'{"t": {"dtype": "F32", "dtype": "F16"}}'), "the key 'dtype' more than once"),
    "no tensors": (file_bytes({}), "holds no tensors"),
    "metadata only": (file_bytes({"__metadata__": {"format": "pt"}}), "holds no tensors"),
    "metadata of numbers": (file_bytes({"__metadata__": {"n": 1}, "t": entry()}, EIGHT), "__metadata__"),
    "metadata a list": (file_bytes({"__metadata__": [], "t": entry()}, EIGHT), "__metadata__"),
    "too many tensors": (file_bytes({f"t{n}": 0 for n in range(16_386)}), "more than the 16385 allowed"),
    "entry not an object": (file_bytes({"t": 1}), "must give dtype, shape and data_offsets"),
    "entry without shape": (file_bytes({"t": {"dtype": "F32", "data_offsets": [0, 8]}}), "must give dtype"),
    "entry with more": (file_bytes({"t": entry(strides=[1])}, EIGHT), "and nothing else"),
    "empty name": (file_bytes({"": entry()}, EIGHT), "tensor name ''"),
    "long name": (file_bytes({"t" * 513: entry()}, EIGHT), "1 to 512"),
    "name with newline": (file_bytes({"t\n": entry()}, EIGHT), r"tensor name 't\n'"),
    "name of surrogates": (file_bytes(b'{"\\ud800": {}}'), "printable ASCII"),
    "64-bit floats": (file_bytes({"t": entry(0, 16, dtype="F64")}, EIGHT * 2), "as 'F64'; served are F32"),
    "integers of 16 bits without sign": (file_bytes({"t": entry(shape=[4], dtype="U16")}, EIGHT), "as 'U16'; served"),
    "integers of 16 bits against size": (file_bytes({"t": entry(dtype="I16")}, EIGHT), "in I16 takes 4"),
    "integers of 64 bits without sign": (file_bytes({"t": entry(shape=[1], dtype="U64")}, EIGHT), "as 'U64'"),
    "integers against size": (file_bytes({"t": entry(dtype="I64")}, EIGHT), "in I64 takes 16"),
    "unknown dtype": (file_bytes({"t": entry(dtype="X")}, EIGHT), "as 'X'"),
    "dtype a list": (file_bytes({"t": entry(dtype=["F32"])}, EIGHT), "served are"),
    "empty tensor": (file_bytes({"t": entry(0, 0, [2, 0])}), "empty tensor 't'"),
    "negative size": (file_bytes({"t": entry(shape=[-2])}, EIGHT), "malformed shape"),
    "two negative sizes": (file_bytes({"t": entry(shape=[-1, -2])}, EIGHT), "malformed shape"),
    "huge size": (file_bytes({"t": entry(shape=[2**62])}, EIGHT), "takes 18446744073709551616"),
    "sizes that overflow": (file_bytes({"t": entry(shape=[2**33, 2**33])}, EIGHT), "its shape"),
    "boolean size": (file_bytes({"t": entry(shape=[True, 2])}, EIGHT), "malformed shape"),
    "fractional size": (file_bytes({"t": entry(shape=[2.0])}, EIGHT), "malformed shape"),
    "shape a number": (file_bytes({"t": entry(shape=2)}, EIGHT), "malformed shape"),
    "nine dimensions": (file_bytes({"t": entry(shape=[1] * 8 + [2])}, EIGHT), "malformed shape"),
    "shape against size": (file_bytes({"t": entry(shape=[3])}, EIGHT), "8 bytes; its shape [3] in F32 takes 12"),
    "dtype against size": (file_bytes({"t": entry(dtype="BF16")}, EIGHT), "in BF16 takes 4"),
    "offsets reversed": (file_bytes({"t": entry(8, 0)}, EIGHT), "takes 8"),
    "offsets negative": (file_bytes({"t": entry(-8, 0)}, EIGHT), "malformed data_offsets"),
    "offsets boolean": (file_bytes({"t": entry(False, 8)}, EIGHT), "malformed data_offsets"),
    "three offsets": (file_bytes({"t": {**entry(), "data_offsets": [0, 8, 8]}}, EIGHT), "malformed data_offsets"),
    "offsets beyond": (file_bytes({"t": entry(2**40, 2**40 + 8)}, EIGHT), "hole"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refuses(tmp_path: Path, case: str) -> None:
    data, message = HOSTILE[case]
    started = time.perf_counter()
    with pytest.raises(InvalidAdapter) as caught:
        open_bytes(tmp_path, data)
    assert message in caught.value.message
    assert WEIGHTS_FILE in caught.value.message
    assert caught.value.param == WEIGHTS_FILE
    assert time.perf_counter() - started < 2


def _flip_bit(data: bytearray, source: random.Random) -> None:
    data[source.randrange(len(data))] ^= 1 << source.randrange(8)


def _cut(data: bytearray, source: random.Random) -> None:
    del data[source.randrange(len(data)) :]


def _insert(data: bytearray, source: random.Random) -> None:
    position = source.randrange(len(data))
    data[position:position] = source.randbytes(source.randrange(1, 9))


def _swap_digit(data: bytearray, source: random.Random) -> None:
    position = source.choice([number for number, byte in enumerate(data) if chr(byte).isdigit()])
    data[position] = ord(source.choice("0123456789-.e"))


@pytest.mark.parametrize("mutate", [_flip_bit, _cut, _insert, _swap_digit])
def test_mutated_files_are_read_or_refused_but_nothing_else(
    tmp_path: Path, mutate: Callable[[bytearray, random.Random], None]
) -> None:
    honest = file_bytes({"t": entry(), "u": entry(8, 16, [2, 2], "BF16")}, EIGHT * 2)
    source = random.Random(0)
    for _ in range(500):
        data = bytearray(honest)
        mutate(data, source)
        try:
            file = open_bytes(tmp_path, bytes(data))
        except InvalidAdapter:
            continue
        file.first_non_finite()
        for name, tensor in file.tensors.items():
            assert (file.read_integers(name) if tensor.is_integer else file.read(name)).size > 0
