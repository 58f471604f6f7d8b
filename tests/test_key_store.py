"""API keys: made once, kept as hashes, seen by a running server at once, and never in a log or a list."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from heddle_adapters.errors import StoreUnusable
from heddle_server.audit_log import AUDIT_FILE, AuditLog
from heddle_server.cli import app
from heddle_server.key_store import KEYS_FILE, SCOPES, KeyRefused, KeyStore, NoSuchKey, TenantLimits, is_tenant
from tenant_keys import keys_of


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[KeyStore]:
    with keys_of(tmp_path) as keys:
        yield keys


def heddle(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments])


def said(*arguments: str) -> str:
    result = heddle(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_key_is_known_by_its_secret_alone(keys: KeyStore) -> None:
    key, text = keys.create("blue", ["infer"], "laptop")
    assert keys.check(text) == key
    assert (key.tenant, key.scopes, key.label) == ("blue", frozenset(["infer"]), "laptop")
    last = "0" if text[-1] != "0" else "1"
    for wrong in ("", "nonsense", text[:-1] + last, text[:-1], text + "0", text.upper(), f"hdl_{'0' * 12}_{'0' * 64}"):
        with pytest.raises(KeyRefused) as refused:
            keys.check(wrong)
        assert text[20:] not in str(refused.value)


def test_only_a_hash_of_the_secret_is_kept(keys: KeyStore, tmp_path: Path) -> None:
    key, text = keys.create("blue", SCOPES)
    secret = text.removeprefix(f"hdl_{key.key_id}_")
    assert (len(bytes.fromhex(secret)), text.count("_")) == (32, 2)
    kept = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert secret.encode() not in kept
    assert bytes.fromhex(secret) not in kept
    assert hashlib.sha256(secret.encode()).digest() in kept


def test_its_files_are_their_owners_alone(keys: KeyStore, tmp_path: Path) -> None:
    keys.create("blue", ["infer"])
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert {KEYS_FILE, AUDIT_FILE} < modes.keys()
    assert set(modes.values()) == {0o600}


def test_an_open_store_sees_at_once_what_another_process_does(keys: KeyStore, tmp_path: Path) -> None:
    assert not keys.has_keys
    with keys_of(tmp_path) as other:
        key, text = other.create("blue", ["infer"])
        assert keys.has_keys
        assert keys.check(text) == key
        other.change_limits("blue", {"adapters": 3})
        assert keys.limits_of("blue").adapters == 3
        other.revoke(key.key_id)
        with pytest.raises(KeyRefused, match="revoked"):
            keys.check(text)
    assert keys.has_keys, "a server that was closed once stays closed"
    assert keys.limits_of("green") == TenantLimits()


def test_a_key_expires_and_stays_revoked(tmp_path: Path) -> None:
    now = 1000.0
    with KeyStore(tmp_path, AuditLog(tmp_path), clock=lambda: now) as keys:
        key, text = keys.create("blue", ["infer"], expires_unix_seconds=1010)
        now = 1009.0
        assert keys.check(text) == key
        now = 1010.0
        with pytest.raises(KeyRefused, match="expired"):
            keys.check(text)
        keys.revoke(key.key_id)
        now = 1020.0
        keys.revoke(key.key_id)
        assert [each.revoked_unix_seconds for each in keys.all()] == [1010]
        with pytest.raises(NoSuchKey):
            keys.revoke("0" * 12)


def test_many_threads_may_ask_while_keys_are_made(keys: KeyStore) -> None:
    texts = [keys.create("blue", ["infer"])[1]]
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            for _ in range(200):
                keys.check(texts[-1])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    texts.extend(keys.create(f"tenant-{number}", ["infer"])[1] for number in range(20))
    for thread in threads:
        thread.join()
    assert failures == []


def test_several_processes_may_make_the_database_at_once(tmp_path: Path) -> None:
    opened: list[KeyStore] = []
    threads = [threading.Thread(target=lambda: opened.append(KeyStore(tmp_path, AuditLog(tmp_path)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 4
    for keys in opened:
        keys.close()


def test_a_change_that_cannot_be_logged_is_not_made(keys: KeyStore, tmp_path: Path) -> None:
    key, text = keys.create("blue", ["infer"])
    (tmp_path / AUDIT_FILE).unlink()
    (tmp_path / AUDIT_FILE).mkdir()  # nothing can be appended to a folder
    for change in (
        lambda: keys.create("blue", ["infer"]),
        lambda: keys.revoke(key.key_id),
        lambda: keys.change_limits("blue", {"adapters": 1}),
    ):
        with pytest.raises(StoreUnusable, match="directory"):
            change()
    assert keys.all() == (key,)
    assert keys.check(text) == key
    assert keys.limits_of("blue") == TenantLimits()


@pytest.mark.parametrize("damage", [b"not a database at all, but long enough to be read as one", None])
def test_a_database_that_cannot_be_read_is_told_as_the_stores_trouble(tmp_path: Path, damage: bytes | None) -> None:
    if damage is None:
        with keys_of(tmp_path):
            connection = sqlite3.connect(tmp_path / KEYS_FILE)
            connection.execute("PRAGMA user_version = 99")
            connection.close()
    else:
        (tmp_path / KEYS_FILE).write_bytes(damage)
    with pytest.raises(StoreUnusable, match=KEYS_FILE):
        KeyStore(tmp_path, AuditLog(tmp_path))


@pytest.mark.parametrize("name", ["blue", "team-1", "a.b_c", "0", "x" * 64])
def test_tenants_names(name: str) -> None:
    assert is_tenant(name)


@pytest.mark.parametrize("name", ["", "Blue", "a:b", "a,b", "a/b", "a b", "-a", "x" * 65, "é"])
def test_names_that_no_tenant_has(name: str) -> None:
    assert not is_tenant(name)


# The command


def test_the_command_makes_lists_and_revokes(tmp_path: Path) -> None:
    store = ("--store", str(tmp_path))
    assert "no keys" in said("ls", *store)
    created = heddle("create", "--tenant", "blue", "--scope", "infer", "--label", "CI", "--expires", "90d", *store)
    text = created.stdout.strip()
    assert "shown only now" in created.stderr
    assert "the first" in created.stderr
    second = heddle("create", "--tenant", "ops", "--scope", "admin", *store)
    assert "the first" not in second.stderr
    with keys_of(tmp_path) as keys:
        key = keys.check(text)
        assert key.expires_unix_seconds == key.created_unix_seconds + 90 * 86_400
    listed = json.loads(said("ls", "--json", *store))
    assert [(each["tenant"], each["scopes"], each["status"], each["label"]) for each in listed] == [
        ("blue", ["infer"], "active", "CI"),
        ("ops", ["admin"], "active", ""),
    ]
    assert "blue, CI" in said("revoke", key.key_id, *store)
    shown = said("ls", *store)
    assert "revoked" in shown
    for output in (shown, json.dumps(listed)):
        assert text.rpartition("_")[2] not in output
    assert "stays closed" in said("revoke", listed[1]["id"], *store)
    as_json = json.loads(said("create", "--tenant", "blue", "--scope", "infer", "--json", *store))
    with keys_of(tmp_path) as keys:
        assert keys.check(as_json["key"]).key_id == as_json["id"]


def test_the_command_sets_shows_and_lifts_limits(tmp_path: Path) -> None:
    store = ("--store", str(tmp_path))
    assert said("limit", "blue", *store).count("no limit") == 5
    sizes = ("--bytes", "2GB", "--pinned-bytes", "512MiB")
    said("limit", "blue", "--adapters", "3", *sizes, "--requests-per-second", "0.5", "--queued-tokens", "0", *store)
    with keys_of(tmp_path) as keys:
        assert keys.limits_of("blue") == TenantLimits(3, 2 * 10**9, 512 << 20, 0.5, 0)
    said("limit", "blue", "--adapters", "none", *store)
    with keys_of(tmp_path) as keys:
        assert keys.limits_of("blue") == TenantLimits(None, 2 * 10**9, 512 << 20, 0.5, 0)
    assert json.loads(said("limit", "blue", "--json", *store))["requests_per_second"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "--tenant", "Blue", "--scope", "infer"], "is no tenant's name"),
        (["create", "--tenant", "blue", "--scope", "everything"], "is no scope"),
        (["create", "--tenant", "blue"], "--scope"),
        (["create", "--tenant", "blue", "--scope", "infer", "--expires", "0"], "of no use"),
        (["create", "--tenant", "blue", "--scope", "infer", "--expires", "soon"], "is no time"),
        (["create", "--tenant", "blue", "--scope", "infer", "--label", "a\x1b[31m"], "printable"),
        (["limit", "blue", "--adapters", "-1"], "is no limit"),
        (["limit", "blue", "--bytes", "much"], "is no size"),
        (["limit", "blue", "--requests-per-second", "0"], "is no rate"),
        (["limit", "blue", "--requests-per-second", "nan"], "is no rate"),
        (["limit", "blue", "--requests-per-second", "0.0009"], "from 0.001"),
        (["limit", "blue", "--bytes", "99999999999TB"], "more than any machine has"),
        (["limit", "blue", "--bytes", "9" * 400], "more than any machine has"),
        (["create", "--tenant", "blue", "--scope", "infer", "--expires", "999999999999w"], "100 years"),
    ],
)
def test_what_the_command_does_not_take(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = heddle(*arguments, "--store", str(tmp_path))
    assert (result.exit_code, message in " ".join(result.stderr.split())) == (2, True), result.stderr
    with keys_of(tmp_path) as keys:
        assert not keys.has_keys


def test_an_unknown_key_and_an_unusable_store_are_one_line(tmp_path: Path) -> None:
    result = heddle("revoke", "0123456789ab", "--store", str(tmp_path))
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    (tmp_path / "file").touch()
    result = heddle("ls", "--store", str(tmp_path / "file"))
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)


def test_the_store_is_that_of_the_servers_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, store = tmp_path / "heddle.toml", tmp_path / "of-file"
    settings.write_text(f'store = "{store}"')
    created = heddle("create", "--tenant", "blue", "--scope", "infer", "--config", str(settings))
    assert (created.exit_code, str(store) in created.stderr) == (0, True), created.stderr
    monkeypatch.setenv("HEDDLE_CONFIG", str(settings))
    assert "blue" in said("ls")
    assert "no keys" in said("ls", "--store", str(tmp_path))


def test_only_creating_a_key_makes_a_store(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for command in (["ls"], ["revoke", "0123456789ab"], ["limit", "blue"], ["limit", "blue", "--adapters", "1"]):
        result = heddle(*command, "--store", str(missing))
        assert (result.exit_code, "no store" in result.stderr) == (1, True), command
        assert not missing.exists()
    said("create", "--tenant", "blue", "--scope", "infer", "--store", str(missing))
    assert stat.S_IMODE(missing.stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files for others")
def test_what_root_makes_is_the_store_owners(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 12345)
    said("create", "--tenant", "blue", "--scope", "infer", "--store", str(tmp_path))
    with keys_of(tmp_path):
        owners = {file.name: file.stat().st_uid for file in tmp_path.iterdir()}
    assert {KEYS_FILE, f"{KEYS_FILE}-wal", AUDIT_FILE} <= owners.keys()
    assert set(owners.values()) == {12345}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files for others")
def test_root_gives_nothing_away_that_was_there(tmp_path: Path) -> None:
    store, other = tmp_path / "store", tmp_path / "of root"
    store.mkdir()
    os.chown(store, 12345, 12345)
    other.touch()
    (store / AUDIT_FILE).symlink_to(other)
    said("create", "--tenant", "blue", "--scope", "infer", "--store", str(store))
    assert other.stat().st_uid == 0


def test_limits_changed_at_once_are_all_kept(keys: KeyStore, tmp_path: Path) -> None:
    names = [limit.name for limit in fields(TenantLimits)]

    def change(name: str) -> None:
        with keys_of(tmp_path) as own:
            own.change_limits("blue", {name: 1})

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(change, names))
    assert keys.limits_of("blue") == TenantLimits(1, 1, 1, 1, 1)
