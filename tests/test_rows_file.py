"""Rows files: read back bit for bit, or refused."""

from __future__ import annotations

import random
from dataclasses import fields
from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from heddle_adapters.base_layout import Site
from heddle_adapters.packed_adapter import PackedAdapter
from heddle_adapters.rows_file import LENGTH_BYTES, MAGIC, PREFIX_BYTES, RowsDamaged, RowsHeader, read_rows, write_rows
from row_samples import DIGEST, layout_of, pack, random_rows, random_scales

NUM_FLIPS = 500

SITES = (Site("q", "linear", 24, 40, has_bias=False), Site("v", "linear", 300, 16, has_bias=False))


@pytest.fixture
def packed() -> PackedAdapter:
    generator = np.random.default_rng(0)
    updates = [random_rows(SITES[0], 5, generator, has_bias=True), random_scales(SITES[1], generator, of_input=True)]
    return pack(layout_of(*SITES), torch.bfloat16, updates)


@pytest.fixture
def path(tmp_path: Path, packed: PackedAdapter) -> Path:
    path = tmp_path / "key" / "a.rows"
    write_rows(path, packed)
    return path


def never_allocate(num_bytes: int) -> NDArray[np.uint8]:
    raise AssertionError(f"{num_bytes} bytes allocated for a file that is no good")


def test_reads_what_was_written(path: Path, packed: PackedAdapter) -> None:
    read = read_rows(path, DIGEST)
    for field in fields(PackedAdapter):
        expected, actual = getattr(packed, field.name), getattr(read, field.name)
        np.testing.assert_array_equal(actual, expected)
        assert getattr(actual, "dtype", None) == getattr(expected, "dtype", None), field.name
    assert [file.name for file in path.parent.iterdir()] == ["a.rows"]


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
    header = RowsHeader(DIGEST, num_pages=1 << 40, page_bytes=1 << 20, used_bytes=0, arrays=(), pages_sha256=b"")
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
