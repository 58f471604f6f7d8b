"""Adapters over HTTP: uploaded while the server runs, used at once, replaced, deleted, and refused with reasons."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

import scripted_engine
from heddle_adapters.positions import Positions
from heddle_server.api.adapter_card import positions_text
from live_server import live_server, server_config, wait_until
from test_http_api import CHAT, HELLO, metric, refusal

ADAPTERS = "/v1/adapters"
VALIDATE = f"{ADAPTERS}/validate"
EVICTIONS = 'heddle_adapter_evictions_total{tier="device"}'
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
PREFIX = f"base_model.model.{scripted_engine.SITE.path}"


def weights(fill: float = 1.0, rank: int = 2, width: int = 8) -> bytes:
    return save(
        {
            f"{PREFIX}.lora_A.weight": np.full((rank, width), fill, np.float32),
            f"{PREFIX}.lora_B.weight": np.full((8, rank), fill, np.float32),
        }
    )


def upload(
    client: httpx.Client,
    name: str | None,
    content: bytes | None = None,
    config: dict[str, Any] | bytes = CONFIG,
    path: str = ADAPTERS,
    texts: dict[str, str] | None = None,
) -> httpx.Response:
    config_bytes = config if isinstance(config, bytes) else json.dumps(config).encode()
    files = {
        "adapter_config.json": ("a.json", config_bytes),
        "adapter_model.safetensors": ("b.bin", weights() if content is None else content),
    }
    return client.post(path, data={**({} if name is None else {"name": name}), **(texts or {})}, files=files)


def names(response: httpx.Response) -> list[str]:
    """Of a page of adapters; checks the page's shape on the way."""
    page = response.json()
    assert set(page) == {"object", "data", "first_id", "last_id", "has_more"}
    listed: list[str] = [card["name"] for card in page["data"]]
    assert (page["first_id"], page["last_id"]) == ((listed[0], listed[-1]) if listed else (None, None))
    return listed


@pytest.fixture
def store(client: httpx.Client) -> Iterator[None]:
    """Deletes what a test has uploaded."""
    yield
    for card in client.get(ADAPTERS).json()["data"]:
        client.delete(f"{ADAPTERS}/{card['name']}")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with live_server(server_config(tmp_path_factory.mktemp("server"), max_upload_bytes=1 << 16)) as client:
        yield client


@pytest.mark.usefixtures("store")
def test_an_upload_serves_the_very_next_request(client: httpx.Client) -> None:
    response = upload(client, "pirate")
    assert response.status_code == 201
    card = response.json()
    assert card.pop("is_new_version")
    assert card["digest"].startswith("sha256:")
    assert card == {
        "id": "pirate",
        "object": "adapter",
        "name": "pirate",
        "version": 1,
        "reference": "pirate@1",
        "digest": card["digest"],
        "method": "LoRA",
        "rank": 2,
        "combination": "sum",
        "sites": {"model.layers.*.self_attn.q_proj": 1},
        "positions": "all tokens",
        "num_virtual_tokens": 0,
        "size_bytes": len(weights()),
        "pool_bytes_estimate": 2 * (8 + 8) * 4,
        "pool_pages": 1,
        "status": "ready",
        "reason": None,
        "tier": "disk",
        "created": card["created"],
        "owner": "local",
        "visibility": "private",
        "pinned": False,
        "expires": None,
        "tags": [],
        "description": "",
        "aliases": {},
        "num_versions": 1,
    }
    by_adapter = client.post(CHAT, json={"messages": HELLO, "adapter": "pirate"}).json()
    by_model = client.post(CHAT, json={"messages": HELLO, "model": "pirate"}).json()
    both = client.post(CHAT, json={"messages": HELLO, "model": "pirate", "adapter": "pirate"}).json()
    for reply in (by_adapter, by_model, both):
        assert {"adapter": "pirate", "version": 1, "digest": card["digest"]}.items() <= reply["heddle"].items()
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["scripted-model", "pirate"]
    assert client.get("/v1/models/pirate").json()["parent"] == "scripted-model"


def test_uploads_survive_a_restart(tmp_path: Path) -> None:
    config = server_config(tmp_path)
    with live_server(config) as client:
        card = upload(client, "pirate").json()
    with live_server(config) as client:
        del card["is_new_version"]
        assert client.get(f"{ADAPTERS}/pirate").json() == card
        assert client.post(CHAT, json={"messages": HELLO, "adapter": "pirate"}).status_code == 200


@pytest.mark.parametrize(
    ("positions", "text"),
    [
        (Positions(), "all tokens"),
        (Positions(invocation=(1,)), "its invocation and all that follows"),
        (Positions(num_first=4, num_last=3), "the first 4 and the last 3 tokens of the prompt"),
        (Positions(num_last=1), "the last 1 token of the prompt"),
    ],
)
def test_what_it_acts_on_in_words(positions: Positions, text: str) -> None:
    assert positions_text(positions) == text


@pytest.mark.usefixtures("store")
def test_a_second_upload_is_a_new_version(client: httpx.Client) -> None:
    first = upload(client, "sailor").json()
    second = upload(client, "sailor", weights(2.0)).json()
    assert (first["version"], second["version"]) == (1, 2)
    reply = client.post(CHAT, json={"messages": HELLO, "adapter": "sailor"}).json()
    assert reply["heddle"]["digest"] == second["digest"]
    versions = client.get(f"{ADAPTERS}/sailor/versions").json()
    assert versions["object"] == "list"
    assert [each["id"] for each in versions["data"]] == ["sailor@1", "sailor@2"]
    assert [each["digest"] for each in versions["data"]] == [first["digest"], second["digest"]]
    assert client.get(f"{ADAPTERS}/sailor").json()["num_versions"] == 2
    for reference in ("sailor@1", f"sailor@{first['digest']}"):
        old = client.get(f"{ADAPTERS}/{reference}").json()
        assert (old["id"], old["version"], old["digest"]) == ("sailor@1", 1, first["digest"])
        reply = client.post(CHAT, json={"messages": HELLO, "adapter": reference}).json()
        assert reply["heddle"]["digest"] == first["digest"]


@pytest.mark.usefixtures("store")
def test_a_running_request_keeps_its_version_and_the_engine_forgets_it_after(client: httpx.Client) -> None:
    card = upload(client, "pirate").json()
    forgotten = metric(client, EVICTIONS)
    body = {"messages": HELLO, "adapter": "pirate", "seed": scripted_engine.NEVER_ENDS, "stream": True}
    with client.stream("POST", CHAT, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert client.delete(f"{ADAPTERS}/pirate").json() == {
            "id": "pirate",
            "object": "adapter.deleted",
            "deleted": True,
            "versions": [{"version": card["version"], "digest": card["digest"]}],
            "draining": 1,
        }
        assert refusal(client.post(CHAT, json={"messages": HELLO, "adapter": "pirate"}))[1] == "adapter_not_found"
        next(line for line in lines if "x" in line)
        assert metric(client, EVICTIONS) == forgotten
    wait_until(lambda: metric(client, EVICTIONS) == forgotten + 1)


@pytest.mark.usefixtures("store")
def test_unknown_adapters_tell_the_nearest_names(client: httpx.Client) -> None:
    upload(client, "pirate")
    for response in (
        client.post(CHAT, json={"messages": HELLO, "adapter": "pirat"}),
        client.get(f"{ADAPTERS}/pirat"),
        client.delete(f"{ADAPTERS}/pirat"),
    ):
        assert refusal(response) == (404, "adapter_not_found", "adapter")
        assert "pirate" in response.json()["error"]["message"]
    model = client.post(CHAT, json={"messages": HELLO, "model": "pirat"})
    assert refusal(model) == (404, "model_not_found", "model")
    assert "'pirate'" in model.json()["error"]["message"]
    conflict = client.post(CHAT, json={"messages": HELLO, "model": "pirate", "adapter": "other"})
    assert refusal(conflict) == (400, "adapter_conflict", "adapter")


NAN = weights(float("nan"))
TOO_LARGE, TOO_LARGE_CONFIG = weights(rank=600), {**CONFIG, "r": 600}  # 38,400 bytes of a pool of 32,768
PINNED = {"pinned": "true"}
HALF, HALF_CONFIG = weights(rank=256), {**CONFIG, "r": 256}  # 4 of 8 pages, and 4 are a context of 64 tokens
INCOMPATIBLE = (422, "adapter_incompatible")
INVALID = (422, "invalid_adapter")


@pytest.mark.parametrize(
    ("name", "content", "config", "expected"),
    [
        pytest.param("a", weights(width=16), CONFIG, INCOMPATIBLE, id="wrong shapes"),
        pytest.param(
            "a", weights(), {**CONFIG, "heddle_base_fingerprint": "sha256:" + "f" * 64}, INCOMPATIBLE, id="other base"
        ),
        pytest.param("a", save({"who.knows": np.ones(4, np.float32)}), CONFIG, INVALID, id="unknown keys"),
        pytest.param("a", NAN, CONFIG, INVALID, id="nan"),
        pytest.param("a", b"PK\x03\x04" + b"x" * 100, CONFIG, INVALID, id="pickle"),
        pytest.param("a", weights()[:-8], CONFIG, INVALID, id="truncated"),
        pytest.param("a", weights(), {**CONFIG, "r": 0}, INVALID, id="rank of zero"),
        pytest.param("a", weights(), b"{", INVALID, id="config is not JSON"),
        pytest.param("a/b/c", weights(), CONFIG, (400, "invalid_adapter_name"), id="two slashes"),
        pytest.param("a/versions", weights(), CONFIG, (400, "invalid_adapter_name"), id="address of a list"),
        pytest.param("a@1", weights(), CONFIG, (400, "invalid_adapter_name"), id="a version chosen"),
        pytest.param("a,b", weights(), CONFIG, (400, "invalid_adapter_name"), id="comma"),
        pytest.param("../../etc", weights(), CONFIG, (400, "invalid_adapter_name"), id="path"),
        pytest.param("base", weights(), CONFIG, (400, "invalid_adapter_name"), id="reserved"),
        pytest.param("scripted-model", weights(), CONFIG, (400, "invalid_adapter_name"), id="the base's own name"),
        pytest.param("", weights(), CONFIG, (400, "invalid_adapter_name"), id="empty"),
        pytest.param("a", b"x" * (1 << 16), CONFIG, (413, "body_too_large"), id="over the limit"),
        pytest.param("a", TOO_LARGE, TOO_LARGE_CONFIG, (413, "adapter_too_large"), id="over the pool"),
    ],
)
def test_refused_uploads_change_nothing(
    client: httpx.Client, name: str, content: bytes, config: dict[str, Any] | bytes, expected: tuple[int, str]
) -> None:
    assert refusal(upload(client, name, content, config))[:2] == expected
    assert refusal(upload(client, name, content, config, VALIDATE))[:2] == expected
    assert names(client.get(ADAPTERS)) == []
    assert client.post(CHAT, json={"messages": HELLO}).status_code == 200


def test_uploads_that_are_not_multipart_or_lack_a_part(client: httpx.Client) -> None:
    assert refusal(client.post(ADAPTERS, json={"name": "a"})) == (400, "invalid_request", None)
    assert refusal(client.post(ADAPTERS, files={"name": (None, "a")})) == (
        400,
        "invalid_request",
        "adapter_config.json",
    )
    assert refusal(upload(client, None)) == (400, "invalid_request", "name")
    assert refusal(client.post(ADAPTERS, files={"weights": (None, "a")})) == (400, "unknown_parameter", "weights")
    twice = client.post(ADAPTERS, files=[("name", (None, "a")), ("name", (None, "b"))])
    assert refusal(twice) == (400, "invalid_request", "name")
    boundary = {"content-type": "multipart/form-data; boundary=x"}
    cut = b'--x\r\ncontent-disposition: form-data; name="name"\r\n\r\na'
    assert refusal(client.post(ADAPTERS, content=cut, headers=boundary)) == (400, "invalid_request", None)
    assert refusal(client.post(ADAPTERS, content=b"nonsense", headers=boundary)) == (400, "invalid_request", None)
    long_boundary = {"content-type": "multipart/form-data; boundary=" + "x" * 300}
    assert refusal(client.post(ADAPTERS, content=cut, headers=long_boundary)) == (400, "invalid_request", None)


def test_a_refusal_reaches_a_client_that_is_still_sending(client: httpx.Client) -> None:
    big = b"x" * (4 << 20)
    assert refusal(client.post(ADAPTERS, files={"weights": ("w", big)}))[:2] == (413, "body_too_large")
    chunks = (big[:100_000] for _ in range(40))
    assert refusal(client.post(ADAPTERS, content=chunks, headers={"content-type": "text/plain"}))[0] == 400


@pytest.mark.usefixtures("store")
def test_parts_may_be_text_and_of_any_order(client: httpx.Client) -> None:
    files: dict[str, tuple[str | None, bytes]] = {
        "adapter_model.safetensors": ("w", weights()),
        "adapter_config.json": (None, json.dumps(CONFIG).encode()),
        "name": (None, b"pirate"),
    }
    assert client.post(ADAPTERS, files=files).status_code == 201


def test_an_upload_cut_off_leaves_nothing_behind(client: httpx.Client, tmp_path: Path) -> None:
    def half() -> Iterator[bytes]:
        yield b'--x\r\ncontent-disposition: form-data; name="adapter_model.safetensors"\r\n\r\n'
        raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        client.post(ADAPTERS, content=half(), headers={"content-type": "multipart/form-data; boundary=x"})
    assert client.get(ADAPTERS).json()["data"] == []


@pytest.mark.parametrize(
    ("texts", "param"),
    [
        ({"pinned": "yes"}, "pinned"),
        ({"ttl_seconds": "-1"}, "ttl_seconds"),
        ({"ttl_seconds": "9" * 30}, "ttl_seconds"),
        ({"ttl_seconds": "1.5"}, "ttl_seconds"),
        ({"alias": "latest"}, "alias"),
        ({"alias": "3"}, "alias"),
        ({"tags": "x" * 100}, "tags"),
        ({"tags": "x" * 9000}, "tags"),
        ({"description": "x" * 3000}, "description"),
        ({"color": "red"}, "color"),
    ],
)
def test_details_of_an_upload_that_are_refused(client: httpx.Client, texts: dict[str, str], param: str) -> None:
    for path in (ADAPTERS, VALIDATE):
        status, _, refused = refusal(upload(client, "a", path=path, texts=texts))
        assert (status in (400, 413), refused) == (True, param)
    assert names(client.get(ADAPTERS)) == []


def test_a_part_that_is_no_text_is_refused(client: httpx.Client) -> None:
    files = {
        "name": (None, b"a"),
        "description": (None, b"\xff"),
        "adapter_config.json": (None, b"{}"),
        "adapter_model.safetensors": ("w", weights()),
    }
    assert refusal(client.post(ADAPTERS, files=files)) == (400, "invalid_request", "description")


@pytest.mark.usefixtures("store")
def test_an_upload_says_what_it_is_for(client: httpx.Client) -> None:
    said = {"alias": "prod", "tags": "sql, finance,", "description": "Queries", "pinned": "true", "ttl_seconds": "3600"}
    card = upload(client, "team/sql", texts=said).json()
    version = card["version"]
    assert (card["aliases"], card["tags"], card["description"]) == ({"prod": version}, ["sql", "finance"], "Queries")
    assert card["pinned"] is True
    assert card["created"] + 3600 <= card["expires"] <= card["created"] + 3602
    assert client.get(f"{ADAPTERS}/team/sql@prod").json()["version"] == version
    again = upload(
        client, "team/sql", weights(2.0), texts={"alias": "prod", "tags": "", "pinned": "", "ttl_seconds": "0"}
    ).json()
    assert (again["version"], again["aliases"]) == (version + 1, {"prod": version + 1})
    assert (again["tags"], again["pinned"], again["expires"]) == (["sql", "finance"], True, None)


@pytest.mark.usefixtures("store")
def test_the_same_content_again_is_no_new_version_and_says_so(client: httpx.Client) -> None:
    first, again, other = (upload(client, "twice", weights(value)) for value in (7.0, 7.0, 8.0))
    assert [each.status_code for each in (first, again, other)] == [201, 200, 201]
    assert [each.json()["is_new_version"] for each in (first, again, other)] == [True, False, True]
    assert again.json()["version"] == first.json()["version"] == other.json()["version"] - 1


@pytest.mark.usefixtures("store")
def test_a_dry_run_says_everything_and_stores_nothing(client: httpx.Client) -> None:
    upload(client, "dry", weights(3.0))
    new = upload(client, "wet", path=VALIDATE, texts={"tags": "sea"}).json()
    assert new == {
        "object": "adapter.validation",
        "valid": True,
        "card": new["card"],
        "memory": {"bytes": 128, "pages": 1, "pool_share": 0.125, "rows": 2},
        "name_exists": False,
        "is_new_version": True,
        "is_stored": False,
        "stored_as": [],
    }
    real = upload(client, "wet", texts={"tags": "sea"}).json()
    assert {*new["card"], "is_new_version"} == set(real)
    decided_later = {"version", "reference", "created", "num_versions", "is_new_version"}
    for field in set(real) - decided_later:
        assert new["card"][field] == real[field], field
    same = upload(client, "wet", path=VALIDATE).json()
    assert (same["name_exists"], same["is_new_version"], same["stored_as"]) == (True, False, ["wet@1"])
    assert same["card"]["reference"] == "wet@1"
    other = upload(client, "dry", path=VALIDATE).json()
    assert (other["name_exists"], other["is_new_version"], other["is_stored"]) == (True, True, True)
    nameless = upload(client, None, path=VALIDATE).json()
    assert (nameless["card"]["name"], nameless["name_exists"]) == (None, False)
    assert names(client.get(ADAPTERS)) == ["dry", "wet"]
    assert [each["num_versions"] for each in client.get(ADAPTERS).json()["data"]] == [1, 1]


@pytest.mark.usefixtures("store")
def test_lists_are_filtered_ordered_and_paged(client: httpx.Client) -> None:
    upload(client, "b/sql", texts={"tags": "x"})
    upload(client, "a", texts={"tags": "x,y", "pinned": "true"})
    upload(client, "c", weights(2.0))
    everything = ["a", "b/sql", "c"]
    filters: list[tuple[dict[str, str], list[str]]] = [
        ({}, everything),
        ({"order": "desc"}, everything[::-1]),
        ({"limit": "3"}, everything),
        ({"q": "SQ"}, ["b/sql"]),
        ({"tag": "x"}, ["a", "b/sql"]),
        ({"tag": "y"}, ["a"]),
        ({"method": "lora"}, everything),
        ({"method": "IA3"}, []),
        ({"status": "ready"}, everything),
        ({"status": "quarantined"}, []),
        ({"pinned": "true"}, ["a"]),
        ({"pinned": "false"}, ["b/sql", "c"]),
        ({"after": "a"}, ["b/sql", "c"]),
        ({"after": "b"}, ["b/sql", "c"]),
        ({"after": "b/sql", "order": "desc"}, ["a"]),
    ]
    for query, expected in filters:
        assert names(client.get(ADAPTERS, params=query)) == expected, query
    client.post(CHAT, json={"messages": HELLO, "adapter": "c"})
    wait_until(lambda: "c" in names(client.get(ADAPTERS, params={"tier": "device"})))
    assert "c" not in names(client.get(ADAPTERS, params={"tier": "disk"}))


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_follow_each_other_whatever_is_deleted_between_them(client: httpx.Client, order: str) -> None:
    expected = ["a", "b", "c", "d", "e"]
    for name in expected:
        upload(client, name)
    if order == "desc":
        expected.reverse()
    query = {"limit": "2", "order": order}
    first = client.get(ADAPTERS, params=query)
    assert (names(first), first.json()["has_more"]) == (expected[:2], True)
    client.delete(f"{ADAPTERS}/{expected[1]}")
    second = client.get(ADAPTERS, params={**query, "after": expected[1]})
    assert (names(second), second.json()["has_more"]) == (expected[2:4], True)
    third = client.get(ADAPTERS, params={**query, "after": expected[3]})
    assert (names(third), third.json()["has_more"]) == (expected[4:], False)


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [
        ({"limit": "0"}, "invalid_request", "limit"),
        ({"limit": "1001"}, "invalid_request", "limit"),
        ({"limit": "x"}, "invalid_request", "limit"),
        ({"order": "up"}, "invalid_request", "order"),
        ({"status": "new"}, "invalid_request", "status"),
        ({"tier": "gpu"}, "invalid_request", "tier"),
        ({"pinned": "maybe"}, "invalid_request", "pinned"),
        ({"q": "x" * 300}, "invalid_request", "q"),
        ({"page": "2"}, "unknown_parameter", "page"),
    ],
)
def test_list_queries_that_are_refused(client: httpx.Client, query: dict[str, str], code: str, param: str) -> None:
    assert refusal(client.get(ADAPTERS, params=query)) == (400, code, param)


@pytest.mark.usefixtures("store")
def test_what_is_said_about_a_name_can_change(client: httpx.Client) -> None:
    said = {"description": "old", "tags": "a", "pinned": "true", "ttl_seconds": "3600"}
    upload(client, "team/sql", texts=said)
    changes = {"description": "new", "tags": ["b", "c"], "pinned": False}
    card = client.patch(f"{ADAPTERS}/team/sql", json=changes).json()
    assert (card["description"], card["tags"], card["pinned"]) == ("new", ["b", "c"], False)
    assert card["expires"] is not None
    unchanged = client.patch(f"{ADAPTERS}/team/sql", json={"description": None}).json()
    assert (unchanged["description"], unchanged["tags"]) == ("new", ["b", "c"])
    cleared = client.patch(f"{ADAPTERS}/team/sql", json={"description": "", "tags": [], "ttl_seconds": 0}).json()
    assert (cleared["description"], cleared["tags"], cleared["expires"]) == ("", [], None)


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"name": "other"}, (400, "unknown_parameter", "name")),
        ({"pinned": "true"}, (400, "invalid_request", "pinned")),
        ({"pinned": 1}, (400, "invalid_request", "pinned")),
        ({"tags": "a,b"}, (400, "invalid_request", "tags")),
        ({"tags": [1]}, (400, "invalid_request", "tags.0")),
        ({"tags": ["a,b"]}, (400, "invalid_adapter_request", "tags")),
        ({"ttl_seconds": -1}, (400, "invalid_adapter_request", "ttl_seconds")),
        ({"ttl_seconds": 10**30}, (400, "invalid_adapter_request", "ttl_seconds")),
        ({"ttl_seconds": 1.5}, (400, "invalid_request", "ttl_seconds")),
        ({"description": "x" * 5000}, (400, "invalid_adapter_request", "description")),
        ([], (400, "invalid_request", None)),
    ],
)
def test_changes_that_are_refused(client: httpx.Client, body: object, expected: tuple[int, str, str | None]) -> None:
    card = upload(client, "pirate").json()
    assert refusal(client.patch(f"{ADAPTERS}/pirate", json=body)) == expected
    now = client.get(f"{ADAPTERS}/pirate").json()
    assert {**card, **now, "tier": card["tier"]} == card


def test_changes_of_what_is_not_there(client: httpx.Client) -> None:
    missing = (404, "adapter_not_found", "adapter")
    assert refusal(client.patch(f"{ADAPTERS}/nobody", json={})) == missing
    assert refusal(client.put(f"{ADAPTERS}/nobody/aliases/prod", json={"version": 1})) == missing
    assert refusal(client.delete(f"{ADAPTERS}/nobody/aliases/prod")) == missing
    assert refusal(client.get(f"{ADAPTERS}/nobody/versions")) == missing


@pytest.mark.parametrize("path", ["%00", "a%2F..%2Fb", "a/b/c/d", "%ED%A0%80", "x" * 1000, "a@b@c", "@", "a@", "%0A"])
def test_addresses_that_mean_nothing(client: httpx.Client, path: str) -> None:
    address = f"{ADAPTERS}/{path}"
    replies = [
        client.get(address),
        client.delete(address),
        client.patch(address, json={}),
        client.get(f"{address}/versions"),
        client.put(f"{address}/aliases/prod", json={"version": 1}),
        client.delete(f"{address}/aliases/prod"),
        client.put(f"{ADAPTERS}/a/aliases/{path}", json={"version": 1}),
    ]
    assert all(refusal(reply)[0] in (400, 404, 405) for reply in replies), [reply.text for reply in replies]


@pytest.mark.usefixtures("store")
def test_an_alias_moves_and_says_what_it_meant(client: httpx.Client) -> None:
    first = upload(client, "team/alias").json()
    second = upload(client, "team/alias", weights(2.0)).json()
    address = f"{ADAPTERS}/team/alias/aliases/prod"
    assert client.put(address, json={"version": 1}).json() == {
        "object": "adapter.alias",
        "name": "team/alias",
        "alias": "prod",
        "version": 1,
        "digest": first["digest"],
        "previous": None,
    }
    meant_first = {"version": 1, "digest": first["digest"]}
    for target in ("2", "latest", second["digest"]):
        moved = client.put(address, json={"target": target}).json()
        assert (moved["version"], moved["previous"]) == (2, meant_first)
        reply = client.post(CHAT, json={"messages": HELLO, "adapter": "team/alias@prod"}).json()
        assert reply["heddle"]["digest"] == second["digest"]
        client.put(address, json={"version": 1})
    assert client.put(f"{ADAPTERS}/team/alias/aliases/stable", json={"target": "prod"}).json()["version"] == 1
    assert client.get(f"{ADAPTERS}/team/alias").json()["aliases"] == {"prod": 1, "stable": 1}
    assert client.get(f"{ADAPTERS}/team/alias/versions").json()["data"][0]["aliases"] == ["prod", "stable"]
    gone = {"object": "adapter.alias.deleted", "name": "team/alias", "alias": "prod", **meant_first, "deleted": True}
    assert client.delete(address).json() == gone
    assert refusal(client.delete(address)) == (404, "adapter_not_found", "adapter")
    assert refusal(client.get(f"{ADAPTERS}/team/alias@prod")) == (404, "adapter_not_found", "adapter")


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("alias", "body", "expected"),
    [
        ("prod", {}, (400, "invalid_request", "target")),
        ("prod", {"version": 1, "target": "1"}, (400, "invalid_request", "target")),
        ("prod", {"version": "1"}, (400, "invalid_request", "version")),
        ("prod", {"version": True}, (400, "invalid_request", "version")),
        ("prod", {"version": 0}, (400, "invalid_request", "version")),
        ("prod", {"version": 10**30}, (400, "invalid_request", "version")),
        ("prod", {"version": 9}, (404, "adapter_not_found", "adapter")),
        ("prod", {"target": "../x"}, (404, "adapter_not_found", "adapter")),
        ("prod", {"target": "x", "force": True}, (400, "unknown_parameter", "force")),
        ("latest", {"version": 1}, (400, "invalid_adapter_name", "alias")),
        ("7", {"version": 1}, (400, "invalid_adapter_name", "alias")),
    ],
)
def test_aliases_that_are_refused(
    client: httpx.Client, alias: str, body: dict[str, object], expected: tuple[int, str, str]
) -> None:
    upload(client, "pirate")
    assert refusal(client.put(f"{ADAPTERS}/pirate/aliases/{alias}", json=body)) == expected
    assert client.get(f"{ADAPTERS}/pirate").json()["aliases"] == {}


@pytest.mark.usefixtures("store")
def test_one_version_can_be_deleted(client: httpx.Client) -> None:
    first = upload(client, "third").json()
    upload(client, "third", weights(2.0), texts={"alias": "prod"})
    assert refusal(client.delete(f"{ADAPTERS}/third@prod")) == (400, "invalid_adapter_request", "adapter")
    deleted = client.delete(f"{ADAPTERS}/third@1").json()
    assert (deleted["versions"], deleted["draining"]) == ([{"version": 1, "digest": first["digest"]}], 0)
    assert [each["version"] for each in client.get(f"{ADAPTERS}/third/versions").json()["data"]] == [2]
    assert client.delete(f"{ADAPTERS}/third").json()["versions"][0]["version"] == 2
    assert upload(client, "third").json()["version"] == 3


@pytest.mark.usefixtures("store")
def test_pins_leave_room_for_one_context(client: httpx.Client) -> None:
    assert upload(client, "half", HALF, HALF_CONFIG, texts=PINNED).status_code == 201
    wait_until(lambda: client.get(f"{ADAPTERS}/half").json()["tier"] == "device")
    upload(client, "small")
    refused = client.patch(f"{ADAPTERS}/small", json={"pinned": True})
    assert refusal(refused) == (409, "pin_capacity", "pinned")
    for size in ("20480", "16384", "32768"):
        assert size in refused.json()["error"]["message"]
    assert refusal(upload(client, "small", weights(2.0), texts=PINNED))[:2] == (409, "pin_capacity")
    larger = weights(rank=400), {**CONFIG, "r": 400}
    assert refusal(upload(client, "half", *larger))[:2] == (409, "pin_capacity")
    assert refusal(upload(client, "x", weights(2.0), path=VALIDATE, texts=PINNED))[:2] == (409, "pin_capacity")
    # The same content under another name takes nothing more.
    assert upload(client, "twin", HALF, HALF_CONFIG, texts=PINNED).status_code == 201
    assert [card["pinned"] for card in client.get(ADAPTERS).json()["data"]] == [True, False, True]
    client.patch(f"{ADAPTERS}/half", json={"pinned": False})
    client.delete(f"{ADAPTERS}/twin")
    assert client.patch(f"{ADAPTERS}/small", json={"pinned": True}).status_code == 200


@pytest.mark.usefixtures("store")
def test_adapters_go_when_their_time_is_up(client: httpx.Client) -> None:
    upload(client, "brief", texts={"ttl_seconds": "1"})
    upload(client, "pirate", weights(2.0))
    wait_until(lambda: names(client.get(ADAPTERS)) == ["pirate"])


@pytest.mark.usefixtures("store")
def test_damaged_content_is_quarantined_until_it_is_uploaded_again(client: httpx.Client) -> None:
    upload(client, "pirate")
    upload(client, "sailor", weights(2.0))
    body = {"messages": HELLO, "adapter": "pirate", "seed": scripted_engine.ADAPTER_DAMAGED}
    assert refusal(client.post(CHAT, json=body))[:2] == (422, "adapter_damaged")
    wait_until(lambda: names(client.get(ADAPTERS, params={"status": "quarantined"})) == ["pirate"])
    assert "damaged" in client.get(f"{ADAPTERS}/pirate").json()["reason"]
    assert refusal(client.post(CHAT, json={"messages": HELLO, "adapter": "pirate"}))[:2] == (422, "adapter_damaged")
    assert client.post(CHAT, json={"messages": HELLO, "adapter": "sailor"}).status_code == 200
    assert upload(client, "pirate").json()["status"] == "ready"
    assert client.post(CHAT, json={"messages": HELLO, "adapter": "pirate"}).status_code == 200
