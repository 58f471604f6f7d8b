"""The store, for several owners: who sees, resolves and changes what, and content that they share unknowingly."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from adapter_samples import BASE, config_bytes, lora_config, lora_tensors, write_weights
from heddle_adapters.author import Author
from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.errors import AdapterError, AdapterNotFound, NameTaken, NotTheOwner, StoreUnusable
from heddle_adapters.positions import Positions
from heddle_adapters.store import AdapterStore
from heddle_adapters.store_index import AdapterDetails, AdapterRecord, AdapterVersion
from heddle_adapters.tensor_file import WEIGHTS_FILE

BLUE, GREEN = Author("blue"), Author("green")
PUBLIC, PRIVATE = AdapterDetails(visibility="public"), AdapterDetails(visibility="private")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with AdapterStore(tmp_path) as opened:
        yield opened


def put(store: AdapterStore, name: str, by: Author, seed: int = 0, details: AdapterDetails = PRIVATE) -> AdapterVersion:
    config = config_bytes(lora_config())
    with store.upload_folder() as folder:
        weights = write_weights(folder / WEIGHTS_FILE, lora_tensors(seed))
        return store.put(name, read_checkpoint(config, weights, BASE), config, weights, details, by)


def names(records: Sequence[AdapterRecord]) -> list[str]:
    return [record.latest.full_name for record in records]


def test_owners_have_names_of_their_own(store: AdapterStore) -> None:
    first, second = put(store, "sql", BLUE, 1), put(store, "sql", GREEN, 2)
    assert (first.version, second.version, put(store, "sql", BLUE, 3).version) == (1, 1, 2)
    assert store.resolve("sql@1", "blue") == first
    assert store.resolve("sql", "green") == second
    assert names(store.visible_to("blue")) == ["blue:sql"]
    assert names(store.list()) == ["blue:sql", "green:sql"]
    assert [name in store for name in ("blue:sql", "green:sql", "sql", "red:sql")] == [True, True, False, False]
    store.delete("sql", BLUE)
    assert store.resolve("sql", "green") == second
    assert put(store, "sql", BLUE, 4).version == 3


def test_another_owners_private_adapter_is_like_one_that_does_not_exist(store: AdapterStore) -> None:
    version = put(store, "secret", BLUE, details=AdapterDetails(alias="prod"))
    questions: list[Callable[[str], object]] = [
        lambda name: store.resolve(name, "green"),
        lambda name: store.resolve(f"{name}@1", "green"),
        lambda name: store.resolve(f"{name}@prod", "green"),
        lambda name: store.resolve(f"{name}@{version.digest}", "green"),
        lambda name: store.acquire(name, "green"),
        lambda name: store.record(name, "green"),
        lambda name: store.update(name, PUBLIC, GREEN),
        lambda name: store.delete(name, GREEN),
        lambda name: store.delete(f"{name}@1", GREEN),
        lambda name: store.set_alias(name, "prod", "1", GREEN),
        lambda name: store.remove_alias(name, "prod", GREEN),
    ]
    for question in questions:
        told = []
        for name in ("secret", "absent"):
            with pytest.raises(AdapterNotFound) as error:
                question(name)
            told.append((error.value.message.replace(name, "NAME"), error.value.nearest, error.value.param))
        assert told[0] == told[1]
    with pytest.raises(AdapterNotFound) as error:
        store.resolve("secre", "green")
    assert error.value.nearest == ()
    assert (store.visible_to("green"), store.own("secret", "green")) == ((), None)
    assert store.visible_names_of(version.digest, "green") == ()
    assert store.resolve("secret@prod", "blue") == version


def test_a_public_adapter_is_used_by_all_and_changed_by_its_owner(store: AdapterStore) -> None:
    version = put(store, "sql", BLUE, details=AdapterDetails(visibility="public", alias="prod"))
    for tenant in ("blue", "green", "local"):
        assert store.acquire("sql@prod", tenant) == version
        assert names(store.visible_to(tenant)) == ["blue:sql"]
        with pytest.raises(AdapterNotFound) as error:
            store.resolve("sqk", tenant)
        assert error.value.nearest == ("sql",)
    assert store.visible_names_of(version.digest, "green") == ("sql@1",)
    assert store.own_names_of(version.digest, "green") == ()
    changes: list[Callable[[], object]] = [
        lambda: store.update("sql", PRIVATE, GREEN),
        lambda: store.delete("sql", GREEN),
        lambda: store.delete("sql@1", GREEN),
        lambda: store.set_alias("sql", "prod", "1", GREEN),
        lambda: store.remove_alias("sql", "prod", GREEN),
    ]
    for change in changes:
        with pytest.raises(NotTheOwner):
            change()
    store.update("sql", PRIVATE, BLUE)
    with pytest.raises(AdapterNotFound):
        store.resolve("sql", "green")
    assert store.resolve("sql", "blue") == version


def test_an_own_adapter_comes_before_a_public_one(store: AdapterStore) -> None:
    public = put(store, "sql", BLUE, 1, AdapterDetails(visibility="public", alias="prod"))
    own = put(store, "sql", GREEN, 2)
    assert store.resolve("sql", "green") == own
    assert store.resolve("sql", "red") == public
    assert names(store.visible_to("green")) == ["green:sql"]
    with pytest.raises(AdapterNotFound):
        store.resolve("sql@prod", "green")
    assert store.visible_names_of(public.digest, "green") == ()
    store.delete("sql", GREEN)
    assert store.resolve("sql@prod", "green") == public


def test_public_names_are_unique(store: AdapterStore) -> None:
    put(store, "sql", BLUE, 1, PUBLIC)
    put(store, "sql", GREEN, 2)
    num_stored = len(store.list())
    with pytest.raises(NameTaken):
        store.update("sql", PUBLIC, GREEN)
    with pytest.raises(NameTaken):
        put(store, "sql", GREEN, 3, PUBLIC)
    with pytest.raises(NameTaken):
        put(store, "sql", Author("red"), 4, PUBLIC)
    assert (len(store.list()), store.resolve("sql", "green").version) == (num_stored, 1)
    put(store, "sql", BLUE, 5, PUBLIC)  # its own is no other's
    store.update("sql", PRIVATE, BLUE)
    store.update("sql", PUBLIC, GREEN)
    assert store.resolve("sql", "red").owner == "green"
    store.delete("sql", GREEN)
    store.update("sql", PUBLIC, BLUE)


def test_content_is_stored_once_and_stays_until_its_last_owner_is_gone(store: AdapterStore, tmp_path: Path) -> None:
    one, other = put(store, "one", BLUE), put(store, "other", GREEN)
    assert one.digest == other.digest
    assert len(list((tmp_path / "content").iterdir())) == 1
    assert store.names_of(one.digest) == ("blue:one@1", "green:other@1")
    assert store.own_names_of(one.digest, "blue") == ("one@1",)
    store.quarantine(one.digest, "torn")
    store.delete("one", BLUE)
    assert store.collect() == ()
    assert store.quarantine_reason(other.digest) == "torn"
    store.delete("other", GREEN)
    assert store.collect() == (one.digest,)
    assert store.quarantine_reason(one.digest) is None


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        put(store, "sql", BLUE, 1, AdapterDetails(visibility="public", alias="prod", tags=("a",)))
        put(store, "sql", GREEN, 2)
        put(store, "sql", GREEN, 3, AdapterDetails(alias="prod"))
        put(store, "chat", Author(), 4)
        records = store.list()
    with AdapterStore(tmp_path) as store:
        assert store.list() == records
        assert names(store.visible_to("red")) == ["blue:sql"]
        assert store.resolve("sql@prod", "green").version == 2


def test_names_of_every_owner_expire(store: AdapterStore) -> None:
    put(store, "sql", BLUE, details=AdapterDetails(ttl_seconds=1, visibility="public"))
    put(store, "sql", GREEN, details=AdapterDetails(ttl_seconds=1))
    put(store, "kept", GREEN)
    expires = store.record("sql", "blue").expires_unix_seconds
    assert expires is not None
    assert store.expire(expires + 5) == ("blue:sql", "green:sql")
    assert names(store.list()) == ["green:kept"]
    put(store, "sql", GREEN, details=PUBLIC)


class Refusing(Author):
    """Has a say, and remembers what it was asked."""

    def __init__(self, owner: str, at: str | None = None) -> None:
        super().__init__(owner)
        self.at = at
        self.heard: list[tuple[str, int | None, int | None]] = []

    def permit(self, before: AdapterRecord | None, after: AdapterRecord, owned: Sequence[AdapterRecord]) -> None:
        self.hear("permit", before, after)
        assert {record.owner for record in owned} <= {self.owner}

    def record(self, before: AdapterRecord | None, after: AdapterRecord | None) -> None:
        self.hear("record", before, after)

    def hear(self, what: str, before: AdapterRecord | None, after: AdapterRecord | None) -> None:
        versions = [None if record is None else record.latest.version for record in (before, after)]
        self.heard.append((what, versions[0], versions[1]))
        if what == self.at:
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize("at", ["permit", "record"])
def test_a_change_that_its_author_refuses_is_not_made(store: AdapterStore, tmp_path: Path, at: str) -> None:
    put(store, "sql", GREEN, 9)
    first = put(store, "sql", BLUE, 1, AdapterDetails(alias="prod"))
    before = store.list()
    author = Refusing("blue", at)
    changes: list[Callable[[], object]] = [
        lambda: put(store, "sql", author, 2),
        lambda: put(store, "new", author, 3),
        lambda: store.update("sql", PUBLIC, author),
    ]
    if at == "record":
        changes += [
            lambda: store.delete("sql", author),
            lambda: store.set_alias("sql", "test", "1", author),
            lambda: store.remove_alias("sql", "prod", author),
        ]
    for change in changes:
        with pytest.raises(OSError, match="No space"):
            change()
        assert store.list() == before
    store.collect()
    assert len(list((tmp_path / "content").iterdir())) == 2
    assert store.resolve("sql", "blue") == first
    heard = Refusing("blue")
    put(store, "sql", heard, 2)
    store.delete("sql@2", heard)
    assert heard.heard == [("permit", 1, 2), ("record", 1, 2), ("permit", 2, 1), ("record", 2, 1)]


def test_a_trial_says_what_would_forbid_it_and_changes_nothing(store: AdapterStore, tmp_path: Path) -> None:
    put(store, "sql", BLUE, 1, PUBLIC)
    config = config_bytes(lora_config())
    weights = write_weights(tmp_path / WEIGHTS_FILE, lora_tensors(2))
    checkpoint = read_checkpoint(config, weights, BASE)
    before = store.list()
    store.check_put("sql", checkpoint, PRIVATE, GREEN)
    with pytest.raises(NameTaken):
        store.check_put("sql", checkpoint, PUBLIC, GREEN)
    with pytest.raises(OSError, match="No space"):
        store.check_put("sql", checkpoint, PRIVATE, Refusing("green", "permit"))
    assert store.list() == before


def test_a_visibility_that_is_none() -> None:
    with pytest.raises(AdapterError, match="private or public") as error:
        AdapterDetails(visibility="secret")  # type: ignore[arg-type]
    assert error.value.param == "visibility"


# The index before there were tenants


def before_tenants(path: Path) -> None:
    """A store as the release before left it: everything is local, and nothing is said of visibility."""
    with AdapterStore(path) as store:
        put(store, "sql", Author(), 1, AdapterDetails(alias="prod", description="Queries", is_pinned=True))
        put(store, "sql", Author(), 2)
    connection = sqlite3.connect(path / "index.sqlite3", isolation_level=None)
    connection.execute("DROP INDEX public_names")
    connection.execute("ALTER TABLE names DROP COLUMN visibility")
    for column in ("num_virtual_tokens", "num_prefix_tokens", "positions", "sites_by_pattern"):
        connection.execute(f"ALTER TABLE versions DROP COLUMN {column}")
    connection.execute("PRAGMA user_version = 2")
    connection.close()


def test_a_store_from_before_tenants_is_taken_over(tmp_path: Path) -> None:
    before_tenants(tmp_path)
    for _ in range(2):
        with AdapterStore(tmp_path) as store:
            (record,) = store.list()
            assert (record.owner, record.visibility, record.description, record.is_pinned) == (
                "local",
                "private",
                "Queries",
                True,
            )
            assert [store.resolve(f"sql@{each}").version for each in (1, 2, "prod")] == [1, 2, 1]
            assert (record.latest.positions, record.latest.sites_by_pattern) == (Positions(), ())
            assert store.visible_to("blue") == ()
    with AdapterStore(tmp_path) as store:
        store.update("sql", PUBLIC)
        assert put(store, "sql", BLUE, 3).version == 1
        assert store.resolve("sql@prod", "green").version == 1


def test_an_index_with_a_visibility_that_is_none_is_not_read(tmp_path: Path) -> None:
    before_tenants(tmp_path)
    with AdapterStore(tmp_path):
        pass
    connection = sqlite3.connect(tmp_path / "index.sqlite3", isolation_level=None)
    connection.execute("UPDATE names SET visibility = 'hidden'")
    connection.close()
    with pytest.raises(StoreUnusable, match="hidden"):
        AdapterStore(tmp_path)
