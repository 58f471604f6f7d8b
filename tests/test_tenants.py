"""Several teams on one server: what another tenant has is, over every route, as if it were not there."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

import scripted_engine
from heddle_server.top import run_top
from live_server import server_config, wait_until
from tenant_keys import Tenants, client_of, make_key, tenants
from test_adapter_api import ADAPTERS, VALIDATE, names, upload, weights
from test_http_api import CHAT, HELLO, refusal
from test_registry import import_once, write_adapter

COMPLETIONS = "/v1/completions"
MODELS = "/v1/models"
CACHE = "/v1/cache"
SECRET = "secret-sql"

Ask = Callable[[httpx.Client, str], httpx.Response]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    """One server for many tests, each with names of its own."""
    with tenants(server_config(tmp_path_factory.mktemp("server"), max_upload_bytes=1 << 16)) as world:
        yield world


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Tenants]:
    with tenants(server_config(tmp_path, max_upload_bytes=1 << 16)) as world:
        yield world


def chat(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post(CHAT, json={"messages": HELLO, **body})


def publish(client: httpx.Client, name: str, visibility: str = "public", owner: str | None = None) -> httpx.Response:
    params = {} if owner is None else {"owner": owner}
    return client.patch(f"{ADAPTERS}/{name}", json={"visibility": visibility}, params=params)


ROUTES: dict[str, Ask] = {
    "card": lambda client, name: client.get(f"{ADAPTERS}/{name}"),
    "card of a version": lambda client, name: client.get(f"{ADAPTERS}/{name}@1"),
    "card of an alias": lambda client, name: client.get(f"{ADAPTERS}/{name}@prod"),
    "card of a digest": lambda client, name: client.get(f"{ADAPTERS}/{name}@sha256:{'0' * 64}"),
    "card, mistyped": lambda client, name: client.get(f"{ADAPTERS}/{name}x"),
    "versions": lambda client, name: client.get(f"{ADAPTERS}/{name}/versions"),
    "change": lambda client, name: client.patch(f"{ADAPTERS}/{name}", json={"description": "mine"}),
    "publish": lambda client, name: publish(client, name),
    "pin": lambda client, name: client.patch(f"{ADAPTERS}/{name}", json={"pinned": True}),
    "delete": lambda client, name: client.delete(f"{ADAPTERS}/{name}"),
    "delete a version": lambda client, name: client.delete(f"{ADAPTERS}/{name}@1"),
    "delete an alias's": lambda client, name: client.delete(f"{ADAPTERS}/{name}@prod"),
    "set an alias": lambda client, name: client.put(f"{ADAPTERS}/{name}/aliases/prod", json={"version": 1}),
    "remove an alias": lambda client, name: client.delete(f"{ADAPTERS}/{name}/aliases/prod"),
    "list by name": lambda client, name: client.get(ADAPTERS, params={"q": name}),
    "list after": lambda client, name: client.get(ADAPTERS, params={"after": name[:-1], "q": name}),
    "list by tag": lambda client, name: client.get(ADAPTERS, params={"tag": "hidden", "q": name}),
    "model": lambda client, name: client.get(f"{MODELS}/{name}"),
    "model of a version": lambda client, name: client.get(f"{MODELS}/{name}@1"),
    "model, mistyped": lambda client, name: client.get(f"{MODELS}/{name}x"),
    "delete the model": lambda client, name: client.delete(f"{MODELS}/{name}"),
    "chat": lambda client, name: chat(client, adapter=name),
    "chat by model": lambda client, name: chat(client, model=name),
    "chat with a version": lambda client, name: chat(client, adapter=f"{name}@1"),
    "chat with a mix": lambda client, name: chat(client, adapter=["mine", name]),
    "chat, streamed": lambda client, name: chat(client, adapter=name, stream=True),
    "completion": lambda client, name: client.post(COMPLETIONS, json={"prompt": "Hi", "adapter": name}),
    "completion by model": lambda client, name: client.post(COMPLETIONS, json={"prompt": "Hi", "model": name}),
    "dry run": lambda client, name: upload(client, name, weights(8.0), path=VALIDATE),
    "dry run, public": lambda client, name: upload(
        client, name, weights(8.0), path=VALIDATE, texts={"visibility": "public"}
    ),
    "upload": lambda client, name: upload(client, name, weights(9.0)),
}


def told(response: httpx.Response, name: str) -> tuple[int, str, str | None]:
    """Status, body and type, but for the name that was asked for and what differs between any two answers."""
    body = re.sub(
        r'"(created|step_seconds|host_seconds|steps|segments|idle_seconds)": ?[0-9.]+', r'"\1": 0', response.text
    )
    return response.status_code, body.replace(name, "NAME"), response.headers.get("content-type")


@pytest.mark.parametrize("victim", ["blue", "local"])
@pytest.mark.parametrize("number", range(len(ROUTES)), ids=list(ROUTES))
def test_another_tenants_adapter_is_like_a_missing_one(shared: Tenants, victim: str, number: int) -> None:
    owner, ask = getattr(shared, victim), list(ROUTES.values())[number]
    secret, absent = (f"{word}-{victim}-{number}" for word in ("secret", "absent"))
    texts = {"alias": "prod", "tags": "hidden", "description": "of no concern"}
    assert upload(owner, secret, weights(8.0), texts=texts).status_code == 201
    upload(shared.green, "mine", weights(3.0))
    before = owner.get(f"{ADAPTERS}/{secret}").json()
    answers = [told(ask(shared.green, name), name) for name in (secret, absent)]
    assert answers[0] == answers[1]
    assert owner.get(f"{ADAPTERS}/{secret}").json() == before
    assert chat(owner, adapter=secret).status_code == 200


@pytest.mark.parametrize("victim", ["blue", "local"])
def test_lists_are_as_if_others_had_nothing(world: Tenants, victim: str) -> None:
    upload(world.green, "mine", weights(3.0))
    chat(world.green, adapter="mine")
    before = [world.green.get(path).text for path in (MODELS, ADAPTERS)]
    upload(getattr(world, victim), SECRET, weights(8.0), texts={"pinned": "true"})
    chat(getattr(world, victim), adapter=SECRET)
    assert [world.green.get(path).text for path in (MODELS, ADAPTERS)] == before
    cache = world.green.get(CACHE)
    assert SECRET not in cache.text
    assert [each["names"] for each in cache.json()["adapters"]] == [["mine@1"]]
    assert (cache.json()["num_adapters"], cache.json()["num_other_adapters"]) == (2, 1)


def test_the_same_content_of_another_tenant_does_not_show(world: Tenants) -> None:
    """But for how long a load takes, and so which tier it comes from: documented in docs/tenants.md."""
    upload(world.blue, SECRET, weights(8.0), texts={"pinned": "true"})
    assert chat(world.blue, adapter=SECRET).status_code == 200
    shared, own = (upload(world.green, "copy", weights(fill), path=VALIDATE).json() for fill in (8.0, 9.0))
    for report in (shared, own):
        report["card"].pop("digest")
    assert shared == own
    assert (shared["is_stored"], shared["stored_as"], shared["card"]["tier"]) == (False, [], "disk")
    response = upload(world.green, "copy", weights(8.0))
    assert (response.status_code, response.json()["is_new_version"]) == (201, True)
    cached = next(each for each in world.green.get(CACHE).json()["adapters"] if each["names"] == ["copy@1"])
    assert {key: cached[key] for key in ("pinned", "uses", "references", "waiting", "idle_seconds")} == {
        "pinned": False,
        "uses": None,
        "references": None,
        "waiting": None,
        "idle_seconds": None,
    }
    body = {"messages": HELLO, "adapter": SECRET, "seed": scripted_engine.NEVER_ENDS, "stream": True}
    with world.blue.stream("POST", CHAT, json=body) as running:
        lines = running.iter_lines()
        next(lines)
        assert world.green.delete(f"{ADAPTERS}/copy").json()["draining"] == 0
        assert world.blue.delete(f"{ADAPTERS}/{SECRET}").json()["draining"] == 1


def test_content_outlives_the_other_owner(world: Tenants) -> None:
    for client in (world.blue, world.green):
        upload(client, "sql", weights(8.0))
    world.blue.delete(f"{ADAPTERS}/sql")
    assert chat(world.green, adapter="sql").status_code == 200
    assert refusal(chat(world.blue, adapter="sql"))[1] == "adapter_not_found"


def test_two_tenants_may_use_one_name(world: Tenants) -> None:
    cards = [upload(client, "sql", weights(fill)).json() for client, fill in ((world.blue, 1.0), (world.green, 2.0))]
    assert [(card["version"], card["owner"], card["visibility"]) for card in cards] == [
        (1, "blue", "private"),
        (1, "green", "private"),
    ]
    for client, card in zip((world.blue, world.green), cards, strict=True):
        assert chat(client, adapter="sql").json()["heddle"]["digest"] == card["digest"]
    metrics = world.admin.get("/metrics").text
    for owner in ("blue", "green"):
        assert f'heddle_adapter_requests_total{{adapter="{owner}:sql",outcome="stop"}} 1.0' in metrics
    resident = re.search(r'running_lora_adapters="([^"]*)"', metrics)
    assert resident is not None
    assert {"blue:sql", "green:sql"} <= set(resident[1].split(","))


def test_a_public_adapter_is_everybodys_to_use_and_its_owners_to_change(world: Tenants) -> None:
    card = upload(world.blue, "sql", weights(1.0), texts={"alias": "prod"}).json()
    assert publish(world.admin, "sql", owner="blue").json()["visibility"] == "public"
    for client in (world.green, world.local, world.admin):
        assert chat(client, adapter="sql@prod").json()["heddle"]["digest"] == card["digest"]
        assert {key: client.get(f"{ADAPTERS}/sql").json()[key] for key in ("owner", "digest")} == {
            "owner": "blue",
            "digest": card["digest"],
        }
        assert names(client.get(ADAPTERS, params={"visibility": "public"})) == ["sql"]
        assert names(client.get(ADAPTERS, params={"visibility": "private"})) == []
        assert "sql" in [model["id"] for model in client.get(MODELS).json()["data"]]
        assert "Did you mean sql?" in client.get(f"{ADAPTERS}/sqx").json()["error"]["message"]
    for route in (
        "change",
        "publish",
        "pin",
        "delete",
        "delete a version",
        "set an alias",
        "remove an alias",
        "delete the model",
    ):
        assert refusal(ROUTES[route](world.green, "sql"))[:2] == (403, "not_the_owner"), route
    assert world.blue.get(f"{ADAPTERS}/sql").json()["aliases"] == {"prod": 1}
    as_green = f"{ADAPTERS}?owner=green"
    taken = upload(world.admin, "sql", weights(2.0), texts={"visibility": "public"}, path=as_green)
    assert refusal(taken) == (409, "name_taken", "visibility")
    own = upload(world.green, "sql", weights(2.0)).json()
    assert chat(world.green, adapter="sql").json()["heddle"]["digest"] == own["digest"]
    assert refusal(publish(world.admin, "sql", owner="green"))[:2] == (409, "name_taken")
    assert publish(world.blue, "sql", "private").json()["visibility"] == "private"
    assert refusal(chat(world.local, adapter="sql"))[1] == "adapter_not_found"
    assert publish(world.admin, "sql", owner="green").status_code == 200
    assert chat(world.local, adapter="sql").json()["heddle"]["digest"] == own["digest"]


def test_of_two_who_publish_a_name_at_once_one_does(world: Tenants) -> None:
    teams = ("blue", "green", "local")
    for team, fill in zip(teams, (1.0, 2.0, 3.0), strict=True):
        upload(getattr(world, team), "sql", weights(fill))
    for _ in range(5):
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda team: publish(world.admin, "sql", owner=team), teams))
        assert sorted(answer.status_code for answer in answers) == [200, 409, 409]
        (owner,) = {answer.json()["owner"] for answer in answers if answer.status_code == 200}
        assert world.admin.get(f"{ADAPTERS}/sql").json()["owner"] == owner
        for team in teams:
            publish(getattr(world, team), "sql", "private")


def test_a_running_request_keeps_what_became_private(world: Tenants) -> None:
    upload(world.blue, "sql", weights(1.0))
    publish(world.admin, "sql", owner="blue")
    body = {"messages": HELLO, "adapter": "sql", "seed": scripted_engine.NEVER_ENDS, "stream": True}
    with world.green.stream("POST", CHAT, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        publish(world.blue, "sql", "private")
        assert world.blue.delete(f"{ADAPTERS}/sql").json()["draining"] == 1
        assert len(list(itertools.islice(lines, 10))) == 10


def test_only_an_admin_publishes(world: Tenants) -> None:
    public = {"visibility": "public"}
    assert refusal(upload(world.blue, "sql", texts=public)) == (403, "insufficient_scope", "visibility")
    assert refusal(upload(world.blue, "sql", texts=public, path=VALIDATE))[:2] == (403, "insufficient_scope")
    assert names(world.blue.get(ADAPTERS)) == []
    upload(world.blue, "sql")
    assert refusal(publish(world.blue, "sql")) == (403, "insufficient_scope", "visibility")
    publish(world.admin, "sql", owner="blue")
    assert upload(world.blue, "sql", weights(2.0)).json()["visibility"] == "public", "it is already"
    assert publish(world.blue, "sql", "private").status_code == 200
    upload(world.admin, "own", texts=public)
    assert world.green.get(f"{ADAPTERS}/own").json()["owner"] == "ops"


def test_a_reply_names_the_owner_of_what_is_not_ones_own(world: Tenants) -> None:
    upload(world.blue, "sql")
    publish(world.admin, "sql", owner="blue")
    told = [chat(client, adapter="sql").headers["x-heddle-adapter"] for client in (world.blue, world.green)]
    assert told == ["sql@1", "blue:sql@1"]


def test_what_all_have_the_server_do_only_an_admin_is_told(world: Tenants) -> None:
    chat(world.green)
    told = world.blue.get(CACHE).json()
    assert (told["counters"], told["requests"]) == (None, {"running": None, "waiting": None})
    known = world.admin.get(CACHE).json()
    assert known["counters"]["computed_tokens"] > 0
    assert told["pool"] == known["pool"]
    url, key = str(world.blue.base_url), world.blue.headers["authorization"].removeprefix("Bearer ")
    upload(world.blue, "sql")
    chat(world.blue, adapter="sql")
    console = Console(file=io.StringIO(), width=160)
    run_top(url, 1.0, once=True, console=console, api_key=key)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "sql@1" in shown
    assert "running" not in shown.splitlines()[0]
    assert "scope admin" in shown


@pytest.mark.parametrize("visibility", ["Public", "secret", "1"])
def test_a_visibility_that_is_none(world: Tenants, visibility: str) -> None:
    upload(world.blue, "sql")
    assert refusal(upload(world.blue, "sql", texts={"visibility": visibility})) == (
        400,
        "invalid_request",
        "visibility",
    )
    assert refusal(publish(world.blue, "sql", visibility)) == (400, "invalid_request", "visibility")
    assert refusal(world.blue.get(ADAPTERS, params={"visibility": visibility}))[0] == 400


# An admin


def test_an_admin_manages_any_tenants_adapters(world: Tenants) -> None:
    upload(world.blue, "sql", weights(1.0))
    assert world.admin.get(f"{ADAPTERS}/sql").status_code == 404
    as_blue = {"owner": "blue"}
    assert names(world.admin.get(ADAPTERS, params=as_blue)) == ["sql"]
    assert world.admin.get(f"{ADAPTERS}/sql", params=as_blue).json()["owner"] == "blue"
    assert world.admin.patch(f"{ADAPTERS}/sql", params=as_blue, json={"pinned": True}).json()["pinned"] is True
    path = f"{ADAPTERS}/sql/aliases/prod"
    assert world.admin.put(path, params=as_blue, json={"version": 1}).json()["version"] == 1
    assert world.blue.get(f"{ADAPTERS}/sql@prod").status_code == 200
    assert upload(world.admin, "new", weights(2.0), path=f"{ADAPTERS}?owner=blue").json()["owner"] == "blue"
    assert upload(world.admin, "dry", weights(2.0), path=f"{VALIDATE}?owner=blue").json()["stored_as"] == ["new@1"]
    assert names(world.blue.get(ADAPTERS)) == ["new", "sql"]
    assert world.admin.delete(f"{ADAPTERS}/new", params=as_blue).status_code == 200
    wait_until(
        lambda: {tuple(each["names"]) for each in world.admin.get(CACHE).json()["adapters"]} >= {("blue:sql@1",)}
    )
    assert world.admin.get(CACHE).json()["num_other_adapters"] == 0
    assert refusal(world.admin.get(ADAPTERS, params={"owner": "Not A Tenant"})) == (400, "invalid_request", "owner")


def test_nobody_else_acts_for_another_tenant(world: Tenants) -> None:
    upload(world.blue, "sql", weights(1.0))
    for method, path in [
        ("GET", ADAPTERS),
        ("GET", f"{ADAPTERS}/sql"),
        ("GET", f"{ADAPTERS}/sql/versions"),
        ("PATCH", f"{ADAPTERS}/sql"),
        ("DELETE", f"{ADAPTERS}/sql"),
        ("PUT", f"{ADAPTERS}/sql/aliases/prod"),
        ("DELETE", f"{ADAPTERS}/sql/aliases/prod"),
        ("POST", ADAPTERS),
        ("POST", VALIDATE),
    ]:
        body = {"PUT": {"version": 1}, "PATCH": {}}.get(method)
        told = [
            world.green.request(method, path, params={"owner": owner}, json=body) for owner in ("blue", "nobody", "x y")
        ]
        assert {refusal(each) for each in told} == {(403, "insufficient_scope", None)}
        assert len({each.text for each in told}) == 1
    assert world.green.get(ADAPTERS, params={"owner": "green"}).status_code == 200


# Models


def test_models_are_deleted_as_openais_clients_do(world: Tenants) -> None:
    upload(world.blue, "team/sql", weights(1.0))
    assert world.blue.delete(f"{MODELS}/team/sql").json() == {"id": "team/sql", "object": "model", "deleted": True}
    assert refusal(world.blue.delete(f"{MODELS}/team/sql")) == (404, "model_not_found", "model")
    for base in ("base", "scripted-model"):
        assert refusal(world.blue.delete(f"{MODELS}/{base}")) == (400, "invalid_request", None)
    with client_of(world.nobody, make_key(world.store_path, "blue", "infer")) as reader:
        upload(world.blue, "sql", weights(1.0))
        assert reader.get(f"{MODELS}/sql").status_code == 200
        assert refusal(reader.delete(f"{MODELS}/sql"))[1] == "insufficient_scope"


# What the operator registers


def test_adapters_of_the_operators_folder_are_everybodys(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    write_adapter(folder / "sql")
    config = server_config(tmp_path, adapters_path=folder)
    assert import_once(config)[1] == [("sql", 1)]
    with tenants(config) as world:
        assert chat(world.blue, adapter="sql").status_code == 200
        card = world.green.get(f"{ADAPTERS}/sql").json()
        assert (card["owner"], card["visibility"], card["version"]) == ("local", "public", 1)
        publish(world.local, "sql", "private")
        upload(world.blue, "sql", weights(7.0))
    with tenants(config) as world:
        assert world.green.get(f"{ADAPTERS}/sql").json()["visibility"] == "public", "as whoever started it says"
        assert world.blue.get(f"{ADAPTERS}/sql").json()["owner"] == "blue"
    (folder / "chat").mkdir()
    for file in (folder / "sql").iterdir():
        (folder / "chat" / file.name).write_bytes(file.read_bytes())
    with tenants(server_config(tmp_path)) as world:
        upload(world.blue, "chat", weights(7.0))
        publish(world.admin, "chat", owner="blue")
        assert world.green.get(f"{ADAPTERS}/chat").json()["owner"] == "blue"
    report, _ = import_once(config)
    assert report.refused == ()
    with tenants(config) as world:
        assert world.green.get(f"{ADAPTERS}/chat").json()["owner"] == "local", "the operator's folder comes first"
        mine = world.blue.get(f"{ADAPTERS}/chat").json()
        assert (mine["owner"], mine["visibility"]) == ("blue", "private")
