"""The audit log: a line for every change before it counts, and no change without one."""

from __future__ import annotations

import json
import re
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import scripted_engine
from heddle_adapters.store_index import AdapterRecord, AdapterVersion
from heddle_server.api.actor import Actor
from heddle_server.api.author import AuditedAuthor
from heddle_server.api.principal import LOCAL_PRINCIPAL
from heddle_server.audit_log import AUDIT_FILE, AuditEntry, AuditLog
from heddle_server.key_store import TenantLimits
from live_server import live_server, server_config, wait_until
from tenant_keys import Tenants, client_of, keys_of, make_key, set_limits, tenants
from test_adapter_api import ADAPTERS, names, upload, weights
from test_http_api import CHAT, HELLO, refusal
from test_registry import write_adapter

RFC_3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Tenants]:
    with tenants(server_config(tmp_path, keep_versions=2)) as world:
        yield world


def lines(store_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store_path / AUDIT_FILE).read_text().splitlines()]


def adapter_lines(store_path: Path) -> list[dict[str, Any]]:
    return [line for line in lines(store_path) if not line["action"].startswith(("key", "limits"))]


def what(line: dict[str, Any]) -> tuple[object, ...]:
    return tuple(line[field] for field in ("action", "owner", "name", "version", "detail", "outcome"))


def test_every_change_is_one_line_with_who_and_what(world: Tenants) -> None:
    key_id = world.blue.headers["authorization"].split("_")[1]
    world.blue.headers["x-request-id"] = "my-label"
    digest = upload(world.blue, "sql", weights(1.0), texts={"alias": "prod"}).json()["digest"]
    for fill in (2.0, 3.0):
        upload(world.blue, "sql", weights(fill))
    world.blue.patch(f"{ADAPTERS}/sql", json={"pinned": True, "description": "said\nin two lines"})
    world.blue.put(f"{ADAPTERS}/sql/aliases/prod", json={"version": 3})
    world.blue.delete(f"{ADAPTERS}/sql/aliases/prod")
    world.blue.delete(f"{ADAPTERS}/sql@3")
    world.blue.delete(f"{ADAPTERS}/sql")
    said = adapter_lines(world.store_path)
    assert [what(line) for line in said] == [
        (
            "adapter.upload",
            "blue",
            "sql",
            1,
            "alias prod: None -> 1",
            "done",
        ),
        ("adapter.upload", "blue", "sql", 2, None, "done"),
        ("adapter.upload", "blue", "sql", 3, None, "done"),
        ("adapter.update", "blue", "sql", 3, "pinned: False -> True", "done"),
        ("alias.set", "blue", "sql", 3, "alias prod: 1 -> 3", "done"),
        ("alias.remove", "blue", "sql", 3, "alias prod: 3 -> None", "done"),
        ("adapter.delete", "blue", "sql", 3, None, "done"),
        ("adapter.delete", "blue", "sql", 1, None, "done"),
        ("adapter.delete", "blue", "sql", 2, None, "done"),
    ]
    assert said[0]["digest"] == digest
    for line in said:
        assert (line["tenant"], line["key_id"], line["request_id"]) == ("blue", key_id, "my-label")
        assert RFC_3339.fullmatch(line["time"])
    assert stat.S_IMODE((world.store_path / AUDIT_FILE).stat().st_mode) == 0o600


def test_what_is_refused_is_a_line_too(world: Tenants) -> None:
    upload(world.admin, "shared", weights(1.0), texts={"visibility": "public"})
    set_limits(world.store_path, "blue", TenantLimits(adapters=0))
    upload(world.blue, "sql")
    upload(world.blue, "no way")
    world.blue.delete(f"{ADAPTERS}/shared")
    world.blue.patch(f"{ADAPTERS}/{'x' * 500}", json={"pinned": True})
    world.blue.get(f"{ADAPTERS}/shared")
    said = adapter_lines(world.store_path)[1:]
    assert [(line["name"][:6], line["owner"], line["outcome"]) for line in said] == [
        ("sql", "blue", "quota_exceeded"),
        ("no way", "blue", "invalid_adapter_name"),
        ("shared", "ops", "not_the_owner"),
        ("xxxxxx", "blue", "adapter_not_found"),
    ]
    assert max(len(json.dumps(line)) for line in lines(world.store_path)) < 1000


def test_a_change_that_a_keys_scopes_forbid_is_a_line(world: Tenants) -> None:
    with client_of(world.nobody, make_key(world.store_path, "blue", "adapters:read")) as reader:
        reader.delete(f"{ADAPTERS}/sql")
        reader.get("/metrics")
    world.green.get(f"{ADAPTERS}/sql", params={"owner": "blue"})
    world.green.patch(f"{ADAPTERS}/sql", params={"owner": "x" * 500}, json={})
    said = adapter_lines(world.store_path)
    assert [(line["action"], line["tenant"], line["detail"], line["outcome"]) for line in said] == [
        ("access", "blue", f"DELETE {ADAPTERS}/sql", "insufficient_scope"),
        ("access", "green", f"GET {ADAPTERS}/sql", "insufficient_scope"),
        ("access", "green", f"PATCH {ADAPTERS}/sql", "insufficient_scope"),
    ]
    assert [line["owner"] for line in said] == [None, "blue", "x" * 256]


def test_what_an_upload_takes_away_is_a_line(world: Tenants) -> None:
    for fill in (1.0, 2.0, 3.0):
        upload(world.blue, "sql", weights(fill))
    assert [what(line)[:4] for line in adapter_lines(world.store_path)[2:]] == [
        ("adapter.drop", "blue", "sql", 1),
        ("adapter.upload", "blue", "sql", 3),
    ]


def test_an_upload_over_an_adapter_whose_time_is_up_says_so(tmp_path: Path) -> None:
    actor = Actor(LOCAL_PRINCIPAL, "blue")
    author = AuditedAuthor("adapter.upload", actor, AuditLog(tmp_path))
    old, new = (
        AdapterVersion("blue", "sql", number, "sha256:0", "LoRA", 1, 1, 1, 100 * number, 1, 1, "sum")
        for number in (1, 2)
    )
    author.record(AdapterRecord((old,), expires_unix_seconds=150), AdapterRecord((new,)))
    assert [what(line)[:4] for line in lines(tmp_path)] == [
        ("adapter.expire", "blue", "sql", 1),
        ("adapter.upload", "blue", "sql", 2),
    ]


def test_an_admin_stands_beside_the_owner(world: Tenants) -> None:
    upload(world.admin, "sql", path=f"{ADAPTERS}?owner=blue")
    (line,) = adapter_lines(world.store_path)
    assert (line["tenant"], line["owner"]) == ("ops", "blue")


def test_keys_are_logged_without_their_secrets(tmp_path: Path) -> None:
    with keys_of(tmp_path) as keys:
        key, text = keys.create("blue", ["infer", "adapters:read"])
        keys.change_limits("blue", {"adapters": 3})
        keys.revoke(key.key_id)
    said = lines(tmp_path)
    assert [what(line)[:3] for line in said] == [
        ("key.create", "blue", key.key_id),
        ("limits.change", "blue", None),
        ("key.revoke", "blue", key.key_id),
    ]
    assert "adapters:read, infer" in said[0]["detail"]
    assert "adapters=3" in said[1]["detail"]
    assert text.rpartition("_")[2] not in (tmp_path / AUDIT_FILE).read_text()


def test_what_the_server_does_by_itself_is_logged(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    write_adapter(folder / "sql")
    write_adapter(folder / "odd", r="two")
    config = server_config(tmp_path, adapters_path=folder)
    for _ in range(2):
        with live_server(config) as client:
            upload(client, "short", weights(5.0), texts={"ttl_seconds": "1"})
            wait_until(lambda client=client: names(client.get(ADAPTERS)) == ["sql"])
            body = {"messages": HELLO, "adapter": "sql", "seed": scripted_engine.ADAPTER_DAMAGED}
            assert client.post(CHAT, json=body).status_code == 422
            wait_until(lambda client=client: client.get(f"{ADAPTERS}/sql").json()["status"] == "quarantined")
        said = [line for line in adapter_lines(config.store_path) if line["tenant"] is None]
        assert [(line["action"], line["name"], line["outcome"]) for line in said] == [
            ("adapter.import", "odd", "invalid_adapter"),
            ("adapter.import", "sql", "done"),
            ("adapter.expire", "short", "done"),
            ("adapter.quarantine", None, "done"),
        ]
        assert "sql@1" in said[-1]["detail"]
        (config.store_path / AUDIT_FILE).unlink()  # moved away by whoever rotates logs


def test_a_change_that_cannot_be_logged_is_not_made(world: Tenants) -> None:
    upload(world.blue, "sql", weights(1.0), texts={"alias": "prod"})
    before = world.blue.get(f"{ADAPTERS}/sql").json()
    log = world.store_path / AUDIT_FILE
    kept = log.read_bytes()
    log.unlink()
    log.mkdir()  # nothing can be appended to a folder
    answers = [
        upload(world.blue, "sql", weights(2.0)),
        upload(world.blue, "new", weights(3.0)),
        world.blue.patch(f"{ADAPTERS}/sql", json={"pinned": True}),
        world.blue.put(f"{ADAPTERS}/sql/aliases/test", json={"version": 1}),
        world.blue.delete(f"{ADAPTERS}/sql/aliases/prod"),
        world.blue.delete(f"{ADAPTERS}/sql"),
    ]
    assert {refusal(answer) for answer in answers} == {(503, "store_unusable", None)}
    assert world.blue.get(f"{ADAPTERS}/sql").json() == before
    assert names(world.blue.get(ADAPTERS)) == ["sql"]
    assert world.blue.post(CHAT, json={"messages": HELLO}).status_code == 200, "answers need no line"
    log.rmdir()
    log.write_bytes(kept)
    assert upload(world.blue, "sql", weights(2.0)).status_code == 201
    wait_until(lambda: len(list((world.store_path / "content").iterdir())) == 2)


def test_a_line_that_was_cut_off_does_not_spoil_the_next(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    log.append([AuditEntry("one")])
    path = tmp_path / AUDIT_FILE
    path.write_bytes(path.read_bytes() + b'{"time": "20')
    log.append([AuditEntry("two"), AuditEntry("three")])
    kept = path.read_text().splitlines()
    assert [json.loads(line)["action"] for line in (kept[0], *kept[2:])] == ["one", "two", "three"]


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    (tmp_path / AUDIT_FILE).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        AuditLog(tmp_path).append([AuditEntry("one")])


def test_lines_of_many_writers_stay_whole(tmp_path: Path) -> None:
    def write(number: int) -> None:
        log = AuditLog(tmp_path)
        for _ in range(20):
            log.append([AuditEntry("change", detail=str(number) * 500)])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(tmp_path)) == 100
