"""The file of the base's weights: what bitsandbytes and torch make of the same bytes, or a typed error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
)
from numpy.typing import NDArray
from torch import Tensor

from heddle_adapters.base_file import (
    ALIGNMENT_BYTES,
    LENGTH_BYTES,
    MAGIC,
    STORAGE,
    BaseFile,
    Encoding,
    LazyBase,
    StoredWeight,
    WeightArrays,
    base_file_path,
    encoded_floats,
    write_base_file,
)
from heddle_adapters.canonical import Floats
from heddle_adapters.errors import StoreUnusable

FLOATS: dict[Encoding, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
PREFIX_BYTES = len(MAGIC) + LENGTH_BYTES
BIAS = np.linspace(-3, 3, 7, dtype=np.float32)


def random_weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * 0.05 + 0.01).to(dtype)


def plain(path: str, weight: Tensor, encoding: Encoding, bias: bytes = b"") -> WeightArrays:
    values: NDArray[Any] = weight.view(torch.uint8).numpy().view(STORAGE[encoding]).reshape(-1)
    return WeightArrays(StoredWeight(path, encoding, tuple(weight.shape), bias=bias), lambda: (values, None))


def four_bit(path: str, packed: Tensor, state: Any) -> WeightArrays:
    """A weight as bitsandbytes holds it, its scales as floats even where it has quantised them too."""
    scales: Tensor = state.absmax
    if state.nested:
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    stored = StoredWeight(
        path, "4bit", tuple(state.shape), block_size=state.blocksize, levels=tuple(state.code.tolist())
    )
    return WeightArrays(stored, lambda: (packed.view(-1).numpy(), scales.numpy()))


def eight_bit(path: str, values: Tensor, scales: Tensor, bias: bytes = b"") -> WeightArrays:
    stored = StoredWeight(path, "int8", tuple(values.shape), bias=bias)
    return WeightArrays(stored, lambda: (values.numpy(), scales.numpy()))


def written(tmp_path: Path, *weights: WeightArrays) -> BaseFile:
    write_base_file(tmp_path / "base" / "a.weights", weights)
    return BaseFile(tmp_path / "base" / "a.weights")


def assert_exact(actual: Floats, expected: Tensor) -> None:
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual, expected.float().numpy(), strict=True)


# What the numbers are.


@pytest.mark.parametrize("encoding", FLOATS)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (64, 48)], ids=str)
def test_floats_are_widened_exactly(tmp_path: Path, shape: tuple[int, ...], encoding: Encoding) -> None:
    dtype = FLOATS[encoding]
    weight = random_weight(*shape, dtype=dtype)
    limits = torch.finfo(dtype)
    edges = [limits.max, limits.min, limits.tiny, limits.smallest_normal / 2, 0.0, -0.0]
    weight.view(-1)[: len(edges)] = torch.tensor(edges, dtype=torch.float64).to(dtype)
    read = written(tmp_path, plain("norm", weight, encoding)).weight("norm")
    assert_exact(read, weight)
    np.testing.assert_array_equal(np.signbit(read), torch.signbit(weight).numpy(), "zero keeps its sign")


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bit_weights_are_what_bitsandbytes_makes_of_them(
    tmp_path: Path, quant_type: str, block_size: int, nested: bool, dtype: torch.dtype
) -> None:
    """Bit for bit in float32; in 16 bits bitsandbytes rounds the same numbers once more."""
    weight = random_weight(48, 3 * block_size, dtype=dtype)
    packed, state = quantize_4bit(weight, blocksize=block_size, quant_type=quant_type, compress_statistics=nested)
    assert state.nested == nested
    read = written(tmp_path, four_bit("linear", packed, state)).weight("linear")
    expected = dequantize_4bit(packed, state)
    assert expected.dtype == dtype
    assert_exact(torch.from_numpy(read).to(dtype).float().numpy(), expected)
    state.dtype = torch.float32
    assert_exact(read, dequantize_4bit(packed, state))
    assert np.abs(read - weight.float().numpy()).max() < 0.06, "it is the weight that was quantised"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(7, 9), (5, 13), (13, 48), (3, 200), (1, 1)], ids=str)
def test_blocks_go_on_over_the_ends_of_rows(
    tmp_path: Path, shape: tuple[int, int], quant_type: str, nested: bool
) -> None:
    """Blocks are counted over the flat weight, the last one may be short, and an odd one leaves half a byte.

    bitsandbytes' own kernel for CPUs begins a block with every row, which is wrong for rows of an even width that no
    block divides; so it is given the weight as one row here.
    """
    weight = random_weight(*shape)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=nested)
    stored = four_bit("linear", packed, state)
    scales = stored.read()[1]
    assert scales is not None
    flat = QuantState(torch.from_numpy(scales), torch.Size([weight.numel()]), state.code, 64, quant_type, torch.float32)
    assert_exact(written(tmp_path, stored).weight("linear"), dequantize_4bit(packed, flat).view(*shape))


def test_eight_bit_weights_are_what_bitsandbytes_makes_of_them(tmp_path: Path) -> None:
    """Up to a rounding: it multiplies with 1 / 127 where we divide by 127."""
    weight = random_weight(33, 50, dtype=torch.float16)
    weight[7] = 0
    weight[8] *= 100
    values, scales, _ = int8_vectorwise_quant(weight)
    assert values.dtype == torch.int8
    assert {int(values.min()), int(values.max())} == {-127, 127}
    read = written(tmp_path, eight_bit("linear", values, scales)).weight("linear")
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, int8_vectorwise_dequant(values, scales).numpy(), rtol=2**-22, atol=0, strict=True)
    limits = (weight.abs().amax(dim=1, keepdim=True).float() / 127).numpy()
    assert (np.abs(read - weight.float().numpy()) <= 0.51 * limits).all(), "it is the weight that was quantised"


def test_a_bias_is_there_where_the_base_has_one(tmp_path: Path) -> None:
    weight, bias = random_weight(7, 64), encoded_floats(BIAS)
    values, scales, _ = int8_vectorwise_quant(weight.half())
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    quantised = four_bit("4bit", packed, state)
    with_bias = WeightArrays(msgspec.structs.replace(quantised.stored, bias=bias), quantised.read)
    file = written(
        tmp_path,
        plain("plain", weight, "float32", bias),
        plain("without", weight, "float32"),
        eight_bit("int8", values, scales, bias),
        with_bias,
    )
    for path in ("plain", "int8", "4bit"):
        found = file.bias(path)
        assert found is not None
        np.testing.assert_array_equal(found, BIAS, strict=True)
    assert file.bias("without") is None
    assert encoded_floats([1, 2.5]) == np.array([1, 2.5], np.float32).tobytes()


# The file.


def sample() -> dict[str, tuple[WeightArrays, Tensor]]:
    """Weights of every encoding, none of which ends where the next may begin, and what they are in float32."""
    packed, state = quantize_4bit(random_weight(7, 9), blocksize=64, quant_type="nf4")
    values, scales, _ = int8_vectorwise_quant(random_weight(5, 11).half())
    floats = {name: random_weight(3, 5, dtype=dtype) for name, dtype in FLOATS.items()}
    return {
        "4bit": (four_bit("4bit", packed, state), dequantize_4bit(packed, state)),
        **{name: (plain(name, weight, name), weight.float()) for name, weight in floats.items()},
        "int8": (eight_bit("int8", values, scales), values * (scales / 127)[:, None]),
        "norm": (plain("norm", random_weight(9), "float32"), random_weight(9)),
    }


def read_all(path: Path) -> dict[str, Floats]:
    file = BaseFile(path)
    return {name: file.weight(name) for name in sample()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A sound file in a folder of its own."""
    path = tmp_path / "store" / "base" / "a.weights"
    write_base_file(path, [arrays for arrays, _ in sample().values()])
    return path


def test_weights_of_all_kinds_lie_in_one_file(path: Path) -> None:
    for name, weight in read_all(path).items():
        np.testing.assert_allclose(weight, sample()[name][1].numpy(), rtol=2**-22, atol=0, strict=True, err_msg=name)
    assert [file.name for file in path.parent.iterdir()] == ["a.weights"]


def test_arrays_lie_aligned_and_apart(path: Path) -> None:
    content = path.read_bytes()
    header_end = PREFIX_BYTES + int.from_bytes(content[len(MAGIC) : PREFIX_BYTES], "little")
    entries = msgspec.msgpack.decode(content[PREFIX_BYTES:header_end], type=list[StoredWeight])
    assert [entry.path for entry in entries] == list(sample())
    first = -(-header_end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    assert len(content) % ALIGNMENT_BYTES == 0
    position = first
    for entry in entries:
        values, scales = sample()[entry.path][0].read()
        for begin, array in ((entry.begin, values), (entry.scale_begin, scales)):
            if array is not None:
                assert begin % ALIGNMENT_BYTES == 0
                assert first + begin >= position
                position = first + begin + array.nbytes
                assert content[first + begin : position] == array.tobytes()
    assert position <= len(content)


def test_one_weight_is_read_after_another(tmp_path: Path) -> None:
    """So that a base never lies in memory twice: all for their checksums, then all to be written."""
    order = list[str]()

    def noting(name: str, arrays: WeightArrays) -> WeightArrays:
        def read() -> tuple[NDArray[Any], Floats | None]:
            order.append(name)
            return arrays.read()

        return WeightArrays(arrays.stored, read)

    weights = [noting(name, arrays) for name, (arrays, _) in sample().items()]
    assert order == []
    write_base_file(tmp_path / "a.weights", weights)
    assert order == [*sample(), *sample()]


def test_a_flipped_bit_is_found_when_its_weight_is_asked_for(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the last array, or of what fills it up
    for position in range(len(data) - 200, len(data)):
        data[position] ^= 0x10
    path.write_bytes(data)
    file = BaseFile(path)
    with pytest.raises(StoreUnusable, match="damaged"):
        _ = [file.weight(name) for name in sample()]
    assert not path.exists(), "the next start writes it anew"


def test_what_is_read_is_the_readers_own(path: Path) -> None:
    file = BaseFile(path)
    for name in sample():
        weight = file.weight(name)
        before = weight.copy()
        weight[:] = 7
        np.testing.assert_array_equal(file.weight(name), before)


def test_a_file_that_is_replaced_stays_what_it_was_to_those_who_read_it(path: Path) -> None:
    file, other = BaseFile(path), random_weight(9) + 1
    write_base_file(path, [plain("norm", other, "float32")])
    assert_exact(file.weight("norm"), sample()["norm"][1])
    assert_exact(BaseFile(path).weight("norm"), other)


def test_a_failed_write_leaves_what_was_there(path: Path) -> None:
    before = path.read_bytes()

    def fail() -> tuple[NDArray[Any], Floats | None]:
        raise RuntimeError("the device is gone")

    sound, (stored, _) = sample()["norm"][0], sample()["float32"]
    for wrong, error in (
        (WeightArrays(stored.stored, fail), RuntimeError),
        (WeightArrays(stored.stored, sound.read), AssertionError),  # 9 numbers where 15 belong
    ):
        with pytest.raises(error):
            write_base_file(path, [sound, wrong])
    taken = path.with_name("taken")
    taken.mkdir()
    with pytest.raises(OSError, match="directory"):
        write_base_file(taken, [sound])
    assert path.read_bytes() == before
    assert {file.name for file in path.parent.iterdir()} == {"a.weights", "taken"}


def test_a_folder_that_cannot_be_made_is_an_error_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "base").touch()
    with pytest.raises(OSError, match=r"exists|Not a directory"):
        write_base_file(tmp_path / "base" / "a.weights", [sample()["norm"][0]])


# Files that are no good.


def test_no_file_is_noticed_when_a_weight_is_asked_for(tmp_path: Path) -> None:
    """Most methods ask for none: for them the worker needs no file."""
    missing = base_file_path(tmp_path, "sha256:" + "0" * 64, "bfloat16")
    with pytest.raises(StoreUnusable, match="cannot be read"):
        BaseFile(missing)
    lazy = LazyBase(missing)
    for ask in (lazy.weight, lazy.bias):
        with pytest.raises(StoreUnusable, match="cannot be read"):
            ask("norm")
    write_base_file(missing, [plain("norm", random_weight(9), "float32", encoded_floats(BIAS))])
    assert_exact(lazy.weight("norm"), random_weight(9))
    bias = lazy.bias("norm")
    assert bias is not None
    np.testing.assert_array_equal(bias, BIAS)


def test_a_file_of_another_kind_or_version_is_refused(path: Path) -> None:
    good = path.read_bytes()
    for magic in (MAGIC[:-1] + bytes([MAGIC[-1] + 1]), b"hdlrows\x01", b"\0" * len(MAGIC), b"PK\x03\x04" * 2):
        path.write_bytes(magic + good[len(MAGIC) :])
        with pytest.raises(StoreUnusable, match="another version"):
            BaseFile(path)


CUTS: dict[str, Callable[[int, int], int]] = {  # the length that is left, of a header's end and a file's
    "nothing": lambda header_end, size: 0,
    "one byte": lambda header_end, size: 1,
    "half the magic": lambda header_end, size: len(MAGIC) // 2,
    "the magic": lambda header_end, size: len(MAGIC),
    "half the length": lambda header_end, size: len(MAGIC) + LENGTH_BYTES // 2,
    "no header": lambda header_end, size: PREFIX_BYTES,
    "half the header": lambda header_end, size: (PREFIX_BYTES + header_end) // 2,
    "all but one byte of the header": lambda header_end, size: header_end - 1,
    "the header": lambda header_end, size: header_end,
    "half the arrays": lambda header_end, size: (header_end + size) // 2,
    "all but the last array": lambda header_end, size: size - ALIGNMENT_BYTES,
}


@pytest.mark.parametrize("case", CUTS)
def test_a_file_that_is_cut_off_is_refused(path: Path, case: str) -> None:
    good = path.read_bytes()
    header_end = PREFIX_BYTES + int.from_bytes(good[len(MAGIC) : PREFIX_BYTES], "little")
    path.write_bytes(good[: CUTS[case](header_end, len(good))])
    with pytest.raises(StoreUnusable):
        read_all(path)


HEADERS: dict[str, bytes] = {
    "zeros": b"\0" * 16,
    "text": b"not a header",
    "an object": msgspec.msgpack.encode({"path": "norm"}),
    "entries without an encoding": msgspec.msgpack.encode([{"path": "norm", "shape": [9]}]),
    "an encoding of another version": msgspec.msgpack.encode([{"path": "norm", "encoding": "2bit", "shape": [9]}]),
    "text that is not UTF-8": msgspec.msgpack.encode(["norm"]).replace(b"norm", b"\xff\xfe\xfd\xfc"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_says_nothing_is_refused(path: Path, case: str) -> None:
    header = HEADERS[case]
    path.write_bytes(MAGIC + len(header).to_bytes(LENGTH_BYTES, "little") + header + bytes(4096))
    with pytest.raises(StoreUnusable):
        BaseFile(path)


@pytest.mark.parametrize("claimed", [1 << 16, 1 << 40, (1 << 8 * LENGTH_BYTES) - 1])
def test_no_length_is_believed_beyond_the_file(path: Path, claimed: int) -> None:
    good = path.read_bytes()
    path.write_bytes(MAGIC + claimed.to_bytes(LENGTH_BYTES, "little") + good[PREFIX_BYTES:])
    with pytest.raises(StoreUnusable):
        read_all(path)


def test_the_file_is_named_after_the_base(tmp_path: Path) -> None:
    digest = "0123456789abcdef" * 4
    for kind in ("sha256", "dummy"):
        path = base_file_path(tmp_path, f"{kind}:{digest}", "bfloat16")
        assert path == tmp_path / "base" / f"{kind}-{digest}-bfloat16.weights"
