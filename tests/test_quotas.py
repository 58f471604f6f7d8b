"""What a tenant may store, pin, send and queue."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import msgspec
import pytest

import scripted_engine
from heddle_server.api.errors import RateLimitExceeded
from heddle_server.api.request_rate import CHANGES_AT_ONCE, RequestRates
from heddle_server.audit_log import AUDIT_FILE
from heddle_server.key_store import TenantLimits
from live_server import live_server, server_config, wait_until
from tenant_keys import Tenants, set_limits, tenants
from test_adapter_api import ADAPTERS, VALIDATE, names, upload, weights
from test_http_api import CHAT, HELLO, refusal
from test_overload import World

SIZE = len(weights())
POOL_BYTES = 2 * (8 + 8) * 4  # what one of them takes of the page pool


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Tenants]:
    with tenants(server_config(tmp_path)) as world:
        yield world


def limit(world: Tenants, **limits: float) -> None:
    set_limits(world.store_path, "blue", TenantLimits(**limits))  # type: ignore[arg-type]


def over(response: httpx.Response) -> str:
    assert refusal(response)[:2] == (403, "quota_exceeded")
    message: str = response.json()["error"]["message"]
    return message


def test_names_that_a_tenant_may_have(world: Tenants) -> None:
    limit(world, adapters=2)
    for name in ("a", "b"):
        assert upload(world.blue, name).status_code == 201
    message = over(upload(world.blue, "c"))
    assert "have 2 adapters and may have 2" in message
    assert over(upload(world.blue, "c", path=VALIDATE)) == message
    assert upload(world.blue, "a", weights(2.0)).status_code == 201, "a new version is no new name"
    assert upload(world.green, "c").status_code == 201, "another tenant has its own limits"
    world.blue.delete(f"{ADAPTERS}/b")
    assert upload(world.blue, "c").status_code == 201
    limit(world, adapters=1)
    assert upload(world.blue, "c", weights(3.0)).status_code == 201, "what is there may stay"
    over(upload(world.blue, "d"))
    limit(world)
    assert upload(world.blue, "d").status_code == 201


def test_bytes_that_a_tenant_may_store(world: Tenants) -> None:
    limit(world, stored_bytes=2 * SIZE)
    upload(world.blue, "a", weights(1.0))
    assert upload(world.blue, "a", weights(1.0)).status_code == 200, "the same again takes nothing"
    assert upload(world.blue, "a", weights(2.0)).status_code == 201
    message = over(upload(world.blue, "a", weights(3.0)))
    assert f"take {2 * SIZE} bytes on disk, would take {3 * SIZE} with this one, and may take {2 * SIZE}" in message
    over(upload(world.blue, "b", weights(1.0)))  # whoever else has the content: it counts for each name
    assert sorted(path.name for path in (world.store_path / "incoming").iterdir()) == []
    assert len(list((world.store_path / "content").iterdir())) == 2
    world.blue.delete(f"{ADAPTERS}/a@1")
    assert upload(world.blue, "b", weights(3.0)).status_code == 201


def test_versions_that_an_upload_drops_make_room(tmp_path: Path) -> None:
    with tenants(server_config(tmp_path, keep_versions=1)) as world:
        limit(world, stored_bytes=SIZE)
        for fill in (1.0, 2.0, 3.0):
            assert upload(world.blue, "a", weights(fill)).status_code == 201


def test_bytes_that_a_tenant_may_pin(world: Tenants) -> None:
    limit(world, pinned_bytes=POOL_BYTES)
    pinned = {"pinned": "true"}
    upload(world.blue, "a", weights(1.0), texts=pinned)
    over(upload(world.blue, "b", weights(2.0), texts=pinned))
    upload(world.blue, "b", weights(2.0))
    pin = world.blue.patch(f"{ADAPTERS}/b", json={"pinned": True})
    assert f"take {POOL_BYTES} bytes of the page pool, would take {2 * POOL_BYTES}" in over(pin)
    assert refusal(pin)[2] == "pinned"
    over(upload(world.blue, "a", weights(1.0, rank=4), {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}))
    assert world.blue.patch(f"{ADAPTERS}/a", json={"pinned": False}).status_code == 200
    assert world.blue.patch(f"{ADAPTERS}/b", json={"pinned": True}).status_code == 200
    assert upload(world.green, "a", weights(3.0), texts=pinned).status_code == 201


def test_over_a_lowered_limit_everything_can_still_become_less(world: Tenants) -> None:
    for name in ("a", "b"):
        upload(world.blue, name, weights(1.0), texts={"pinned": "true", "alias": "prod"})
    limit(world, adapters=0, stored_bytes=0, pinned_bytes=0)
    assert world.blue.put(f"{ADAPTERS}/a/aliases/test", json={"version": 1}).status_code == 200
    assert world.blue.patch(f"{ADAPTERS}/a", json={"pinned": False, "description": "old"}).status_code == 200
    over(world.blue.patch(f"{ADAPTERS}/a", json={"pinned": True, "description": "new"}))
    assert world.blue.get(f"{ADAPTERS}/a").json()["description"] == "old"
    assert world.blue.delete(f"{ADAPTERS}/a").status_code == 200
    assert names(world.blue.get(ADAPTERS)) == ["b"]


def test_uploads_at_once_do_not_pass_together(world: Tenants) -> None:
    limit(world, adapters=3, stored_bytes=3 * SIZE)

    def put(number: int) -> int:
        return upload(world.admin, f"n{number}", weights(number), path=f"{ADAPTERS}?owner=blue").status_code

    with ThreadPoolExecutor(12) as pool:
        statuses = list(pool.map(put, range(12)))
    assert sorted(statuses) == [201] * 3 + [403] * 9
    assert len(names(world.blue.get(ADAPTERS))) == 3


def begin_upload(client: httpx.Client, path: str, num_bytes: int, sent: bytes = b"") -> socket.socket:
    """An upload that has sent its headers, which announce so many bytes, and no more than `sent` of its body."""
    key, url = client.headers["authorization"], client.base_url
    length = f"content-length: {num_bytes}" if num_bytes else "transfer-encoding: chunked"
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nauthorization: {key}\r\n{length}\r\n"
    connection = socket.create_connection((url.host, url.port or 80), timeout=10)
    connection.sendall(f"{head}content-type: multipart/form-data; boundary=b\r\n\r\n".encode() + sent)
    return connection


def num_incoming(world: Tenants) -> int:
    return len(list((world.store_path / "incoming").iterdir()))


def test_a_tenant_has_few_uploads_under_way(world: Tenants) -> None:
    with ExitStack() as opened:
        for path in (ADAPTERS, VALIDATE):
            opened.enter_context(begin_upload(world.blue, path, 1000))
        wait_until(lambda: num_incoming(world) == 2)
        for path in (ADAPTERS, VALIDATE):
            response = upload(world.blue, "third", path=path)
            assert refusal(response) == (429, "rate_limit_exceeded", None)
            assert "2 uploads" in response.json()["error"]["message"]
            assert response.headers["retry-after"]
        assert upload(world.green, "own").status_code == 201
        assert upload(world.admin, "third", path=f"{ADAPTERS}?owner=blue").status_code == 201
    wait_until(lambda: num_incoming(world) == 0)
    assert upload(world.blue, "fourth").status_code == 201


@pytest.mark.parametrize("is_announced", [True, False])
def test_an_upload_that_never_could_be_stored_is_not_received(world: Tenants, is_announced: bool) -> None:
    limit(world, stored_bytes=SIZE)
    num_bytes, chunk = 8 << 20, b"x" * (1 << 20)
    part = b'--b\r\nContent-Disposition: form-data; name="adapter_model.safetensors"\r\n\r\n'
    with begin_upload(world.blue, ADAPTERS, num_bytes if is_announced else 0) as connection:
        if not is_announced:
            for piece in (part, *[chunk] * 8):
                connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
            connection.sendall(b"0\r\n\r\n")
        else:
            connection.sendall(b"x" * num_bytes)
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 403")
    assert b"quota_exceeded" in answer
    assert upload(world.blue, "small").status_code == 201
    assert upload(world.green, "small").status_code == 201


def test_an_older_version_is_pinned_in_place_of_the_newest_only_where_it_may_be(world: Tenants) -> None:
    limit(world, pinned_bytes=POOL_BYTES)
    upload(world.blue, "a", weights(1.0, rank=4), {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]})
    upload(world.blue, "a", weights(2.0), texts={"pinned": "true"})
    over(world.blue.delete(f"{ADAPTERS}/a@2"))
    world.blue.patch(f"{ADAPTERS}/a", json={"pinned": False})
    assert world.blue.delete(f"{ADAPTERS}/a@2").status_code == 200


def config_of(rank: int) -> dict[str, object]:
    return {"peft_type": "LORA", "r": rank, "target_modules": ["q_proj"]}


def test_deleting_a_version_pins_no_more_than_there_is_room_for(world: Tenants) -> None:
    """Of four pages that may be pinned green has two, and blue one instead of three."""
    pinned = {"pinned": "true"}
    upload(world.green, "a", weights(1.0, rank=100), config_of(100), texts=pinned)
    upload(world.blue, "a", weights(2.0, rank=150), config_of(150))
    assert upload(world.blue, "a", weights(3.0), texts=pinned).status_code == 201
    refused = world.blue.delete(f"{ADAPTERS}/a@2")
    assert refusal(refused) == (409, "pin_capacity", "pinned")
    assert "beside what is pinned" in refused.json()["error"]["message"]
    told_all = world.admin.delete(f"{ADAPTERS}/a@2", params={"owner": "blue"})
    assert "would need 20480 bytes" in told_all.json()["error"]["message"]
    world.blue.patch(f"{ADAPTERS}/a", json={"pinned": False})
    assert world.blue.delete(f"{ADAPTERS}/a@2").status_code == 200


def test_pins_stay_in_their_owners_share_of_the_pool(tmp_path: Path) -> None:
    config = server_config(tmp_path)
    engine = msgspec.structs.replace(config.engine, tenant_pool_share=0.25)  # two pages
    pinned = {"pinned": "true"}
    with tenants(msgspec.structs.replace(config, engine=engine)) as world:
        for client, fill in ((world.blue, 1.0), (world.green, 2.0)):
            upload(client, "a", weights(fill, rank=100), config_of(100), texts=pinned)
        for client in (world.blue, world.green):
            wait_until(lambda client=client: client.get(f"{ADAPTERS}/a").json()["tier"] == "device")
        refused = upload(world.blue, "b", weights(3.0), texts=pinned)
        assert refusal(refused) == (409, "pin_capacity", "pinned")
        assert "need 12288 bytes of the page pool" in refused.json()["error"]["message"]
        assert "may take 8192" in refused.json()["error"]["message"]


def test_limits_hold_for_an_admin_who_acts_for_the_tenant(world: Tenants) -> None:
    limit(world, adapters=0)
    over(upload(world.admin, "a", path=f"{ADAPTERS}?owner=blue"))


def test_limits_hold_without_keys_too(tmp_path: Path) -> None:
    config = server_config(tmp_path)
    with live_server(config) as client:
        set_limits(config.store_path, "local", TenantLimits(adapters=1, requests_per_second=1))
        assert [upload(client, name).status_code for name in ("a", "b")] == [201, 403]
        assert [client.post(CHAT, json={"messages": HELLO}).status_code for _ in range(2)] == [200, 429]


# Requests


def test_changes_are_metered_whatever_becomes_of_them(world: Tenants) -> None:
    size = len(world.store_path.joinpath(AUDIT_FILE).read_bytes())
    statuses = [world.blue.delete(f"{ADAPTERS}/none").status_code for _ in range(150)]
    assert set(statuses) == {404, 429}
    assert CHANGES_AT_ONCE <= statuses.count(404) < 150
    response = world.blue.put(f"{ADAPTERS}/none/aliases/prod", json={"version": 1})
    while response.status_code != 429:
        response = world.blue.put(f"{ADAPTERS}/none/aliases/prod", json={"version": 1})
    assert refusal(response) == (429, "rate_limit_exceeded", None)
    assert "change adapters" in response.json()["error"]["message"]
    num_lines = world.store_path.joinpath(AUDIT_FILE).read_bytes()[size:].count(b"adapter.delete")
    assert num_lines == statuses.count(404), "what is refused for its rate is no line"
    assert world.blue.get(ADAPTERS).status_code == 200
    assert world.green.delete(f"{ADAPTERS}/none").status_code == 404
    assert {world.admin.delete(f"{ADAPTERS}/none").status_code for _ in range(80)} == {404}, "an admin's are not"


def test_requests_a_second(world: Tenants) -> None:
    limit(world, requests_per_second=2)
    ask = {"messages": HELLO}
    assert [world.blue.post(CHAT, json=ask).status_code for _ in range(3)] == [200, 200, 429]
    response = world.blue.post("/v1/completions", json={"prompt": "Hi"})
    assert refusal(response) == (429, "rate_limit_exceeded", None)
    assert response.headers["retry-after"] == "1"
    assert world.blue.get("/v1/models").status_code == 200, "only answers are counted"
    assert world.green.post(CHAT, json=ask).status_code == 200
    limit(world)
    assert world.blue.post(CHAT, json=ask).status_code == 200


@pytest.mark.parametrize("rate", [0.1, 1.0, 3.0, 2.5])
def test_a_bucket_lets_through_its_rate_and_no_more(rate: float) -> None:
    now = 0.0
    rates = RequestRates(clock=lambda: now)
    num_accepted = 0
    for _ in range(100_000):  # of a millisecond each
        with suppress(RateLimitExceeded):
            rates.take("blue", rate)
            num_accepted += 1
        now += 0.001
    assert abs(num_accepted - 100 * rate - max(1, rate)) <= 1


def test_whoever_waits_as_told_is_let_through() -> None:
    now = 0.0
    rates = RequestRates(clock=lambda: now)
    for _ in range(50):
        rates.take("blue", 0.3)
        with pytest.raises(RateLimitExceeded) as error:
            rates.take("blue", 0.3)
        rates.take("green", None)
        now += error.value.retry_after_seconds


def test_a_limit_that_changes_holds_from_the_next_request() -> None:
    rates = RequestRates(clock=lambda: 0.0)
    for _ in range(10):
        rates.take("blue", 10)
    with pytest.raises(RateLimitExceeded):
        rates.take("blue", 10)
    rates.take("blue", None)
    for _ in range(20):
        rates.take("blue", 20)


def test_prompt_tokens_that_may_wait() -> None:
    world = World(queued_token_limit={"a": 100}.get)
    first = world.ask("a", 300)  # one prompt may always wait
    with pytest.raises(RateLimitExceeded, match="have 300 tokens, this request's have 1, and 100 may wait"):
        world.ask("a", 1)
    assert world.refused == ["quota"]
    world.ask("b", 1000)
    first.start()
    world.ask("a", 60)
    world.ask("a", 40)
    with pytest.raises(RateLimitExceeded):
        world.ask("a", 1)
    first.leave()


def test_queued_tokens_over_http(world: Tenants) -> None:
    limit(world, queued_tokens=10)
    waiting = {"messages": HELLO, "seed": scripted_engine.NEVER_STARTS, "stream": True}
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=world.blue.base_url, headers=world.blue.headers) as other:
        held = pool.submit(_hold_until_refused, other, waiting, world)
        assert refusal(held.result())[:2] == (429, "rate_limit_exceeded")


def _hold_until_refused(client: httpx.Client, waiting: dict[str, object], world: Tenants) -> httpx.Response:
    """Keeps one prompt waiting while another is asked."""
    with client.stream("POST", CHAT, json=waiting, timeout=20):
        return world.blue.post(CHAT, json={"messages": HELLO}, timeout=20)
