"""One adapter, a scaled one or a mix: what may be combined, what the engine is asked, and what the reply says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import save

import scripted_engine
from heddle_adapters.method import Combination
from heddle_adapters.mix import AdapterPart, adapter_key
from heddle_adapters.store_index import AdapterVersion
from heddle_server.api.adapter_choice import AdapterChoice, ChosenAdapter
from heddle_server.api.errors import AdaptersNotAdditive, InvalidRequest
from live_server import live_server, server_config, wait_until
from test_adapter_api import ADAPTERS, CONFIG, PREFIX, upload, weights
from test_http_api import CHAT, HELLO, events, metric, refusal
from test_metrics import GatewayState, read_as_llm_d

IA3_CONFIG = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": [], "task_type": "CAUSAL_LM"}
LOAD_MS = scripted_engine.LOAD_SECONDS * 1000


def chosen(
    name: str,
    combination: Combination = "sum",
    scale: float = 1.0,
    digest: str | None = None,
    rank: int | None = None,
    max_rank: int = 8,
) -> ChosenAdapter:
    version = AdapterVersion(
        owner="local",
        name=name.partition("@")[0],
        version=1,
        digest=digest or f"sha256:{name}",
        method="LoRA" if combination == "sum" else "IA3",
        max_rank=max_rank,
        num_rows=8,
        size_bytes=1000,
        created_unix_seconds=0,
        num_row_values=100,
        num_vector_values=0,
        combination=combination,
    )
    return ChosenAdapter(name, scale, version, version.owner, rank)


def check(*adapters: ChosenAdapter) -> None:
    AdapterChoice(adapters).check()


@pytest.mark.parametrize("combination", ["sum", "product"])
def test_adapters_of_one_kind_can_be_mixed_and_scaled(combination: Combination) -> None:
    check()
    check(chosen("a", combination))
    check(chosen("a", combination, scale=-0.5))
    check(chosen("a", combination), chosen("b", combination, scale=2), chosen("c", combination, scale=0))


def test_what_cannot_be_mixed_is_named() -> None:
    check(chosen("odd", "alone"))
    with pytest.raises(AdaptersNotAdditive, match=r"'odd' \(IA3\) can only be used alone"):
        check(chosen("odd", "alone", scale=0.5))
    with pytest.raises(AdaptersNotAdditive, match=r"'odd' \(IA3\) can only be used alone"):
        check(chosen("a"), chosen("odd", "alone"))
    with pytest.raises(AdaptersNotAdditive, match=r"'a' \(LoRA\) and 'c' \(LoRA\) adds .* 'b' \(IA3\) multiplies"):
        check(chosen("a"), chosen("b", "product"), chosen("c"))


def test_the_same_adapter_twice_is_refused_with_the_sum() -> None:
    with pytest.raises(InvalidRequest, match=r"'a' and 'a' are the same adapter\. .* added up: 1.5"):
        check(chosen("a"), chosen("a", scale=0.5))
    with pytest.raises(InvalidRequest, match="'a@1' and 'a@prod' are the same"):
        check(chosen("a@1", digest="sha256:x"), chosen("b"), chosen("a@prod", digest="sha256:x"))
    with pytest.raises(InvalidRequest, match=r"Name it once\.$"):
        check(chosen("a", "product"), chosen("a", "product"))


def test_a_rank_is_one_that_the_adapter_has_and_can_do_with() -> None:
    check(chosen("a", rank=1))
    check(chosen("a", rank=8, scale=0.5), chosen("b"))
    with pytest.raises(InvalidRequest, match="'a' has rank 8, and rank 9 is asked for"):
        check(chosen("a", rank=9))
    without_ranks: list[tuple[Combination, int]] = [("alone", 8), ("product", 0), ("sum", 0)]
    for combination, max_rank in without_ranks:
        with pytest.raises(InvalidRequest, match=r"'a' .* cannot be used at a lower rank"):
            check(chosen("b"), chosen("a", combination, rank=1, max_rank=max_rank))


def test_a_rank_is_part_of_the_identity() -> None:
    choices = [AdapterChoice((chosen("a", rank=rank),)) for rank in (None, 1, 2, 8)]
    assert len({choice.key for choice in choices}) == 4
    assert [choice.single is not None for choice in choices] == [True, False, False, False]
    assert [choice.parts[0].rank for choice in choices] == [None, 1, 2, 8]


def test_the_order_of_a_mix_does_not_count() -> None:
    one, other = chosen("a", scale=0.25), chosen("b")
    assert AdapterChoice((one, other)).parts == AdapterChoice((other, one)).parts
    assert AdapterChoice((one, other)).key == AdapterChoice((other, one)).key
    assert AdapterChoice((other,)).key == "sha256:b"
    assert AdapterChoice(()).key == ""


@pytest.fixture(scope="module")
def digests() -> dict[str, str]:
    return {}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, digests: dict[str, str]) -> Iterator[httpx.Client]:
    """A server with two LoRAs, of which one has two versions, and an IA3."""
    with live_server(server_config(tmp_path_factory.mktemp("server"))) as client:
        ia3 = save({f"{PREFIX}.ia3_l": np.full((8, 1), 2.0, np.float32)})
        uploads: tuple[tuple[str, str, bytes, dict[str, Any]], ...] = (
            ("team/sql@1", "team/sql", weights(1.0), CONFIG),
            ("team/sql@2", "team/sql", weights(2.0), CONFIG),
            ("pirate@1", "pirate", weights(3.0), CONFIG),
            ("loud@1", "loud", ia3, IA3_CONFIG),
        )
        for reference, name, content, config in uploads:
            response = upload(client, name, content, config)
            assert response.status_code == 201
            digests[reference] = response.json()["digest"]
        yield client


def ask(client: httpx.Client, adapter: object, **fields: object) -> httpx.Response:
    return client.post(CHAT, json={"messages": HELLO, "adapter": adapter, **fields})


@pytest.mark.parametrize(
    ("reference", "version"),
    [("team/sql", 2), ("team/sql@latest", 2), ("team/sql@2", 2), ("team/sql@1", 1)],
)
def test_every_form_of_a_reference(client: httpx.Client, digests: dict[str, str], reference: str, version: int) -> None:
    digest = digests[f"team/sql@{version}"]
    for field in ("adapter", "model"):
        reply = client.post(CHAT, json={"messages": HELLO, field: reference}).json()
        expected = {"adapter": reference, "version": version, "digest": digest}
        assert expected.items() <= reply["heddle"].items()
    reply = ask(client, {"name": f"team/sql@{digest}"}).json()
    assert reply["heddle"]["version"] == version
    assert client.get(f"/v1/models/{reference}").json()["root"] == digest


def test_the_reply_says_where_the_adapter_was_and_how_long_it_took(tmp_path_factory: pytest.TempPathFactory) -> None:
    with live_server(server_config(tmp_path_factory.mktemp("fresh"))) as client:
        upload(client, "pirate")
        cold = ask(client, "pirate").json()["heddle"]
        *_, last = events(ask(client, "pirate", stream=True))
        warm = last["heddle"]
    assert (cold["cache"], cold["load_ms"]) == ("disk", LOAD_MS)
    assert cold["queue_ms"] > LOAD_MS
    assert (warm["cache"], warm["load_ms"]) == ("device", 0)
    assert cold["ttft_ms"] > 0
    assert warm["ttft_ms"] > 0


def test_only_the_last_chunk_of_a_stream_says_what_answered(client: httpx.Client) -> None:
    *chunks, last = events(ask(client, "pirate", stream=True))
    assert [chunk for chunk in chunks if "heddle" in chunk] == []
    assert last["heddle"]["adapter"] == "pirate"


def test_a_mix_is_told_by_its_parts(client: httpx.Client, digests: dict[str, str]) -> None:
    adapter = [{"name": "team/sql@1", "scale": 0.5}, "pirate"]
    heddle = ask(client, adapter).json()["heddle"]
    parts = [AdapterPart(digests["team/sql@1"], 0.5), AdapterPart(digests["pirate@1"], 1.0)]
    assert heddle["adapter"] is heddle["version"] is None
    assert heddle["digest"] == adapter_key(parts)
    assert heddle["adapters"] == [
        {"name": "team/sql@1", "version": 1, "digest": digests["team/sql@1"], "scale": 0.5},
        {"name": "pirate", "version": 1, "digest": digests["pirate@1"], "scale": 1.0},
    ]
    assert ask(client, adapter[::-1]).json()["heddle"]["digest"] == heddle["digest"]
    assert {"cache", "load_ms", "queue_ms", "ttft_ms"} < heddle.keys()


def test_a_scaled_adapter_is_not_the_adapter_as_it_was_trained(client: httpx.Client, digests: dict[str, str]) -> None:
    scaled = ask(client, {"name": "pirate", "scale": 0.5}).json()["heddle"]
    assert scaled["digest"] == adapter_key([AdapterPart(digests["pirate@1"], 0.5)])
    assert [each["scale"] for each in scaled["adapters"]] == [0.5]
    plain = ask(client, [{"name": "pirate", "scale": 1}]).json()["heddle"]
    assert (plain["adapter"], plain["digest"]) == ("pirate", digests["pirate@1"])


def test_an_adapter_at_a_lower_rank_is_told_with_it(client: httpx.Client, digests: dict[str, str]) -> None:
    cut = ask(client, {"name": "pirate", "rank": 1}).json()["heddle"]
    assert cut["digest"] == adapter_key([AdapterPart(digests["pirate@1"], rank=1)]) != digests["pirate@1"]
    assert [(each["scale"], each["rank"]) for each in cut["adapters"]] == [(1.0, 1)]
    mix = ask(client, [{"name": "pirate", "rank": 1, "scale": 0.5}, "team/sql"]).json()["heddle"]
    assert [each.get("rank") for each in mix["adapters"]] == [1, None]


@pytest.mark.parametrize(
    ("adapter", "param", "words"),
    [
        ({"name": "pirate", "rank": 3}, "adapter", "has rank 2"),
        ({"name": "loud", "rank": 1}, "adapter", "'loud' (IA3)"),
        ({"name": "base", "rank": 1}, "adapter.rank", "The base has no rank"),
        ({"name": "pirate", "rank": 0}, "adapter.rank", ""),
        ({"name": "pirate", "rank": 1.0}, "adapter.rank", ""),
        ({"name": "pirate", "rank": True}, "adapter.rank", ""),
        (["pirate", {"name": "team/sql", "rank": "2"}], "adapter.1.rank", ""),
        ({"name": "pirate", "rank": 10**30}, "adapter.rank", ""),
    ],
)
def test_refused_ranks(client: httpx.Client, adapter: object, param: str, words: str) -> None:
    response = ask(client, adapter)
    assert refusal(response) == (400, "invalid_request", param)
    assert words in response.json()["error"]["message"]


def test_model_and_adapter_may_name_the_same_one(client: httpx.Client) -> None:
    assert ask(client, {"name": "pirate", "scale": 2}, model="pirate").status_code == 200
    assert refusal(ask(client, "pirate@1", model="pirate"))[1] == "adapter_conflict"


@pytest.mark.parametrize(
    ("adapter", "code", "words"),
    [
        (["pirate", "loud"], "adapters_not_additive", ["'pirate' (LoRA)", "'loud' (IA3)"]),
        (["pirate", {"name": "pirate@1", "scale": 2}], "invalid_request", ["same adapter", "3"]),
        (["team/sql", "team/sql"], "invalid_request", ["same adapter"]),
        (["pirate", "pirat"], "adapter_not_found", ["pirate"]),
    ],
)
def test_refused_mixes_hold_nothing(client: httpx.Client, adapter: object, code: str, words: list[str]) -> None:
    response = ask(client, adapter)
    assert refusal(response)[1:] == (code, "adapter")
    for word in words:
        assert word in response.json()["error"]["message"]


def test_two_versions_of_one_adapter_can_be_mixed(client: httpx.Client) -> None:
    assert ask(client, ["team/sql@1", {"name": "team/sql@2", "scale": -1}]).status_code == 200


def test_every_part_of_a_mix_is_held_to_the_end(client: httpx.Client) -> None:
    for number, name in enumerate(("left", "right")):
        upload(client, name, weights(10.0 + number))
    evictions = 'heddle_adapter_evictions_total{tier="device"}'
    forgotten = metric(client, evictions)
    body = {"messages": HELLO, "adapter": ["left", "right"], "seed": scripted_engine.NEVER_ENDS, "stream": True}
    with client.stream("POST", CHAT, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        for name in ("left", "right"):
            assert client.delete(f"{ADAPTERS}/{name}").json()["draining"] == 1
        assert refusal(ask(client, ["left", "right"]))[1] == "adapter_not_found"
        assert metric(client, evictions) == forgotten
    wait_until(lambda: metric(client, evictions) == forgotten + 2)


@pytest.mark.parametrize("adapter", ["pirate", ["pirate", "team/sql"]])
def test_requests_count_for_every_adapter_they_use(client: httpx.Client, adapter: object) -> None:
    name = 'heddle_adapter_requests_total{adapter="pirate",outcome="stop"}'
    before = metric(client, name)
    ask(client, adapter)
    assert metric(client, name) == before + 1


def test_gateways_see_what_is_on_the_device_and_what_is_waited_for(client: httpx.Client) -> None:
    ask(client, "team/sql@1")
    ask(client, "pirate")
    upload(client, "cold", weights(20.0))
    body = {"messages": HELLO, "adapter": "cold", "seed": scripted_engine.NEVER_STARTS, "stream": True}

    def told() -> GatewayState:
        families = text_string_to_metric_families(client.get("/metrics").text)
        state = read_as_llm_d([each for family in families for each in family.samples])
        assert state is not None
        return state

    assert {"pirate", "team/sql@1"} <= set(told().active)
    assert "cold" not in {*told().active, *told().waiting}
    with client.stream("POST", CHAT, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        wait_until(lambda: "cold" in told().active)  # the script brings it at once and never answers
        assert metric(client, "vllm:num_requests_waiting") == 1


def test_damaged_content_is_quarantined_at_the_first_word_of_the_engine(client: httpx.Client) -> None:
    upload(client, "broken", weights(30.0))
    damaged = ask(client, "broken", seed=scripted_engine.ADAPTER_DAMAGED)
    assert refusal(damaged) == (422, "adapter_damaged", "adapter")
    wait_until(lambda: ask(client, "broken").status_code == 422)
    assert refusal(ask(client, ["pirate", "broken"])) == (422, "adapter_damaged", "adapter")
    assert metric(client, "heddle_adapters_quarantined_total") == 1
    assert metric(client, 'heddle_adapters_registered{status="quarantined"}') == 1
    assert ask(client, "pirate").status_code == 200
    upload(client, "broken", weights(30.0))
    assert ask(client, "broken").status_code == 200
    assert metric(client, 'heddle_adapters_registered{status="quarantined"}') == 0
