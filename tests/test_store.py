"""The store: names, versions and aliases, what is said about them, and content that outlives its names while held."""

from __future__ import annotations

import itertools
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace as changed
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from adapter_samples import BASE, Q, config_bytes, lora_config, lora_tensors, tensor_name, write_weights
from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.content_folder import open_content
from heddle_adapters.errors import (
    AdapterDamaged,
    AdapterError,
    AdapterIncompatible,
    AdapterNotFound,
    InvalidAdapterName,
    StoreUnusable,
)
from heddle_adapters.positions import Positions
from heddle_adapters.store import AdapterStore
from heddle_adapters.store_index import MIGRATIONS, AdapterDetails, AdapterRecord, AdapterVersion, StoreIndex
from heddle_adapters.tensor_file import WEIGHTS_FILE


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with AdapterStore(tmp_path / "store") as opened:
        yield opened


def put(
    store: AdapterStore, name: str, seed: int = 0, alpha: float = 4, details: AdapterDetails | None = None
) -> AdapterVersion:
    """Uploads a LoRA that is different for each seed and alpha, as the server does."""
    config = config_bytes(lora_config(lora_alpha=alpha))
    with store.upload_folder() as folder:
        weights = write_weights(folder / WEIGHTS_FILE, lora_tensors(seed))
        return store.put(name, read_checkpoint(config, weights, BASE), config, weights, details or AdapterDetails())


def folders(path: Path) -> dict[str, set[str]]:
    return {name: {entry.name for entry in (path / name).iterdir()} for name in ("content", "incoming")}


def check_integrity(path: Path, store: AdapterStore) -> None:
    """Every version's content is whole, and nothing else lies about. For a store that has collected."""
    digests = {version.digest for record in store.list() for version in record.versions}
    for digest in digests:
        open_content(path, digest, BASE)
    assert folders(path) == {"content": {digest.removeprefix("sha256:") for digest in digests}, "incoming": set()}


# Names and versions


def test_put_is_found_again_and_survives_reopening(tmp_path: Path) -> None:
    before = int(time.time())
    with AdapterStore(tmp_path) as store:
        version = put(store, "team/pirate")
        assert store.resolve("team/pirate") == version
        records = store.list()
        assert [record.latest for record in records] == [version]
    assert (version.version, version.method, version.max_rank, version.num_rows) == (1, "LoRA", 2, 4)
    assert (version.num_row_values, version.num_vector_values, version.combination) == (2 * 16 + 2 * 12, 0, "sum")
    assert version.estimate_bytes(row_dtype_bytes=2) == 112
    assert before <= version.created_unix_seconds <= time.time()
    with AdapterStore(tmp_path) as store:
        assert store.resolve("team/pirate") == version
        assert store.list() == records
        assert version.size_bytes == store.content_paths(version.digest).weights.stat().st_size
        check_integrity(tmp_path, store)


def test_new_content_is_a_new_version_and_equal_content_is_not(store: AdapterStore) -> None:
    first, again, alpha, third = put(store, "a"), put(store, "a"), put(store, "a", alpha=5), put(store, "a", seed=1)
    assert again == first
    assert [alpha.version, third.version] == [2, 3]
    assert len({first.digest, alpha.digest, third.digest}) == 3
    assert store.resolve("a") == third
    assert store.versions("a") == (first, alpha, third)
    assert store.record("a").latest == third
    assert store.record("a").num_versions == 3


def test_old_versions_stay_whole_until_they_are_deleted(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        versions = tuple(put(store, "a", seed=seed) for seed in range(3))
        assert store.collect() == ()
        check_integrity(tmp_path, store)
    with AdapterStore(tmp_path) as store:
        assert store.versions("a") == versions
        check_integrity(tmp_path, store)


def test_going_back_to_old_content_is_a_new_version(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        first, _, back = put(store, "a"), put(store, "a", seed=1), put(store, "a")
        assert back.digest == first.digest
        assert back.version == 3
        assert store.resolve(f"a@{first.digest}") == back
        store.delete("a@1")
        assert store.collect() == ()
        check_integrity(tmp_path, store)


def test_every_selector_means_its_version(store: AdapterStore) -> None:
    first, second = put(store, "team/a"), put(store, "team/a", seed=1)
    store.set_alias("team/a", "prod", "1")
    for selector, version in {
        "": second,
        "@latest": second,
        "@2": second,
        f"@{second.digest}": second,
        "@1": first,
        "@prod": first,
        f"@{first.digest}": first,
        f"@{first.version}": first,
    }.items():
        assert store.resolve(f"team/a{selector}") == version
        assert store.acquire(f"team/a{selector}") == version
        store.release(version.digest)
    assert store.resolve(first.reference) == first


def test_a_digest_is_found_under_its_own_name_only(store: AdapterStore) -> None:
    version = put(store, "a")
    put(store, "b", seed=1)
    with pytest.raises(AdapterNotFound):
        store.resolve(f"b@{version.digest}")


def test_unknown_names_are_answered_with_near_ones(store: AdapterStore) -> None:
    put(store, "pirate")
    for ask in (store.resolve, store.acquire, store.delete, store.versions, store.record):
        with pytest.raises(AdapterNotFound, match=r"no adapter 'pirat'\. Did you mean pirate") as caught:
            ask("pirat")
        assert caught.value.nearest == ("pirate",)
        assert caught.value.param == "adapter"
    for malformed in ("../../etc/passwd", "", "@", "base", "a,b", "x" * 10_000, "a/b/c"):
        with pytest.raises(AdapterNotFound, match="Upload it first"):
            store.acquire(malformed)


@pytest.mark.parametrize("selector", ["7", "01", "0", "prd", "sha256:" + "0" * 64, "sha256:0", "", "prod@1", "9" * 30])
def test_unknown_selectors_are_answered_with_near_ones(store: AdapterStore, selector: str) -> None:
    put(store, "sql", details=AdapterDetails(alias="prod"))
    with pytest.raises(AdapterNotFound, match="The adapter sql has no version or alias") as caught:
        store.resolve(f"sql@{selector}")
    assert caught.value.nearest == (("sql@prod",) if selector == "prd" else ("sql@1",))


@pytest.mark.parametrize("name", ["a/b/c", "a,b", "../x", "", "base", "BASE", ".x", "a\n", "team/versions", "a@1"])
def test_a_wrong_name_stores_nothing(store: AdapterStore, name: str, tmp_path: Path) -> None:
    before = folders(tmp_path / "store")
    with pytest.raises(InvalidAdapterName):
        put(store, name)
    assert store.list() == ()
    assert folders(tmp_path / "store") == before


def test_weights_from_elsewhere_are_copied(store: AdapterStore, tmp_path: Path) -> None:
    weights, config = write_weights(tmp_path / "mine.safetensors", lora_tensors()), config_bytes(lora_config())
    version = store.put("a", read_checkpoint(config, weights, BASE), config, weights)
    assert weights.exists()
    assert store.content_paths(version.digest).weights.read_bytes() == weights.read_bytes()


def test_names_of_a_digest(store: AdapterStore) -> None:
    digest = put(store, "b").digest
    put(store, "b", seed=1)
    put(store, "b")
    put(store, "a")
    assert store.names_of(digest) == ("a@1", "b@1", "b@3")
    store.delete("b")
    assert store.names_of(digest) == ("a@1",)
    assert store.names_of("sha256:" + "0" * 64) == ()


# Deletion


def test_deleting_a_name_deletes_all_its_versions_and_what_was_said(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        versions = (put(store, "a"), put(store, "a", seed=1, details=AdapterDetails("prod", ("x",), "text", True)))
        assert store.delete("a") == versions
        assert store.list() == ()
        assert store.pinned() == ()
        with pytest.raises(AdapterNotFound):
            store.versions("a")
        assert set(store.collect()) == {version.digest for version in versions}
        again = put(store, "a")
        assert again.version == 3  # numbers outlive a deletion
    with AdapterStore(tmp_path) as store:
        record = store.record("a")
        assert record.versions == (again,)
        assert (dict(record.aliases), record.tags, record.description, record.is_pinned) == ({}, (), "", False)


def test_deleting_one_version_leaves_the_others(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        first, second, third = (put(store, "a", seed=seed) for seed in range(3))
        assert store.delete("a@2") == (second,)
        assert store.collect() == (second.digest,)
        assert store.delete(f"a@{third.digest}") == (third,)
        assert store.resolve("a") == first
        with pytest.raises(AdapterNotFound):
            store.delete("a@3")
        assert put(store, "a", seed=5).version == 4
        assert store.delete("a@1") == (first,)
    with AdapterStore(tmp_path) as store:
        assert [version.version for version in store.versions("a")] == [4]
        store.delete("a@4")
        assert store.list() == ()


@pytest.mark.parametrize("reference", ["sql@prod", "sql@latest"])
def test_what_may_move_is_not_deleted_and_the_error_says_what_to_do(store: AdapterStore, reference: str) -> None:
    put(store, "sql", details=AdapterDetails(alias="prod"))
    with pytest.raises(AdapterError, match=f"{reference} may mean another version soon: delete sql@1, which") as caught:
        store.delete(reference)
    assert caught.value.param == "adapter"
    assert len(store.versions("sql")) == 1


def test_an_aliased_version_is_not_deleted_alone(store: AdapterStore) -> None:
    version = put(store, "sql", details=AdapterDetails(alias="prod"))
    put(store, "sql", seed=1)
    for reference in ("sql@1", f"sql@{version.digest}"):
        with pytest.raises(AdapterError, match="sql@1 still has the alias prod; move or remove it first"):
            store.delete(reference)
    assert store.resolve("sql@prod") == version
    store.remove_alias("sql", "prod")
    assert store.delete("sql@1") == (version,)


def test_content_of_two_names_is_stored_once(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        assert put(store, "a").digest == put(store, "b").digest
        assert len(folders(tmp_path)["content"]) == 1
        store.delete("a")
        assert store.collect() == ()
        store.delete("b")
        assert len(store.collect()) == 1
        assert folders(tmp_path) == {"content": set(), "incoming": set()}


def test_keep_versions_drops_old_ones_that_have_no_alias(tmp_path: Path) -> None:
    with AdapterStore(tmp_path, keep_versions=2) as store:
        for seed in range(5):
            put(store, "a", seed=seed, details=AdapterDetails(alias="first" if seed == 0 else "moving"))
            store.collect()
        assert [version.version for version in store.versions("a")] == [1, 4, 5]
        assert dict(store.record("a").aliases) == {"first": 1, "moving": 5}
        check_integrity(tmp_path, store)
        put(store, "a", seed=5, details=AdapterDetails(alias="first"))
        assert [version.version for version in store.versions("a")] == [5, 6]
    with AdapterStore(tmp_path) as store:
        assert [version.version for version in store.versions("a")] == [5, 6]
        check_integrity(tmp_path, store)


# Aliases and details


def test_moving_an_alias_tells_what_it_meant(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        first, second = put(store, "a"), put(store, "a", seed=1)
        assert store.set_alias("a", "prod", "latest") == (second, None)
        assert store.set_alias("a", "prod", "1") == (first, second)
        assert store.set_alias("a", "test", "prod") == (first, None)
        assert store.set_alias("a", "prod", second.digest) == (second, first)
    with AdapterStore(tmp_path) as store:
        assert dict(store.record("a").aliases) == {"prod": 2, "test": 1}
        assert store.remove_alias("a", "prod") == second
        with pytest.raises(AdapterNotFound, match="no version or alias 'prod'"):
            store.remove_alias("a", "prod")
        with pytest.raises(AdapterNotFound):
            store.remove_alias("a", "1")
        with pytest.raises(AdapterNotFound):
            store.set_alias("a", "prod", "7")
        with pytest.raises(AdapterNotFound):
            store.set_alias("b", "prod", "1")
    with AdapterStore(tmp_path) as store:
        assert dict(store.record("a").aliases) == {"test": 1}


@pytest.mark.parametrize("alias", ["latest", "7", "v 1", "sha256", "a/b"])
def test_wrong_aliases_change_nothing(store: AdapterStore, alias: str, tmp_path: Path) -> None:
    put(store, "a")
    before = store.list(), folders(tmp_path / "store")
    for act in (
        lambda: store.set_alias("a", alias, "1"),
        lambda: put(store, "a", seed=1, details=AdapterDetails(alias=alias)),
    ):
        with pytest.raises(InvalidAdapterName) as caught:
            act()
        assert caught.value.param == "alias"
    assert (store.list(), folders(tmp_path / "store")) == before


def test_an_alias_never_means_nothing_while_it_moves(store: AdapterStore) -> None:
    put(store, "a", details=AdapterDetails(alias="prod"))
    done = threading.Event()
    with ThreadPoolExecutor(1) as threads:

        def resolve_for_ever() -> int:
            for count in itertools.count():
                if done.is_set():
                    return count
                assert store.resolve("a@prod").name == "a"
            raise AssertionError

        reader = threads.submit(resolve_for_ever)
        for seed in range(1, 30):
            put(store, "a", seed=seed, details=AdapterDetails(alias="prod"))
            assert store.resolve("a@prod").version == seed + 1
        done.set()
        assert reader.result()


def test_details_are_kept_and_changed_one_by_one(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        put(store, "a", details=AdapterDetails(tags=("x", "y", "x"), description="für SQL"))
        put(store, "b")
        put(store, "a", seed=1, details=AdapterDetails(is_pinned=True))
    with AdapterStore(tmp_path) as store:
        record = store.record("a")
        assert (record.tags, record.description, record.is_pinned) == (("x", "y"), "für SQL", True)
        assert (record.owner, record.name, record.num_versions) == ("local", "a", 2)
        assert record.created_unix_seconds == record.versions[0].created_unix_seconds
        assert store.pinned() == (record.latest,)
        updated = store.update("a", AdapterDetails(tags=(), is_pinned=False))
        assert updated == store.record("a") == changed(record, tags=(), is_pinned=False)
    with AdapterStore(tmp_path) as store:
        assert store.record("a") == updated
        assert store.pinned() == ()
        with pytest.raises(AdapterNotFound):
            store.update("c", AdapterDetails(description="x"))


def test_the_same_content_again_still_applies_its_details(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        version = put(store, "a")
        assert put(store, "a", details=AdapterDetails(alias="prod", description="new")) == version
    with AdapterStore(tmp_path) as store:
        assert store.resolve("a@prod") == version
        assert store.record("a").description == "new"


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("tags", lambda: AdapterDetails(tags=("a,b",))),
        ("tags", lambda: AdapterDetails(tags=("",))),
        ("tags", lambda: AdapterDetails(tags=("x" * 65,))),
        ("tags", lambda: AdapterDetails(tags=("\ud800",))),
        ("tags", lambda: AdapterDetails(tags=tuple(map(str, range(33))))),
        ("description", lambda: AdapterDetails(description="x" * 2001)),
        ("description", lambda: AdapterDetails(description="\ud800")),
        ("description", lambda: AdapterDetails(description="\0")),
        ("ttl_seconds", lambda: AdapterDetails(ttl_seconds=-1)),
        ("ttl_seconds", lambda: AdapterDetails(ttl_seconds=2**63)),
    ],
)
def test_details_out_of_bounds_are_refused(field: str, make: Callable[[], AdapterDetails]) -> None:
    with pytest.raises(AdapterError) as caught:
        make()
    assert caught.value.param == field


def test_names_whose_time_is_up_are_deleted(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        for name, seconds in {"short": 10, "long": 1000, "ever": None, "extended": 10}.items():
            put(store, name, details=AdapterDetails(ttl_seconds=seconds))
        store.update("extended", AdapterDetails(ttl_seconds=0))
        expires = store.record("short").expires_unix_seconds
        assert expires is not None
        assert 0 <= time.time() + 10 - expires < 5
    with AdapterStore(tmp_path) as store:
        assert store.expire(expires - 1) == ()
        assert store.expire(expires) == ("short",)
        assert [record.name for record in store.list()] == ["ever", "extended", "long"]
    with AdapterStore(tmp_path) as store:
        assert store.expire(2**40) == ("long",)
        assert [record.expires_unix_seconds for record in store.list()] == [None, None]


def test_an_upload_to_a_name_whose_time_is_up_begins_anew(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, "a", details=AdapterDetails(alias="prod", description="old", ttl_seconds=10))
    put(store, "a", seed=1)
    assert store.record("a").expires_unix_seconds is not None  # an upload alone does not lengthen a life
    later = time.time() + 60
    monkeypatch.setattr(time, "time", lambda: later)
    version = put(store, "a", seed=2)
    assert version.version == 3
    assert store.expire(2**40) == ()
    record = store.record("a")
    assert (record.versions, dict(record.aliases), record.description) == ((version,), {}, "")


# Quarantine


def test_quarantine_refuses_new_requests_until_the_content_is_put_again(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        bad, good = put(store, "a"), put(store, "a", seed=1)
        put(store, "b")
        assert store.quarantine(bad.digest, "a bit flipped") == ("a@1", "b@1")
        with pytest.raises(AdapterDamaged, match="b@1 is in quarantine until it is uploaded again: a bit flipped"):
            store.acquire("b")
        assert store.acquire("a") == good
        store.release(good.digest)
    with AdapterStore(tmp_path) as store:
        assert store.quarantine_reason(bad.digest) == "a bit flipped"
        assert store.resolve("a@1") == bad
        with pytest.raises(AdapterDamaged) as caught:
            store.acquire("a@1")
        assert caught.value.param == "adapter"
        put(store, "c")
        assert store.quarantine_reason(bad.digest) is None
        assert store.acquire("a@1") == bad
    with AdapterStore(tmp_path) as store:
        assert store.quarantine_reason(bad.digest) is None


def test_the_same_latest_content_lifts_its_quarantine(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        version = put(store, "a")
        store.quarantine(version.digest, "cut")
        assert put(store, "a") == version
        assert store.acquire("a") == version
    with AdapterStore(tmp_path) as store:
        assert store.quarantine_reason(version.digest) is None


def test_quarantine_ends_with_the_last_version(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        version = put(store, "a")
        store.quarantine(version.digest, "cut")
        store.delete("a")
        assert store.quarantine_reason(version.digest) is None
        assert store.quarantine(version.digest, "late news") == ()
        assert store.quarantine_reason(version.digest) is None
    connection = sqlite3.connect(tmp_path / "index.sqlite3")
    assert connection.execute("SELECT * FROM quarantined").fetchall() == []
    connection.close()


# Holding


def test_held_content_outlives_replacement_and_deletion(store: AdapterStore, tmp_path: Path) -> None:
    put(store, "a")
    old = store.acquire("a")
    store.hold(old.digest)
    new = put(store, "a", seed=1)
    assert store.delete("a") == (old, new)
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
    with AdapterStore(tmp_path, keep_versions=1) as store, ThreadPoolExecutor(4) as threads:
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
        check_integrity(tmp_path, store)


def test_three_threads_put_and_delete_the_same_names(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store, ThreadPoolExecutor(3) as threads:

        def churn(seed: int) -> None:
            source = random.Random(seed)
            for _ in range(15):
                put(store, source.choice("ab"), seed=source.randrange(3))
                try:
                    store.delete(source.choice(("a", "b@1", "b@2")))
                except AdapterNotFound:
                    store.collect()

        list(threads.map(churn, range(3)))
        store.collect()
        records = store.list()
        check_integrity(tmp_path, store)
    with AdapterStore(tmp_path) as store:
        assert store.list() == records


# Damage and failure


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
    with pytest.raises(AdapterDamaged, match=version.digest) as caught:
        open_content(tmp_path / "store", version.digest, BASE)
    assert str(tmp_path) not in caught.value.message
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
        assert store.versions("a") == (version,)
        check_integrity(tmp_path, store)


def test_a_failing_index_leaves_the_name_as_it_was(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        version = put(store, "a")
        trigger = "CREATE TRIGGER full BEFORE INSERT ON aliases BEGIN SELECT raise(ABORT, 'disk is full'); END"
        with sqlite3.connect(tmp_path / "index.sqlite3") as other:
            other.execute(trigger)
        other.close()
        with pytest.raises(sqlite3.Error, match="disk is full"):
            put(store, "a", seed=1, details=AdapterDetails(alias="prod"))
        with pytest.raises(sqlite3.Error, match="disk is full"):
            store.set_alias("a", "prod", "1")
        assert store.versions("a") == (version,)
        assert not store.record("a").aliases
        assert len(store.collect()) == 1
        check_integrity(tmp_path, store)
    with AdapterStore(tmp_path) as store:
        assert store.versions("a") == (version,)
        assert put(store, "a", seed=1).version == 2


# Threads


def test_nothing_the_event_loop_calls_waits_for_the_disk(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    version = put(store, "a", details=AdapterDetails(alias="prod", is_pinned=True))
    at_disk, disk_works = threading.Event(), threading.Event()
    sync = os.fsync

    def slow_sync(descriptor: int) -> None:
        at_disk.set()
        assert disk_works.wait(30)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow_sync)
    with ThreadPoolExecutor(2) as threads:
        writing = threads.submit(put, store, "a", 1)
        assert at_disk.wait(30)
        asking = threads.submit(ask_everything, store, version)
        try:
            asking.result(timeout=10)
        finally:
            disk_works.set()
        assert writing.result().version == 2


def ask_everything(store: AdapterStore, version: AdapterVersion) -> None:
    assert store.resolve("a@prod") == store.acquire("a") == version
    store.hold(version.digest)
    assert store.num_holds(version.digest) == 2
    assert not store.release(version.digest)
    assert not store.release(version.digest)
    (record,) = store.list()
    assert record == store.record("a")
    assert store.versions("a") == store.pinned() == (version,)
    assert store.names_of(version.digest) == ("a@1",)
    assert store.quarantine_reason(version.digest) is None
    with pytest.raises(AdapterNotFound):
        store.resolve("b")


# Opening


def test_opening_clears_what_a_crash_left_and_nothing_else(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        put(store, "a")
        records = store.list()
    torn, unnamed = tmp_path / "incoming" / ("ab" * 16), tmp_path / "content" / ("ab" * 32)
    strangers = [tmp_path / "incoming" / "notes.txt", tmp_path / "content" / "notes.txt"]
    for folder in (torn, unnamed):
        folder.mkdir()
        (folder / WEIGHTS_FILE).write_bytes(b"torn")
    for stranger in strangers:
        stranger.write_text("not ours")
    with AdapterStore(tmp_path) as store:
        assert store.list() == records
        assert not torn.exists()
        assert not unnamed.exists()
        for stranger in strangers:
            stranger.unlink()
        check_integrity(tmp_path, store)


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


def test_opening_two_thousand_adapters_is_fast(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        version = put(store, "a", details=AdapterDetails(alias="prod"))
    connection = sqlite3.connect(tmp_path / "index.sqlite3")
    with connection:
        for table in ("versions", "names", "aliases"):
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            values = [{"name": "?1", "digest": "?2"}.get(column, column) for column in columns]
            connection.executemany(
                f"INSERT INTO {table} SELECT {', '.join(values)} FROM {table} WHERE name = 'a' AND ?2 = ?2",
                [(f"a{number}", f"sha256:{number:064x}") for number in range(1, 2000)],
            )
    connection.close()
    for number in range(1, 2000):
        folder = tmp_path / "content" / f"{number:064x}"
        folder.mkdir()
        for file in store.content_paths(version.digest):
            os.link(file, folder / file.name)
    started = time.perf_counter()
    with AdapterStore(tmp_path) as store:
        assert time.perf_counter() - started < 2
        assert len(store.list()) == len(folders(tmp_path)["content"]) == 2000
        assert store.resolve("a1999@prod").digest == f"sha256:{1999:064x}"
        started = time.perf_counter()
        with pytest.raises(AdapterNotFound):
            store.resolve("a1000x")
        assert time.perf_counter() - started < 0.2


def test_what_a_version_changes_is_kept(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        version = put(store, "a")
    said = changed(
        version,
        num_virtual_tokens=20,
        num_prefix_tokens=20,
        positions=Positions(num_first=4, num_last=3),
        sites_by_pattern=(("model.layers.*.self_attn.q_proj", 24), ("model.norm", 1)),
    )
    path = tmp_path / "index.sqlite3"
    index = StoreIndex(path, must_exist=True)
    index.replace(AdapterRecord((version,)), AdapterRecord((said,)))
    index.close()
    with AdapterStore(tmp_path) as store:
        assert store.resolve("a") == said
    for damage in ("nonsense", '{"num_first": "four"}', "[]"):
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("UPDATE versions SET positions = ?", (damage,))
        with pytest.raises(StoreUnusable, match=r"index\.sqlite3 cannot be read"):
            AdapterStore(tmp_path)


# The index of the first release

IDENTITY = ("owner", "name", "version", "digest")
MEASURES = ("method", "max_rank", "num_rows", "size_bytes", "created_unix_seconds")


def first_release(path: Path) -> tuple[AdapterVersion, AdapterVersion]:
    """A store as the first release left it: "a" replaced once and "b" deleted; returns "a@2" and "ia3@1"."""
    with AdapterStore(path) as store:
        current = changed(put(store, "a", seed=1), version=2, num_row_values=0, sites_by_pattern=())
        with store.upload_folder() as folder:
            config = config_bytes({"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []})
            weights = write_weights(folder / WEIGHTS_FILE, {tensor_name(Q, "ia3_l"): np.ones((8, 1), np.float32)})
            vectors = store.put("ia3", read_checkpoint(config, weights, BASE), config, weights)
    for file in path.glob("index.sqlite3*"):
        file.unlink()
    connection = sqlite3.connect(path / "index.sqlite3", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    for statement in (*MIGRATIONS[0], "PRAGMA user_version = 1"):
        connection.execute(statement)
    old, gone = changed(current, version=1, digest="sha256:" + "1" * 64), changed(current, name="b", version=1)
    vectors = changed(vectors, num_vector_values=0, sites_by_pattern=())
    for version, is_current in ((old, 0), (current, 1), (gone, 0), (vectors, 1)):
        row = [getattr(version, column) for column in (*IDENTITY, *MEASURES)]
        connection.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, is_current))
    connection.close()
    return current, vectors


def test_a_store_of_the_first_release_is_taken_over(tmp_path: Path) -> None:
    current, vectors = first_release(tmp_path)
    for _ in range(2):
        with AdapterStore(tmp_path) as store:
            assert [record.versions for record in store.list()] == [(current,), (vectors,)]
            assert (current.combination, vectors.combination) == ("sum", "product")
            assert store.record("a") == changed(store.record("ia3"), versions=(current,))  # no details, no aliases
            check_integrity(tmp_path, store)
    with AdapterStore(tmp_path) as store:
        again = put(store, "a", seed=1)
        sites = tuple((f"model.layers.*.self_attn.{name}", 1) for name in ("q_proj", "v_proj"))
        # Counted and noted at last, and still the same version.
        assert again == changed(current, num_row_values=56, sites_by_pattern=sites)
        assert store.versions("a") == (again,)
        assert put(store, "a", seed=2).version == 3
        assert put(store, "b").version == 2
    with AdapterStore(tmp_path) as store:
        assert store.resolve("a@2") == again
    connection = sqlite3.connect(tmp_path / "index.sqlite3")
    rows = connection.execute("SELECT name, version, is_stored FROM versions ORDER BY name, version").fetchall()
    connection.close()
    assert rows == [("a", 1, 0), ("a", 2, 1), ("a", 3, 1), ("b", 1, 0), ("b", 2, 1), ("ia3", 1, 1)]


def test_a_takeover_that_fails_leaves_the_old_index(tmp_path: Path) -> None:
    first_release(tmp_path)
    connection = sqlite3.connect(tmp_path / "index.sqlite3")
    connection.execute("CREATE TABLE aliases (something_else)")
    connection.close()
    with pytest.raises(StoreUnusable, match="already exists"):
        AdapterStore(tmp_path)
    connection = sqlite3.connect(tmp_path / "index.sqlite3")
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    assert connection.execute("SELECT count(*) FROM versions WHERE is_current").fetchone() == (2,)
    connection.close()
