"""Killed writers, flipped bits and a damaged index: no acknowledged change is lost, and nothing wrong is served."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import store_writer
from adapter_samples import (
    BASE,
    DOWN,
    NoBase,
    Q,
    V,
    config_bytes,
    lora_config,
    lora_tensors,
    tensor_name,
    write_weights,
)
from heddle_adapters.canonical import CompiledAdapter, Floats, Rows
from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.content_folder import open_content
from heddle_adapters.errors import AdapterDamaged, InvalidAdapter, StoreUnusable
from heddle_adapters.store import AdapterStore
from heddle_adapters.tensor_file import WEIGHTS_FILE
from store_writer import KEEP_VERSIONS, NAMES, Model, ModelName

# Kills. Whatever a writer was killed in, the store then holds all that was acknowledged, with or without the one
# change that was not.


class Writers:
    """The program that forks a writer for each kill."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, path: Path, seed: int, seconds: float) -> list[str]:
        """What a writer said before it was killed, `seconds` after it began."""
        commands, lines = self._process.stdin, self._process.stdout
        assert commands is not None
        assert lines is not None
        commands.write(f"{seed} {path}\n")
        commands.flush()
        start = lines.readline()
        assert start.startswith("writer "), start
        time.sleep(seconds)
        os.kill(int(start.split()[1]), signal.SIGKILL)
        said = []
        while (line := lines.readline()) != "ended\n":
            assert line, "the writers' program has ended"
            said.append(line.rstrip("\n"))
        return said


@contextmanager
def start_writers() -> Iterator[Writers]:
    with subprocess.Popen(
        [sys.executable, store_writer.__file__],
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Writers(process)


def kill_writers(path: Path, num_kills: int) -> None:
    source = random.Random(num_kills)
    model: Model = {name: ModelName() for name in NAMES}
    num_acknowledged = num_unfinished = 0
    with start_writers() as writers:
        for seed in range(num_kills):
            said = writers.run(path, seed, seconds=source.uniform(0, 0.2))
            possible = [model]
            for line in said:
                if line == "done":
                    possible = possible[1:]
                else:
                    change = json.loads(line.removeprefix("begin "))
                    possible = [possible[0], store_writer.after(possible[0], change)]
            num_acknowledged += said.count("done")
            num_unfinished += len(possible) - 1
            model = state_on_disk(path, possible)
    assert num_acknowledged > num_kills
    assert num_unfinished > num_kills / 2


def state_on_disk(path: Path, possible: list[Model]) -> Model:
    """The one of the possible states that the store holds, with every content whole and no other content."""
    with AdapterStore(path, KEEP_VERSIONS) as store:
        records = store.list()
    digests = {version.digest for record in records for version in record.versions}
    assert {entry.name for entry in (path / "content").iterdir()} == {digest[7:] for digest in digests}
    assert not list((path / "incoming").iterdir())
    alphas = {digest: open_content(path, digest, BASE).content.config.fields["lora_alpha"] for digest in digests}
    found = {
        record.name: (
            {version.version: alphas[version.digest] for version in record.versions},
            dict(record.aliases),
            record.description,
        )
        for record in records
    }
    for model in possible:
        if found == {
            name: (state.alphas, state.aliases, state.description) for name, state in model.items() if state.alphas
        }:
            return model
    raise AssertionError(f"{found} is none of {possible}")


def test_killed_writers_tear_and_lose_nothing(tmp_path: Path) -> None:
    kill_writers(tmp_path, num_kills=50)


@pytest.mark.slow
def test_many_killed_writers_tear_and_lose_nothing(tmp_path: Path) -> None:
    kill_writers(tmp_path, num_kills=1000)


# Flipped bits

Tensors = dict[str, Floats]


def biased_lora() -> tuple[bytes, Tensors]:
    config = lora_config(lora_bias=True, rank_pattern={"v_proj": 1}, alpha_pattern={V: 7}, use_rslora=True)
    random_numbers = np.random.default_rng(1)
    shapes = {Q: {"A": (2, 8), "B": (8, 2)}, V: {"A": (1, 8), "B": (4, 1)}}
    tensors = {
        tensor_name(site, f"lora_{part}.weight"): random_numbers.standard_normal(shape).astype(np.float32)
        for site, parts in shapes.items()
        for part, shape in parts.items()
    }
    tensors |= {tensor_name(site, "lora_B.bias"): np.full(size, 0.25, np.float32) for site, size in ((Q, 8), (V, 4))}
    return config_bytes(config), tensors


def channel_vectors() -> tuple[bytes, Tensors]:
    config = {"peft_type": "IA3", "target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    tensors = {tensor_name(Q, "ia3_l"): np.full((8, 1), 1.5), tensor_name(DOWN, "ia3_l"): np.full((1, 16), 0.5)}
    return config_bytes(config), {name: values.astype(np.float32) for name, values in tensors.items()}


def half_precision() -> tuple[bytes, Tensors]:
    return config_bytes(lora_config()), {name: values.astype(np.float16) for name, values in lora_tensors(2).items()}


SAMPLES: tuple[Callable[[], tuple[bytes, Tensors]], ...] = (biased_lora, channel_vectors, half_precision)


def flip_bits(path: Path, num_flips: int) -> None:
    """Each flip is one bit of one stored file; what is then opened must be refused or be what was stored."""
    source = random.Random(num_flips)
    with AdapterStore(path) as store:
        stored = []
        for number, sample in enumerate(SAMPLES):
            config, tensors = sample()
            with store.upload_folder() as folder:
                weights = write_weights(folder / WEIGHTS_FILE, tensors)
                version = store.put(f"sample-{number}", read_checkpoint(config, weights, BASE), config, weights)
            stored.append((version.digest, open_content(path, version.digest, BASE).compile(NoBase())))
        num_refused = 0
        for _ in range(num_flips):
            digest, compiled = source.choice(stored)
            file = source.choice(store.content_paths(digest))
            good = file.read_bytes()
            bad = bytearray(good)
            bad[source.randrange(len(bad))] ^= 1 << source.randrange(8)
            file.write_bytes(bad)
            served = compiled_if_sound(path, digest)
            if served is None:
                num_refused += 1
            else:
                assert_same(served, compiled)
            file.write_bytes(good)
    assert num_refused > num_flips / 2


def compiled_if_sound(path: Path, digest: str) -> CompiledAdapter | None:
    try:
        return open_content(path, digest, BASE).compile(NoBase())
    except (AdapterDamaged, InvalidAdapter):
        return None


def assert_same(found: CompiledAdapter, expected: CompiledAdapter) -> None:
    assert found.digest == expected.digest
    assert [update.site for update in found.updates] == [update.site for update in expected.updates]
    for update, other in zip(found.updates, expected.updates, strict=True):
        assert update.scales_base_bias == other.scales_base_bias
        assert (update.rows is None) == (other.rows is None)
        if update.rows is not None and other.rows is not None:
            for field in fields(Rows):
                one, another = getattr(update.rows, field.name), getattr(other.rows, field.name)
                np.testing.assert_array_equal(one, another, strict=True)
        for name in ("in_scale", "out_scale", "bias", "delta"):
            np.testing.assert_array_equal(getattr(update, name), getattr(other, name), strict=True)


def test_flipped_bits_are_never_served(tmp_path: Path) -> None:
    flip_bits(tmp_path, num_flips=100)


@pytest.mark.slow
def test_many_flipped_bits_are_never_served(tmp_path: Path) -> None:
    flip_bits(tmp_path, num_flips=1000)


# The index


def fill(path: Path, num_names: int) -> None:
    config = config_bytes(lora_config())
    with AdapterStore(path) as store:
        for number in range(num_names):
            with store.upload_folder() as folder:
                weights = write_weights(folder / WEIGHTS_FILE, lora_tensors(number))
                store.put(f"sample-{number}", read_checkpoint(config, weights, BASE), config, weights)


def contents(path: Path) -> set[str]:
    return {entry.name for entry in (path / "content").iterdir()}


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "garbage", "zeroed table", "zeroed look-up"])
def test_a_damaged_index_is_told_and_costs_no_content(tmp_path: Path, damage: str) -> None:
    fill(tmp_path, num_names=3)
    before = contents(tmp_path)
    index = tmp_path / "index.sqlite3"
    good = index.read_bytes()
    damaged = {
        "empty": b"",
        "cut": good[: len(good) // 2],
        "garbage": random.Random(0).randbytes(len(good)),
        "zeroed table": without_page_of(good, index, "versions"),
        "zeroed look-up": without_page_of(good, index, "sqlite_autoindex_names_1"),
    }
    index.unlink() if damage == "gone" else index.write_bytes(damaged[damage])
    for _ in range(2):  # the first attempt must not make the second one succeed
        with pytest.raises(StoreUnusable, match=r"index\.sqlite3") as caught:
            AdapterStore(tmp_path)
        assert str(tmp_path) not in caught.value.message
    assert contents(tmp_path) == before
    for file in tmp_path.glob("index.sqlite3*"):
        file.unlink()
    index.write_bytes(good)
    with AdapterStore(tmp_path) as store:  # the folder was let go of, and the copy is as good as it was
        assert store.list()[0].num_versions == 1


def without_page_of(good: bytes, index: Path, name: str) -> bytes:
    """The database with zeros where a table or look-up begins."""
    connection = sqlite3.connect(index)
    ((page,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchall()
    ((size,),) = connection.execute("PRAGMA page_size").fetchall()
    connection.close()
    return good[: (page - 1) * size] + bytes(size) + good[page * size :]


UPDATES = {
    "a digest that is none": "UPDATE versions SET digest = '../../x' WHERE name = 'sample-0'",
    "an alias of no version": "INSERT INTO aliases VALUES ('local', 'sample-0', 'prod', 9)",
    "an alias of no name": "INSERT INTO aliases VALUES ('local', 'nobody', 'prod', 1)",
    "a version of no name": "DELETE FROM names WHERE name = 'sample-0'",
    "a name without versions": "DELETE FROM versions WHERE name = 'sample-0'",
    "tags that are no list": "UPDATE names SET tags = '['",
    "a table too few": "DROP TABLE quarantined",
}


@pytest.mark.parametrize("damage", UPDATES)
def test_an_index_that_contradicts_itself_is_told(tmp_path: Path, damage: str) -> None:
    fill(tmp_path, num_names=2)
    before = contents(tmp_path)
    connection = sqlite3.connect(tmp_path / "index.sqlite3")
    with connection:
        connection.execute(UPDATES[damage])
    connection.close()
    with pytest.raises(StoreUnusable, match=r"index\.sqlite3 cannot be read"):
        AdapterStore(tmp_path)
    assert contents(tmp_path) == before


def test_flipped_bits_of_the_index_are_told_or_harm_one_name(tmp_path: Path) -> None:
    """SQLite has no checksums, so a flip may change a value; what is served then still has to have its digest."""
    fill(tmp_path, num_names=3)
    index = tmp_path / "index.sqlite3"
    good = index.read_bytes()
    source = random.Random(0)
    num_refused = 0
    for _ in range(60):
        bad = bytearray(good)
        bad[source.randrange(len(bad))] ^= 1 << source.randrange(8)
        for file in tmp_path.glob("index.sqlite3*"):
            file.unlink()
        index.write_bytes(bad)
        try:
            with AdapterStore(tmp_path) as store:
                for record in store.list():
                    try:
                        assert open_content(tmp_path, record.latest.digest, BASE).digest == record.latest.digest
                    except AdapterDamaged:
                        num_refused += 1
        except StoreUnusable:
            num_refused += 1
    assert num_refused
