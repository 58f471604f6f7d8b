"""The metrics: bounded series per adapter that never go backwards, the engine's numbers, and what gateways read."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

import scripted_engine
from engine_numbers import STATS
from heddle_adapters.store import AdapterStore
from heddle_adapters.store_index import AdapterRecord, AdapterVersion
from heddle_adapters.tier import AdapterMove
from heddle_server.api.adapter_counters import OTHER, AdapterCounters
from heddle_server.api.engine_metrics import EngineCollector
from heddle_server.api.gateway_metrics import GatewayCollector, WaitingAdapters
from heddle_server.api.metrics import Metrics
from heddle_server.messages import AdmissionReport, EngineStats, ModelCard


def changed(**numbers: float) -> EngineStats:
    return msgspec.structs.replace(STATS, **numbers)


@dataclass
class Engine:
    """What a client of an engine knows of it."""

    stats: EngineStats | None = STATS
    model: ModelCard | None = field(default_factory=scripted_engine.model_card)
    is_ready: bool = True
    resident: frozenset[str] = frozenset()

    def resident_digests(self) -> frozenset[str]:
        return self.resident


@dataclass
class Names:
    """Adapters by name, each with its latest digest; older versions by reference."""

    latest: Mapping[str, str]
    older: Mapping[str, str] = field(default_factory=dict)

    def list(self) -> tuple[AdapterRecord, ...]:
        return tuple(record(name, digest) for name, digest in self.latest.items())

    def names_of(self, digest: str) -> tuple[str, ...]:
        return tuple(reference for reference, each in self.older.items() if each == digest)


def version(name: str, digest: str) -> AdapterVersion:
    return AdapterVersion(
        owner="local",
        name=name,
        version=1,
        digest=digest,
        method="LoRA",
        max_rank=8,
        num_rows=8,
        size_bytes=1000,
        created_unix_seconds=0,
        num_row_values=100,
        num_vector_values=0,
        combination="sum",
    )


def record(name: str, digest: str) -> AdapterRecord:
    return AdapterRecord(versions=(version(name, digest),))


def samples(metrics: Metrics) -> list[Sample]:
    return [each for family in text_string_to_metric_families(metrics.text().decode()) for each in family.samples]


def values(metrics: Metrics, name: str, label: str | None = None) -> dict[str, float]:
    """One metric's values by one of its labels."""
    return {each.labels[label] if label else "": each.value for each in samples(metrics) if each.name == name}


def adapter_requests(counters: AdapterCounters) -> dict[str, float]:
    requests = next(iter(counters.collect()))
    totals: dict[str, float] = {}
    for each in requests.samples:
        name = each.labels["adapter"]
        totals[name] = totals.get(name, 0) + each.value
    return totals


# Counters per adapter


def test_few_adapters_have_series_of_their_own() -> None:
    metrics = Metrics()
    metrics.count_request("stop", ("sql",), 10, 5, 0.1)
    metrics.count_request("length", ("sql", "pirate"), 1, 2, 0.1)
    metrics.count_request("stop", (), 3, 4, 0.1)
    found = {
        (each.name, *each.labels.values()): each.value
        for each in samples(metrics)
        if each.name in ("heddle_adapter_requests_total", "heddle_adapter_tokens_total")
    }
    assert found == {
        ("heddle_adapter_requests_total", "sql", "stop"): 1,
        ("heddle_adapter_requests_total", "sql", "length"): 1,
        ("heddle_adapter_requests_total", "pirate", "length"): 1,
        ("heddle_adapter_tokens_total", "sql", "prompt"): 11,
        ("heddle_adapter_tokens_total", "sql", "generated"): 7,
        ("heddle_adapter_tokens_total", "pirate", "prompt"): 1,
        ("heddle_adapter_tokens_total", "pirate", "generated"): 2,
    }


def test_a_thousand_adapters_are_two_hundred_series_that_never_go_backwards() -> None:
    counters = AdapterCounters()
    names = [f"adapter-{number}" for number in range(1000)]
    draw = random.Random(5)
    uses: Counter[str] = Counter()
    last: dict[str, float] = {}
    for hottest in (0, 300):  # what is popular changes once
        weights = [1 / (1 + (number - hottest) % 1000) for number in range(1000)]
        for _ in range(20):
            for name in draw.choices(names, weights, k=1000):
                uses[name] += 1
                counters.count(name, "stop", 1, 1)
            told = adapter_requests(counters)
            assert len(told) <= 201
            for name, value in told.items():
                assert value >= last.get(name, 0), name
            last |= told
    own = set(told) - {OTHER}
    assert len(own) == 200
    assert {name for name, _ in uses.most_common(100)} <= own
    assert all(told[name] <= uses[name] for name in own)


def test_a_name_that_is_overtaken_goes_on_where_it_stopped() -> None:
    counters = AdapterCounters(max_shown=1)

    def use(name: str, times: int) -> dict[str, float]:
        for _ in range(times):
            counters.count(name, "stop", 0, 0)
        return adapter_requests(counters)

    assert use("first", 3) == {"first": 3}
    assert use("second", 6) == {"first": 3, OTHER: 6}  # twice as many is not more than twice
    assert use("second", 1) == {"second": 1, OTHER: 6}
    assert use("first", 11) == {"second": 1, OTHER: 17}
    assert use("first", 1) == {"first": 4, OTHER: 17}


def test_a_deleted_adapters_counts_move_to_the_others() -> None:
    counters = AdapterCounters()
    registered = {"sql", "pirate"}
    counters.watch(registered.__contains__)
    for name in ("sql", "sql", "pirate"):
        counters.count(name, "stop", 1, 1)
    registered.remove("sql")
    assert adapter_requests(counters) == {"pirate": 1, OTHER: 2}
    assert counters.num_uses("sql") == 0
    registered.add("sql")  # another adapter of the same name
    counters.count("sql", "stop", 1, 1)
    assert adapter_requests(counters) == {"pirate": 1, "sql": 1, OTHER: 2}


def test_a_scrape_looks_for_no_names_like_those_of_deleted_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes milliseconds for each, and there may be thousands."""
    metrics = Metrics()
    with AdapterStore(tmp_path) as store:
        metrics.watch(Engine(), store)
        metrics.count_request("stop", ("deleted",), 1, 1, 0.1)
        monkeypatch.setattr("heddle_adapters.store.nearest_names", None)
        assert values(metrics, "heddle_adapter_requests_total", "adapter") == {OTHER: 1}


# The engine's numbers


def test_pages_by_kind_are_the_whole_pool() -> None:
    stats = changed(num_free_pages=10, num_kv_pages=20, num_cached_pages=30, num_adapter_pages=35, num_loading_pages=5)
    metrics = Metrics()
    metrics.registry.register(EngineCollector(Engine(stats)))
    pages = values(metrics, "heddle_pool_pages", "kind")
    assert pages == {"free": 10, "kv": 20, "cached": 30, "adapter": 35, "loading": 5}
    assert sum(pages.values()) == stats.num_pages


def test_packing_waste_is_what_no_row_fills() -> None:
    page_bytes = scripted_engine.PAGE_BYTES
    engine = Engine(changed(num_adapter_pages=10, adapter_used_bytes=int(9.5 * page_bytes)))
    metrics = Metrics()
    metrics.registry.register(EngineCollector(engine))
    assert values(metrics, "heddle_pool_packing_waste_ratio") == {"": pytest.approx(0.05)}
    engine.stats = STATS
    assert values(metrics, "heddle_pool_packing_waste_ratio") == {"": 0}


def test_the_cache_by_tier() -> None:
    engine = Engine(
        changed(
            num_device_hits=5,
            num_host_hits=3,
            num_misses=2,
            num_adapter_loads=4,
            num_adapter_evictions=7,
            num_host_evictions=1,
            num_resident_adapters=9,
            num_host_adapters=8,
            step_seconds=1.5,
            num_segments=40,
            num_prefix_evictions=6,
        )
    )
    metrics = Metrics()
    metrics.registry.register(EngineCollector(engine))
    assert values(metrics, "heddle_adapter_cache_requests_total", "tier") == {"device": 5, "host": 3, "disk": 2}
    assert values(metrics, "heddle_adapter_evictions_total", "tier") == {"device": 7, "host": 1}
    assert values(metrics, "heddle_adapters_resident", "tier") == {"device": 9, "host": 8}
    assert values(metrics, "heddle_adapter_loads_total") == {"": 4}
    assert values(metrics, "heddle_step_seconds_total") == {"": 1.5}
    assert values(metrics, "heddle_segments_total") == {"": 40}
    assert values(metrics, "heddle_prefix_cache_evictions_total") == {"": 6}


def test_an_engine_that_has_not_spoken_has_no_numbers() -> None:
    metrics = Metrics()
    engine = Engine(stats=None, model=None, is_ready=False)
    metrics.registry.register(EngineCollector(engine))
    metrics.registry.register(GatewayCollector(engine, Names({}), WaitingAdapters(), lambda name: 0))
    assert values(metrics, "heddle_ready") == {"": 0}
    assert not any(each.name.startswith(("vllm:", "heddle_pool")) for each in samples(metrics))


def test_loads_are_timed_by_where_they_came_from() -> None:
    metrics = Metrics()
    metrics.record_moves(
        [
            AdapterMove("a", "disk", "host", 1000, 0.2),
            AdapterMove("a", "host", "device", 1000, 0.01),
            AdapterMove("b", "disk", "host", 500, 0.1),
            AdapterMove("a", "device", "host", 1000),
            AdapterMove("b", "host", "disk", 500),
        ]
    )
    assert values(metrics, "heddle_adapter_load_bytes_total", "source") == {"disk": 1500, "host": 1000}
    assert values(metrics, "heddle_adapter_load_seconds_count", "source") == {"disk": 2, "host": 1}
    assert values(metrics, "heddle_adapter_load_seconds_sum", "source")["disk"] == pytest.approx(0.3)


def test_the_wait_for_adapters_is_that_of_requests_with_one() -> None:
    metrics = Metrics()
    metrics.observe_start(0.5, AdmissionReport("disk", 0.4, 0.45))
    metrics.observe_start(0.1, AdmissionReport("device", 0.0, 0.01))
    metrics.observe_start(0.1, AdmissionReport(None, 0.0, 0.01))
    assert values(metrics, "heddle_adapter_wait_seconds_count") == {"": 2}
    assert values(metrics, "heddle_adapter_wait_seconds_sum") == {"": pytest.approx(0.4)}
    assert values(metrics, "heddle_time_to_first_token_seconds_count") == {"": 3}


# What gateways read


@dataclass
class GatewayState:
    max_active: int = 0
    active: dict[str, int] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)


def read_as_llm_d(told: list[Sample]) -> GatewayState | None:
    """What llm-d's scheduler makes of the series (pkg/epp/backend/metrics/metrics.go, promToPodMetrics)."""
    newest: Sample | None = None
    for each in told:
        if each.name != "vllm:lora_requests_info":
            continue
        if each.labels["running_lora_adapters"] == "" and each.labels["waiting_lora_adapters"] == "":
            continue
        if newest is None or each.value > newest.value:
            newest = each
    if newest is None:
        return None
    state = GatewayState(max_active=int(newest.labels["max_lora"]))
    for label, names in (("running_lora_adapters", state.active), ("waiting_lora_adapters", state.waiting)):
        if newest.labels[label]:
            names.update(dict.fromkeys(newest.labels[label].split(","), 0))
    return state


def gateway(engine: Engine, names: Names, waiting: WaitingAdapters, uses: Mapping[str, int]) -> Metrics:
    metrics = Metrics()
    metrics.registry.register(GatewayCollector(engine, names, waiting, lambda name: uses.get(name, 0)))
    return metrics


def test_a_gateway_reads_which_adapters_are_on_the_device_and_which_are_waited_for() -> None:
    stats = changed(num_free_pages=40, num_cached_pages=20, num_adapter_pages=30, num_resident_adapters=3)
    engine = Engine(stats, resident=frozenset({"sha256:a", "sha256:b", "sha256:old"}))
    names = Names(
        {"sql": "sha256:a", "team/pirate": "sha256:b", "copy": "sha256:a", "cold": "sha256:c"}, {"cold@1": "sha256:old"}
    )
    waiting = WaitingAdapters()
    waiting.add(["cold@prod", "sql"])
    waiting.add(["cold@prod"])
    waiting.remove(["cold@prod"])
    metrics = gateway(engine, names, waiting, {})
    before = time.time()
    (series,) = (each for each in samples(metrics) if each.name == "vllm:lora_requests_info")
    assert before <= series.value <= time.time()
    assert set(series.labels) == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
    state = read_as_llm_d(samples(metrics))
    assert state is not None
    assert set(state.active) == {"sql", "team/pirate", "copy", "cold@1"}
    assert set(state.waiting) == {"cold@prod"}
    assert state.max_active == 4 + 6  # room for six more of ten pages each


def test_a_gateway_sees_no_room_when_the_pool_is_full() -> None:
    stats = changed(num_free_pages=0, num_adapter_pages=100, num_resident_adapters=1)
    metrics = gateway(Engine(stats, resident=frozenset({"sha256:a"})), Names({"a": "sha256:a"}), WaitingAdapters(), {})
    state = read_as_llm_d(samples(metrics))
    assert state is not None
    assert state.max_active == len(state.active) == 1


def test_a_gateway_is_told_the_two_hundred_most_used() -> None:
    names = Names({f"adapter-{number}": f"sha256:{number}" for number in range(1000)})
    engine = Engine(resident=frozenset(names.latest.values()))
    metrics = gateway(engine, names, WaitingAdapters(), {f"adapter-{number}": number for number in range(1000)})
    state = read_as_llm_d(samples(metrics))
    assert state is not None
    assert set(state.active) == {f"adapter-{number}" for number in range(800, 1000)}


def test_there_is_one_series_however_the_adapters_change() -> None:
    engine = Engine(resident=frozenset({"sha256:a"}))
    metrics = gateway(engine, Names({"a": "sha256:a", "b": "sha256:b"}), WaitingAdapters(), {})
    metrics.text()
    engine.resident = frozenset({"sha256:b"})
    state = read_as_llm_d(samples(metrics))
    assert state is not None
    assert list(state.active) == ["b"]
    engine.resident = frozenset()
    assert read_as_llm_d(samples(metrics)) is None


def test_the_gauges_that_a_gateway_needs() -> None:
    stats = changed(num_running=3, num_waiting=2, num_kv_pages=30, num_cached_pages=10, num_free_pages=20)
    metrics = gateway(Engine(stats), Names({}), WaitingAdapters(), {})
    assert values(metrics, "vllm:num_requests_running") == {"": 3}
    assert values(metrics, "vllm:num_requests_waiting") == {"": 2}
    assert values(metrics, "vllm:kv_cache_usage_perc") == {"": 0.5}
