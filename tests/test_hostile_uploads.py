"""Every hostile upload is refused with a reason, quickly, in little memory, and changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import safetensors

from adapter_samples import BASE, NoBase
from heddle_adapters.adapter_config import AdapterConfig
from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.errors import InvalidAdapter
from heddle_adapters.method import method_of
from heddle_adapters.tensor_file import TensorFile
from hostile_case import Upload, file_bytes, honest
from hostile_uploads import hostile_uploads
from odd_uploads import odd_uploads

CASES = hostile_uploads()
ODD = odd_uploads()
MAX_GROWTH_BYTES = 64 * 2**20
MAX_MESSAGE_CHARS = 8 * 1024
MAX_SECONDS = 2.0


class Outcomes(NamedTuple):
    """What the reader process said to every case."""

    by_case: dict[str, dict[str, Any]]
    contents: dict[str, str]  # digest of an upload's bytes, by case
    growth_bytes: int


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcomes]:
    folder = tmp_path_factory.mktemp("hostile")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "hostile_reader"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None

        def read(upload: Upload) -> dict[str, Any]:
            paths = folder / "config", folder / "weights"
            for path, content in zip(paths, upload, strict=True):
                path.write_bytes(content)
            print(json.dumps([str(path) for path in paths]), file=reader.stdin, flush=True)
            assert reader.stdout is not None
            outcome: dict[str, Any] = json.loads(reader.stdout.readline())
            return outcome

        before = read(honest())
        assert before["error"] is None
        by_case, contents = {}, {}
        for name, case in CASES.items():
            upload = case.make()
            contents[name] = hashlib.sha256(len(upload.config).to_bytes(8) + b"".join(upload)).hexdigest()
            by_case[name] = read(upload)
        after = read(honest())
        assert after["error"] is None
        yield Outcomes(by_case, contents, after["peak_bytes"] - before["peak_bytes"])
        reader.stdin.close()


@pytest.mark.parametrize("name", CASES)
def test_is_refused_with_a_reason(outcomes: Outcomes, name: str) -> None:
    outcome = outcomes.by_case[name]
    assert outcome["error"] in ("InvalidAdapter", "AdapterIncompatible")
    assert CASES[name].reason in outcome["message"]
    assert outcome["param"] == CASES[name].param
    assert len(outcome["message"]) < MAX_MESSAGE_CHARS
    assert outcome["message"].isprintable()
    assert outcome["seconds"] < MAX_SECONDS


def test_no_two_cases_are_one(outcomes: Outcomes) -> None:
    assert len(set(outcomes.contents.values())) == len(CASES) >= 300


def test_memory_is_bounded(outcomes: Outcomes) -> None:
    assert outcomes.growth_bytes <= MAX_GROWTH_BYTES


@pytest.mark.parametrize("name", ODD)
def test_what_only_looks_hostile_is_taken(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(ODD[name].weights)
    checkpoint = read_checkpoint(ODD[name].config, path, BASE)
    assert {update.site for update in checkpoint.compile(NoBase()).updates} == set(checkpoint.sites)


# Fuzzing: honest bytes, damaged at random.

Result = TypeVar("Result")
Mutation = Callable[[bytearray, random.Random], None]


def _flip_bits(data: bytearray, source: random.Random) -> None:
    for _ in range(source.randrange(1, 9)):
        data[source.randrange(len(data))] ^= 1 << source.randrange(8)


def _insert(data: bytearray, source: random.Random) -> None:
    at = source.randrange(len(data) + 1)
    data[at:at] = source.choice((source.randbytes(source.randrange(1, 9)), bytes([source.choice(data)])))


def _delete(data: bytearray, source: random.Random) -> None:
    at = source.randrange(len(data))
    del data[at : at + source.choice((1, 1, 2, 8, 64))]


def _splice(data: bytearray, source: random.Random) -> None:
    start, at = source.randrange(len(data)), source.randrange(len(data))
    data[at : at + source.randrange(16)] = data[start : start + source.randrange(1, 64)]


def _change_digit(data: bytearray, source: random.Random) -> None:
    positions = [position for position, byte in enumerate(data) if chr(byte) in "0123456789"]
    if positions:
        data[source.choice(positions)] = ord(source.choice("0123456789-.eE"))


def _exchange_words(data: bytearray, source: random.Random) -> None:
    words = [b"F32", b"F16", b"BF16", b'"shape"', b'"dtype"', b"lora_A", b"lora_B", b"[", b"]", b"{", b"}", b",", b":"]
    old, new = source.sample(words, k=2)
    data[:] = data.replace(old, new, 1)


MUTATIONS: tuple[Mutation, ...] = (_flip_bits, _insert, _delete, _splice, _change_digit, _exchange_words)


def fuzzed_files(count: int, seed: int) -> Iterator[bytes]:
    """Damaged weights files: as a whole, or in the header alone with the length put right."""
    source = random.Random(seed)
    small = {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    small["u"] = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]}
    originals = [honest().weights, file_bytes(small, bytes(range(16)))]
    for _ in range(count):
        original = source.choice(originals)
        begin = 8 + int.from_bytes(original[:8], "little")
        is_header = source.random() < 0.6
        data = bytearray(original[8:begin] if is_header else original)
        for mutate in source.choices(MUTATIONS, k=source.choice((1, 1, 1, 2, 3))):
            if data:
                mutate(data, source)
        yield file_bytes(bytes(data), original[begin:]) if is_header else bytes(data)


def read_or_refused(read: Callable[[], Result]) -> Result | None:
    """What was read, or None where that was refused as it should be; any other error is a failure."""
    try:
        return read()
    except InvalidAdapter as error:
        message = error.message
    assert 0 < len(message) < MAX_MESSAGE_CHARS
    assert message.isprintable()
    return None


def assert_only_sound_files_are_read(count: int, seed: int, path: Path) -> None:
    num_read = 0
    for data in fuzzed_files(count, seed):
        path.write_bytes(data)
        file = read_or_refused(lambda: TensorFile(path))
        if file is None:
            continue
        file.first_non_finite()
        ours = {name: (tensor.dtype, [*tensor.shape], file.bytes_of(name)) for name, tensor in file.tensors.items()}
        for name, tensor in file.tensors.items():
            values = file.read_integers(name) if tensor.is_integer else file.read(name)
            assert values.shape == tensor.shape
        num_read += 1
        try:
            theirs = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
        except safetensors.SafetensorError:
            continue  # the library's JSON reader knows no -0 and no lone surrogates
        assert ours == {name: (entry["dtype"], entry["shape"], entry["data"]) for name, entry in theirs.items()}
    assert 0 < num_read < count // 2


def test_damaged_files_are_refused_or_read_as_the_library_reads_them(tmp_path: Path) -> None:
    assert_only_sound_files_are_read(3_000, 0, tmp_path / "weights")


@pytest.mark.slow
def test_a_hundred_thousand_damaged_files(tmp_path: Path) -> None:
    assert_only_sound_files_are_read(100_000, 1, tmp_path / "weights")


def assert_configs_are_read_or_refused(count: int, seed: int) -> None:
    source = random.Random(seed)
    num_read = 0
    for _ in range(count):
        data = bytearray(honest().config[:-1] + b', "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"^v_proj$": 1e1}}')
        for mutate in source.choices(MUTATIONS, k=source.choice((1, 1, 1, 2, 3))):
            mutate(data, source)
        num_read += read_or_refused(lambda: method_of(AdapterConfig.parse(bytes(data)))) is not None  # noqa: B023
    assert 0 < num_read < count


def test_damaged_configs_are_read_or_refused() -> None:
    assert_configs_are_read_or_refused(3_000, 0)


@pytest.mark.slow
def test_a_hundred_thousand_damaged_configs() -> None:
    assert_configs_are_read_or_refused(100_000, 1)
