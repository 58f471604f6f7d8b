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
from live_server import live_server, server_config, wait_until
from test_http_api import CHAT, HELLO, metric, refusal

ADAPTERS = "/v1/adapters"
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
    client: httpx.Client, name: str, content: bytes | None = None, config: dict[str, Any] | bytes = CONFIG
) -> httpx.Response:
    config_bytes = config if isinstance(config, bytes) else json.dumps(config).encode()
    files = {
        "adapter_config.json": ("a.json", config_bytes),
        "adapter_model.safetensors": ("b.bin", weights() if content is None else content),
    }
    return client.post(ADAPTERS, data={"name": name}, files=files)


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
    assert card["digest"].startswith("sha256:")
    expected = {"id": "pirate", "object": "adapter", "name": "pirate", "version": 1, "method": "LoRA", "rank": 2}
    assert expected.items() <= card.items()
    assert card["size_bytes"] == len(weights())
    by_adapter = client.post(CHAT, json={"messages": HELLO, "adapter": "pirate"}).json()
    by_model = client.post(CHAT, json={"messages": HELLO, "model": "pirate"}).json()
    both = client.post(CHAT, json={"messages": HELLO, "model": "pirate", "adapter": "pirate"}).json()
    source = {"adapter": "pirate", "version": 1, "digest": card["digest"]}
    assert [reply["heddle"] for reply in (by_adapter, by_model, both)] == [source] * 3
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["scripted-model", "pirate"]
    assert client.get("/v1/models/pirate").json()["parent"] == "scripted-model"


def test_uploads_survive_a_restart(tmp_path: Path) -> None:
    config = server_config(tmp_path)
    with live_server(config) as client:
        card = upload(client, "pirate").json()
    with live_server(config) as client:
        assert client.get(f"{ADAPTERS}/pirate").json()["digest"] == card["digest"]
        assert client.post(CHAT, json={"messages": HELLO, "adapter": "pirate"}).status_code == 200


@pytest.mark.usefixtures("store")
def test_a_second_upload_is_a_new_version(client: httpx.Client) -> None:
    first = upload(client, "sailor").json()
    second = upload(client, "sailor", weights(2.0)).json()
    assert (first["version"], second["version"]) == (1, 2)
    reply = client.post(CHAT, json={"messages": HELLO, "adapter": "sailor"}).json()
    assert reply["heddle"]["digest"] == second["digest"]
    versions = client.get(f"{ADAPTERS}/sailor").json()["versions"]
    assert [each["digest"] for each in versions] == [first["digest"], second["digest"]]


@pytest.mark.usefixtures("store")
def test_a_running_request_keeps_its_version_and_the_engine_forgets_it_after(client: httpx.Client) -> None:
    upload(client, "pirate")
    forgotten = metric(client, "heddle_adapter_evictions_total")
    body = {"messages": HELLO, "adapter": "pirate", "seed": scripted_engine.NEVER_ENDS, "stream": True}
    with client.stream("POST", CHAT, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert client.delete(f"{ADAPTERS}/pirate").json() == {
            "id": "pirate",
            "object": "adapter.deleted",
            "deleted": True,
        }
        assert refusal(client.post(CHAT, json={"messages": HELLO, "adapter": "pirate"}))[1] == "adapter_not_found"
        next(line for line in lines if "x" in line)
        assert metric(client, "heddle_adapter_evictions_total") == forgotten
    wait_until(lambda: metric(client, "heddle_adapter_evictions_total") == forgotten + 1)


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
        pytest.param("a/b", weights(), CONFIG, (400, "invalid_adapter_name"), id="slash"),
        pytest.param("a,b", weights(), CONFIG, (400, "invalid_adapter_name"), id="comma"),
        pytest.param("../../etc", weights(), CONFIG, (400, "invalid_adapter_name"), id="path"),
        pytest.param("base", weights(), CONFIG, (400, "invalid_adapter_name"), id="reserved"),
        pytest.param("scripted-model", weights(), CONFIG, (400, "invalid_adapter_name"), id="the base's own name"),
        pytest.param("", weights(), CONFIG, (400, "invalid_adapter_name"), id="empty"),
        pytest.param("a", b"x" * (1 << 16), CONFIG, (413, "body_too_large"), id="over the limit"),
    ],
)
def test_refused_uploads_change_nothing(
    client: httpx.Client, name: str, content: bytes, config: dict[str, Any] | bytes, expected: tuple[int, str]
) -> None:
    assert refusal(upload(client, name, content, config))[:2] == expected
    assert client.get(ADAPTERS).json() == {"object": "list", "data": []}
    assert client.post(CHAT, json={"messages": HELLO}).status_code == 200


def test_uploads_that_are_not_multipart_or_lack_a_part(client: httpx.Client) -> None:
    assert refusal(client.post(ADAPTERS, json={"name": "a"})) == (400, "invalid_request", None)
    assert refusal(client.post(ADAPTERS, files={"name": (None, "a")})) == (
        400,
        "invalid_request",
        "adapter_config.json",
    )
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
