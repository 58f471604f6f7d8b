"""The store: names and versions, content that outlives its names while it is held, and no crash that tears it.

Run as a program, this file is the writer that the kill tests kill: `python test_store.py <store folder> <seed>`.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from msgspec.structs import replace

from adapter_samples import BASE, config_bytes, lora_config, lora_tensors, write_weights
from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.content_folder import open_content
from heddle_adapters.errors import (
    AdapterDamaged,
    AdapterIncompatible,
    AdapterNotFound,
    InvalidAdapterName,
    StoreUnusable,
)
from heddle_adapters.store import AdapterStore
from heddle_adapters.store_index import AdapterVersion
from heddle_adapters.tensor_file import WEIGHTS_FILE


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with AdapterStore(tmp_path / "store") as opened:
        yield opened


def put(store: AdapterStore, name: str, seed: int = 0, alpha: float = 4) -> AdapterVersion:
    """Uploads a LoRA that is different for each seed and alpha, as the server does."""
    config = config_bytes(lora_config(lora_alpha=alpha))
    with store.upload_folder() as folder:
        weights = write_weights(folder / WEIGHTS_FILE, lora_tensors(seed))
        return store.put(name, read_checkpoint(config, weights, BASE), config, weights)


def folders(path: Path) -> dict[str, set[str]]:
    return {name: {entry.name for entry in (path / name).iterdir()} for name in ("content", "incoming")}


def check_integrity(path: Path, versions: tuple[AdapterVersion, ...]) -> None:
    """Every name's content is whole, and nothing else lies about. For a store that was just opened."""
    digests = {version.digest for version in versions}
    for digest in digests:
        open_content(path, digest, BASE)
    assert folders(path) == {"content": {digest.removeprefix("sha256:") for digest in digests}, "incoming": set()}


# Names and versions


def test_put_is_found_again_and_survives_reopening(tmp_path: Path) -> None:
    before = int(time.time())
    with AdapterStore(tmp_path) as store:
        version = put(store, "pirate")
        assert store.resolve("pirate") == version
        assert store.list() == (version,)
    assert (version.version, version.method, version.max_rank, version.num_rows) == (1, "LoRA", 2, 4)
    assert before <= version.created_unix_seconds <= time.time()
    with AdapterStore(tmp_path) as store:
        assert store.resolve("pirate") == version
        assert version.size_bytes == store.content_paths(version.digest).weights.stat().st_size
        check_integrity(tmp_path, store.list())


def test_new_content_is_a_new_version_and_equal_content_is_not(store: AdapterStore) -> None:
    first, again, alpha, third = put(store, "a"), put(store, "a"), put(store, "a", alpha=5), put(store, "a", seed=1)
    assert again == first
    assert [alpha.version, third.version] == [2, 3]
    assert len({first.digest, alpha.digest, third.digest}) == 3
    assert store.resolve("a") == third
    assert store.versions("a") == (first, alpha, third)


def test_going_back_to_old_content_is_a_new_version(store: AdapterStore) -> None:
    first, _, back = put(store, "a"), put(store, "a", seed=1), put(store, "a")
    assert back.digest == first.digest
    assert back.version == 3


def test_version_numbers_outlive_a_deletion(store: AdapterStore) -> None:
    first = put(store, "a")
    assert store.delete("a") == first
    with pytest.raises(AdapterNotFound):
        store.versions("a")
    assert put(store, "a").version == 2


def test_content_of_two_names_is_stored_once(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        assert put(store, "a").digest == put(store, "b").digest
        assert len(folders(tmp_path)["content"]) == 1
        store.delete("a")
        assert store.collect() == ()
        store.delete("b")
        assert len(store.collect()) == 1
        assert folders(tmp_path) == {"content": set(), "incoming": set()}


def test_weights_from_elsewhere_are_copied(store: AdapterStore, tmp_path: Path) -> None:
    weights, config = write_weights(tmp_path / "mine.safetensors", lora_tensors()), config_bytes(lora_config())
    version = store.put("a", read_checkpoint(config, weights, BASE), config, weights)
    assert weights.exists()
    assert store.content_paths(version.digest).weights.read_bytes() == weights.read_bytes()


@pytest.mark.parametrize("name", ["a/b", "a,b", "../x", "", "base", "BASE", ".x", "a\n"])
def test_a_wrong_name_stores_nothing(store: AdapterStore, name: str, tmp_path: Path) -> None:
    before = folders(tmp_path / "store")
    with pytest.raises(InvalidAdapterName):
        put(store, name)
    assert store.list() == ()
    assert folders(tmp_path / "store") == before


def test_unknown_names_are_answered_with_near_ones(store: AdapterStore) -> None:
    put(store, "pirate")
    for ask in (store.resolve, store.acquire, store.delete, store.versions):
        with pytest.raises(AdapterNotFound, match=r"no adapter 'pirat'\. Did you mean pirate") as caught:
            ask("pirat")
        assert caught.value.nearest == ("pirate",)
        assert caught.value.param == "adapter"
    with pytest.raises(AdapterNotFound, match="Upload it first"):
        store.resolve("../../etc/passwd")


# Holding


def test_held_content_outlives_replacement_and_deletion(store: AdapterStore, tmp_path: Path) -> None:
    put(store, "a")
    old = store.acquire("a")
    store.hold(old.digest)
    new = put(store, "a", seed=1)
    store.delete("a")
    assert store.collect() == (new.digest,)
    open_content(tmp_path / "store", old.digest, BASE)
    assert not store.release(old.digest)
    assert store.collect() == ()
    assert store.release(old.digest)
    assert store.collect() == (old.digest,)
    with pytest.raises(AdapterNotFound):
        store.hold(old.digest)
    with pytest.raises(AdapterDamaged, match="upload it again"):
        open_content(tmp_path / "store", old.digest, BASE)


def test_releasing_current_content_leaves_it(store: AdapterStore) -> None:
    version = put(store, "a")
    assert store.acquire("a") == version
    assert not store.release(version.digest)
    assert store.collect() == ()


def test_content_put_again_before_it_is_collected_stays(store: AdapterStore, tmp_path: Path) -> None:
    put(store, "a")
    store.delete("a")
    version = put(store, "b")
    assert store.collect() == ()
    open_content(tmp_path / "store", version.digest, BASE)


def test_one_thread_replaces_and_collects_while_others_hold(tmp_path: Path) -> None:
    """Whoever acquired a version can read it until it lets go, whatever happens to the name meanwhile."""
    done = threading.Event()
    with AdapterStore(tmp_path) as store, ThreadPoolExecutor(4) as threads:
        put(store, "a")

        def read_for_ever() -> int:
            for count in itertools.count():
                if done.is_set():
                    return count
                version = store.acquire("a")
                assert open_content(tmp_path, version.digest, BASE).digest == version.digest
                store.release(version.digest)
            raise AssertionError

        readers = [threads.submit(read_for_ever) for _ in range(3)]
        gone: list[str] = []
        for seed in range(60):
            put(store, "a", seed=seed % 7)
            gone += store.collect()
        done.set()
        assert all(reader.result() for reader in readers)
        assert gone
        store.collect()
        check_integrity(tmp_path, store.list())


def test_three_threads_put_and_delete_the_same_names(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store, ThreadPoolExecutor(3) as threads:

        def churn(seed: int) -> None:
            source = random.Random(seed)
            for _ in range(15):
                put(store, source.choice("ab"), seed=source.randrange(3))
                try:
                    store.delete(source.choice("ab"))
                except AdapterNotFound:
                    store.collect()

        list(threads.map(churn, range(3)))
        store.collect()
        versions = store.list()
        check_integrity(tmp_path, versions)
    with AdapterStore(tmp_path) as store:
        assert store.list() == versions


# Damage


def test_every_flipped_bit_of_the_tensors_is_noticed(store: AdapterStore, tmp_path: Path) -> None:
    version = put(store, "a")
    weights = store.content_paths(version.digest).weights
    good = weights.read_bytes()
    source = random.Random(0)
    data_bytes = sum(tensor.nbytes for tensor in lora_tensors().values())
    for _ in range(100):
        data = bytearray(good)
        data[-1 - source.randrange(data_bytes)] ^= 1 << source.randrange(8)
        weights.write_bytes(data)
        with pytest.raises(AdapterDamaged, match=version.digest) as caught:
            open_content(tmp_path / "store", version.digest, BASE)
        assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize("damage", ["weights gone", "config gone", "weights cut", "config cut", "alpha changed"])
def test_damaged_content_is_refused_and_another_upload_repairs_it(
    store: AdapterStore, tmp_path: Path, damage: str
) -> None:
    version = put(store, "a")
    config, weights = store.content_paths(version.digest)
    path = weights if damage.startswith("weights") else config
    if damage.endswith("gone"):
        path.unlink()
    elif damage.endswith("cut"):
        path.write_bytes(path.read_bytes()[:-7])
    else:
        path.write_bytes(config_bytes(lora_config(lora_alpha=5)))
    with pytest.raises(AdapterDamaged):
        open_content(tmp_path / "store", version.digest, BASE)
    assert put(store, "a") == version
    assert open_content(tmp_path / "store", version.digest, BASE).digest == version.digest


def test_whole_content_on_another_base_is_not_called_damaged(store: AdapterStore, tmp_path: Path) -> None:
    version = put(store, "a")
    other = replace(BASE, sites=tuple(replace(site, in_features=24) for site in BASE.sites))
    with pytest.raises(AdapterIncompatible):
        open_content(tmp_path / "store", version.digest, other)


@pytest.mark.parametrize("digest", ["", "../../x", "sha256:../x", "sha256:" + "A" * 64, "sha256:" + "0" * 63 + "\n"])
def test_only_digests_become_paths(store: AdapterStore, digest: str) -> None:
    with pytest.raises(ValueError, match="not a digest"):
        store.content_paths(digest)


def test_a_failing_disk_leaves_the_name_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with AdapterStore(tmp_path) as store:
        version = put(store, "a")

        def fail(_: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(OSError, match="No space left"):
                put(store, "a", seed=1)
        assert store.list() == (version,)
        check_integrity(tmp_path, store.list())


def test_a_failing_index_leaves_the_name_as_it_was(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        version = put(store, "a")
        trigger = "CREATE TRIGGER full BEFORE INSERT ON versions BEGIN SELECT raise(ABORT, 'disk is full'); END"
        with sqlite3.connect(tmp_path / "index.sqlite3") as other:
            other.execute(trigger)
        other.close()
        with pytest.raises(sqlite3.Error, match="disk is full"):
            put(store, "a", seed=1)
        assert store.list() == store.versions("a") == (version,)
        assert len(store.collect()) == 1
        check_integrity(tmp_path, store.list())


# Opening


def test_opening_clears_what_a_crash_left_and_nothing_else(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        put(store, "a")
        versions = store.list()
    torn, unnamed = tmp_path / "incoming" / ("ab" * 16), tmp_path / "content" / ("ab" * 32)
    strangers = [tmp_path / "incoming" / "notes.txt", tmp_path / "content" / "notes.txt"]
    for folder in (torn, unnamed):
        folder.mkdir()
        (folder / WEIGHTS_FILE).write_bytes(b"torn")
    for stranger in strangers:
        stranger.write_text("not ours")
    with AdapterStore(tmp_path) as store:
        assert store.list() == versions
        assert not torn.exists()
        assert not unnamed.exists()
        for stranger in strangers:
            stranger.unlink()
        check_integrity(tmp_path, versions)


def test_a_store_has_one_owner(tmp_path: Path) -> None:
    with AdapterStore(tmp_path), pytest.raises(StoreUnusable, match="Another server"):
        AdapterStore(tmp_path)
    AdapterStore(tmp_path).close()


def test_an_index_of_the_future_is_not_touched(tmp_path: Path) -> None:
    AdapterStore(tmp_path).close()
    connection = sqlite3.connect(tmp_path / "index.sqlite3")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreUnusable, match="version 99"):
        AdapterStore(tmp_path)


def test_opening_a_thousand_adapters_is_fast(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        put(store, "a")
    connection = sqlite3.connect(tmp_path / "index.sqlite3")
    columns = ", ".join(row[1] for row in connection.execute("PRAGMA table_info(versions)"))
    for number in range(1, 1000):
        copied = columns.replace("name", f"'a{number}'")
        connection.execute(f"INSERT INTO versions ({columns}) SELECT {copied} FROM versions WHERE name = 'a'")
    connection.commit()
    connection.close()
    started = time.perf_counter()
    with AdapterStore(tmp_path) as store:
        assert time.perf_counter() - started < 1
        assert len(store.list()) == 1000
        started = time.perf_counter()
        with pytest.raises(AdapterNotFound):
            store.resolve("a1000x")
        assert time.perf_counter() - started < 0.2


# Killing: a writer says what it is about to do and what was acknowledged; whatever it was killed in, a name then
# means the last acknowledged content or the one being written, whole.

NAMES = ("one", "two", "three")


def write_for_ever(path: Path, seed: int) -> None:
    source = random.Random(seed)
    with AdapterStore(path) as store:
        for number in itertools.count():
            name = source.choice(NAMES)
            if number % 4 == 3 and any(version.name == name for version in store.list()):
                print("begin", name, "-", flush=True)
                store.delete(name)
            else:
                alpha = source.random()
                print("begin", name, alpha, flush=True)
                put(store, name, alpha=alpha)
            print("done", flush=True)
            if number % 3 == 0:
                store.collect()


def kill_writers(path: Path, num_kills: int) -> None:
    source = random.Random(num_kills)
    acknowledged = dict.fromkeys(NAMES, "-")
    num_acknowledged = 0
    for seed in range(num_kills):
        lines = killed_writer(path, seed, delay_seconds=source.uniform(0, 0.25))
        possible = {name: {state} for name, state in acknowledged.items()}
        for begin, end in itertools.zip_longest(lines[::2], lines[1::2]):
            _, name, state = begin.split()
            possible[name] = {state} if end else possible[name] | {state}
            num_acknowledged += end is not None
        with AdapterStore(path) as store:
            check_integrity(path, store.list())
            found = {version.name: str(alpha_of(path, version)) for version in store.list()}
        for name in NAMES:
            acknowledged[name] = found.get(name, "-")
            assert acknowledged[name] in possible[name]
    assert num_acknowledged > 2 * num_kills


def killed_writer(path: Path, seed: int, delay_seconds: float) -> list[str]:
    """The complete lines that a writer printed before it was killed, `delay_seconds` after its first."""
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(path), str(seed)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        first = writer.stdout.readline()
        time.sleep(delay_seconds)
        writer.send_signal(signal.SIGKILL)
        text = first + writer.stdout.read()
    return text[: text.rfind("\n") + 1].splitlines()


def alpha_of(path: Path, version: AdapterVersion) -> object:
    return open_content(path, version.digest, BASE).content.config.fields["lora_alpha"]


def test_killed_writers_tear_and_lose_nothing(tmp_path: Path) -> None:
    kill_writers(tmp_path, num_kills=10)


@pytest.mark.slow
def test_many_killed_writers_tear_and_lose_nothing(tmp_path: Path) -> None:
    kill_writers(tmp_path, num_kills=50)


if __name__ == "__main__":
    write_for_ever(Path(sys.argv[1]), int(sys.argv[2]))
