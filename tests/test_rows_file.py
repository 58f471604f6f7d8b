"""Rows files: read back bit for bit, or refused."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from heddle_adapters.base_layout import KvLayout, Site
from heddle_adapters.packed_adapter import PackedAdapter
from heddle_adapters.positions import Positions
from heddle_adapters.rows_file import (
    ARRAYS,
    LENGTH_BYTES,
    MAGIC,
    PLAIN,
    PREFIX_BYTES,
    RowsDamaged,
    RowsHeader,
    read_rows,
    write_rows,
)
from row_samples import (
    DIGEST,
    layout_of,
    normal,
    pack,
    random_prefix,
    random_rows,
    random_scales,
    random_tokens,
)

NUM_FLIPS = 500

SITES = (Site("q", "linear", 24, 40, has_bias=False), Site("v", "linear", 300, 16, has_bias=False))
KV = KvLayout(num_layers=4, num_kv_heads=2, head_dim=4)
POSITIONS = [
    Positions(),
    Positions(invocation=(0,)),
    Positions(invocation=(5, 2**31, 151_643, 5)),
    Positions(num_first=3),
    Positions(num_last=1),
    Positions(num_first=7, num_last=5),
]


@pytest.fixture
def packed() -> PackedAdapter:
    generator = np.random.default_rng(0)
    updates = [random_rows(SITES[0], 5, generator, has_bias=True), random_scales(SITES[1], generator, of_input=True)]
    return pack(layout_of(*SITES), torch.bfloat16, updates)


def pack_everything(positions: Positions, reach_head: bool = True) -> PackedAdapter:
    """Beside rows and vectors a delta, rows of tokens and a prefix."""
    generator = np.random.default_rng(1)
    q, v = SITES
    return pack(
        msgspec.structs.replace(layout_of(*SITES), kv=KV),
        torch.bfloat16,
        [
            random_rows(q, 5, generator, has_bias=True),
            replace(random_scales(v, generator, of_input=True), delta=normal(generator, v.out_features, v.in_features)),
        ],
        tokens=random_tokens(generator, [2, 3, 128, 129], 24, reach_head),
        prefix=random_prefix(generator, KV, 9),
        positions=positions,
    )


@pytest.fixture
def path(tmp_path: Path, packed: PackedAdapter) -> Path:
    path = tmp_path / "key" / "a.rows"
    write_rows(path, packed)
    return path


def never_allocate(num_bytes: int) -> NDArray[np.uint8]:
    raise AssertionError(f"{num_bytes} bytes allocated for a file that is no good")


def assert_same(actual: PackedAdapter, expected: PackedAdapter) -> None:
    for field in fields(PackedAdapter):
        found, wanted = getattr(actual, field.name), getattr(expected, field.name)
        assert type(found) is type(wanted), field.name
        np.testing.assert_array_equal(found, wanted, field.name)
        assert getattr(found, "dtype", None) == getattr(wanted, "dtype", None), field.name


def test_reads_what_was_written(path: Path, packed: PackedAdapter) -> None:
    assert_same(read_rows(path, DIGEST), packed)
    assert [file.name for file in path.parent.iterdir()] == ["a.rows"]


@pytest.mark.parametrize("reach_head", [False, True])
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_deltas_tokens_prefixes_and_positions_survive(path: Path, positions: Positions, reach_head: bool) -> None:
    packed = pack_everything(positions, reach_head)
    assert packed.num_prefix_pages > 1
    assert min(len(packed.delta_offset), len(packed.token_id), packed.num_rows) > 0
    write_rows(path, packed)
    read = read_rows(path, DIGEST)
    assert_same(read, packed)
    assert read.positions == positions
    assert read.tokens_reach_head is reach_head


def test_every_field_is_kept() -> None:
    """A field that is added to a packed adapter and not to its file would come back as its default."""
    assert {"digest", "pages", *ARRAYS, *PLAIN} == {field.name for field in fields(PackedAdapter)}


def test_reads_straight_into_the_given_memory(path: Path, packed: PackedAdapter) -> None:
    given = list[NDArray[np.uint8]]()

    def allocate(num_bytes: int) -> NDArray[np.uint8]:
        given.append(np.full(num_bytes, 0xFF, np.uint8))
        return given[-1]

    read = read_rows(path, DIGEST, allocate)
    assert len(given) == 1
    assert np.shares_memory(read.pages, given[0])
    np.testing.assert_array_equal(given[0], packed.pages.reshape(-1))


def test_every_flipped_bit_is_noticed(path: Path) -> None:
    good = path.read_bytes()
    generator = random.Random(0)
    header_bits = range(8 * (PREFIX_BYTES + 64))  # few among all bits, and the ones that lead a reader astray
    flips = list(header_bits)[::4] + generator.sample(range(8 * len(good)), NUM_FLIPS - len(header_bits) // 4)
    assert len(flips) == NUM_FLIPS
    for bit in flips:
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(RowsDamaged):
            read_rows(path, DIGEST)
    path.write_bytes(good)
    read_rows(path, DIGEST)


def test_every_other_length_is_noticed(path: Path) -> None:
    good = path.read_bytes()
    for length in (0, 1, len(MAGIC), PREFIX_BYTES - 1, PREFIX_BYTES, PREFIX_BYTES + 10, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(RowsDamaged):
            read_rows(path, DIGEST, never_allocate)
    for more in (b"\0", good):
        path.write_bytes(good + more)
        with pytest.raises(RowsDamaged, match="longer or shorter"):
            read_rows(path, DIGEST, never_allocate)


def test_the_rows_of_another_adapter_and_no_file_are_refused(path: Path) -> None:
    with pytest.raises(RowsDamaged, match="is that of sha256:7777"):
        read_rows(path, "sha256:" + "8" * 64, never_allocate)
    with pytest.raises(RowsDamaged, match=r"b\.rows cannot be read: No such file"):
        read_rows(path.with_name("b.rows"), DIGEST)


def test_another_version_of_the_format_is_refused(path: Path) -> None:
    good = path.read_bytes()
    path.write_bytes(MAGIC[:-1] + bytes([MAGIC[-1] + 1]) + good[len(MAGIC) :])
    with pytest.raises(RowsDamaged, match="another version"):
        read_rows(path, DIGEST, never_allocate)


def test_no_length_is_believed_beyond_the_size_of_the_file(path: Path) -> None:
    """Not even with checksums that are right."""
    header = RowsHeader(
        digest=DIGEST,
        num_pages=1 << 40,
        page_bytes=1 << 20,
        used_bytes=0,
        tokens_reach_head=False,
        num_prefix_tokens=1 << 40,
        num_prefix_pages=1 << 40,
        positions=Positions(),
        arrays=(),
        pages_sha256=b"",
    )
    encoded = msgspec.msgpack.encode(header)
    checksum = sha256(encoded).digest()
    for claimed in (len(encoded), (1 << 8 * LENGTH_BYTES) - 1):
        path.write_bytes(MAGIC + claimed.to_bytes(LENGTH_BYTES, "little") + checksum + encoded)
        with pytest.raises(RowsDamaged):
            read_rows(path, DIGEST, never_allocate)


def test_a_failed_write_leaves_what_was_there(path: Path, packed: PackedAdapter) -> None:
    folder = path.with_name("taken.rows")
    folder.mkdir()
    with pytest.raises(OSError, match="directory"):
        write_rows(folder, packed)
    assert {file.name for file in path.parent.iterdir()} == {"a.rows", "taken.rows"}
