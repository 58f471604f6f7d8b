"""The target's numbers: from the text that heddle's own metrics print, and from other servers' names by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

import scripted_engine
from engine_numbers import STATS
from heddle_adapters.tier import AdapterMove
from heddle_loadtest.client.result import RequestError, RequestResult
from heddle_loadtest.measure.scraped import Increases, parse_series, series
from heddle_loadtest.measure.server_numbers import Check, ServerNumbers, server_numbers
from heddle_server.api.engine_metrics import EngineCollector
from heddle_server.api.metrics import Metrics
from heddle_server.messages import EngineStats, ModelCard
from loadtest_samples import make_outcome, make_result

TEN = [make_result(float(at), at + 0.1, at + 0.2) for at in range(10)]  # twenty tokens, TTFT 100 ms
Samples = Mapping[str, float]


@dataclass
class Engine:
    """An engine whose numbers a test sets."""

    stats: EngineStats | None = STATS
    model: ModelCard | None = field(default_factory=scripted_engine.model_card)
    is_ready: bool = True

    def resident_digests(self) -> frozenset[str]:
        return frozenset()


def scrape(metrics: Metrics) -> Samples:
    samples = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
            samples[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return samples


def numbers(results: list[RequestResult], *scrapes: Samples) -> ServerNumbers:
    found = server_numbers([make_outcome(results, scrapes=scrapes)])
    assert found is not None
    return found


def check(found: ServerNumbers, name: str) -> Check:
    (match,) = [check for check in found.checks if check.name == name]
    return match


@pytest.fixture
def heddle_numbers() -> ServerNumbers:
    """Ten requests measured between two scrapes of heddle's own metrics, one warm-up request before the first."""
    engine, metrics = Engine(), Metrics()
    metrics.registry.register(EngineCollector(engine))
    metrics.count_request("stop", ["poet"], 5, 100, 9.0)
    metrics.observe_start(9.0, None)
    before = scrape(metrics)
    for _ in range(10):
        metrics.count_request("length", ["poet"], 5, 2, 0.2)
        metrics.observe_start(0.098, None)
    metrics.count_request("disconnect", ["poet"], 5, 0, 0.2)
    metrics.record_moves([AdapterMove("d", "disk", "host", 1000, 0.1), AdapterMove("d", "host", "device", 1000, 0.1)])
    engine.stats = msgspec.structs.replace(
        STATS,
        num_steps=20,
        num_segments=50,
        num_computed_tokens=70,
        num_device_hits=6,
        num_host_hits=3,
        num_misses=1,
        num_adapter_loads=4,
        num_adapter_evictions=2,
        num_preemptions=1,
        num_prefix_queries=50,
        num_prefix_hits=5,
    )
    return numbers(TEN, before, scrape(metrics))


def test_heddles_own_counters(heddle_numbers: ServerNumbers) -> None:
    assert heddle_numbers.num_steps == 20
    assert heddle_numbers.segments_per_step == pytest.approx(2.5)
    assert heddle_numbers.tokens_per_step == pytest.approx(3.5)
    assert heddle_numbers.hits_by_tier == {"device": 6, "host": 3, "disk": 1}
    assert heddle_numbers.num_adapter_loads == 4
    assert heddle_numbers.adapter_load_bytes == {"disk": 1000, "host": 1000}
    assert heddle_numbers.adapter_evictions == {"device": 2, "host": 0}
    assert heddle_numbers.num_preemptions == 1
    assert heddle_numbers.prefix_hit_rate == pytest.approx(0.1)


def test_heddles_counts_agree_with_the_clients(heddle_numbers: ServerNumbers) -> None:
    found = {each.name: (each.client, each.server) for each in heddle_numbers.checks}
    assert found == {
        "finished requests": (10, 10),  # neither the warm-up nor the one that left
        "output tokens": (20, 20),
        "mean time to first token": (pytest.approx(0.1), pytest.approx(0.098)),
    }
    assert all(each.is_within_tolerance for each in heddle_numbers.checks)
    assert check(heddle_numbers, "mean time to first token").relative_difference == pytest.approx(-0.02)


@pytest.mark.parametrize(
    ("requests", "tokens", "ttft"),
    [
        (
            'vllm:request_success_total{{finished_reason="{}",model_name="m"}}',
            'vllm:generation_tokens_total{model_name="m"}',
            "vllm:time_to_first_token_seconds_{}",
        ),
        (
            'sglang:num_requests_total{{is_streaming="{}"}}',
            "sglang:generation_tokens_total",
            "sglang:time_to_first_token_seconds_{}",
        ),
    ],
)
def test_other_servers_names(requests: str, tokens: str, ttft: str) -> None:
    start = {tokens: 5.0, ttft.format("sum"): 1.0, ttft.format("count"): 1.0}
    end = {
        requests.format("stop"): 4.0,
        requests.format("length"): 6.0,
        requests.format("abort"): 7.0,
        tokens: 25.0,
        ttft.format("sum"): 2.0,
        ttft.format("count"): 11.0,
    }
    found = numbers(TEN, start, end)
    assert [(each.client, each.server) for each in found.checks] == [
        (10, 10),
        (20, 20),
        (pytest.approx(0.1), pytest.approx(0.1)),
    ]
    assert found.segments_per_step is None
    assert found.hits_by_tier == {}


def test_disagreement_is_shown() -> None:
    end = {'heddle_requests_total{outcome="stop"}': 11.0, "heddle_generated_tokens_total": 10.0}
    found = numbers(TEN, {}, end)
    assert [each.is_within_tolerance for each in found.checks] == [False, False]
    assert check(found, "output tokens").relative_difference == pytest.approx(-0.5)
    assert check(found, "output tokens").to_json()["relative_difference"] == -0.5


def test_requests_the_client_gave_up_may_have_been_finished() -> None:
    results = [*TEN, make_result(0.0, 0.1, error=RequestError("abandoned", "stopped"))]
    for num_finished, num_tokens in ((10.0, 21.0), (11.0, 22.0)):
        end = {"heddle_requests_total": num_finished, "heddle_generated_tokens_total": num_tokens}
        assert all(each.is_within_tolerance for each in numbers(results, {}, end).checks)
    far = {"heddle_requests_total": 12.0, "heddle_generated_tokens_total": 30.0}
    assert not any(each.is_within_tolerance for each in numbers(results, {}, far).checks)


def test_time_the_request_waited_in_the_client_is_not_the_servers() -> None:
    late = [make_result(float(at), at + 0.5, lag=0.4) for at in range(10)]
    end = {"heddle_time_to_first_token_seconds_sum": 1.0, "heddle_time_to_first_token_seconds_count": 10.0}
    assert check(numbers(late, {}, end), "mean time to first token").is_within_tolerance


def test_repeats_add_up() -> None:
    scrapes = ({"heddle_engine_steps_total": 5.0, "heddle_segments_total": 5.0},) * 2
    grown = (scrapes[0], {"heddle_engine_steps_total": 15.0, "heddle_segments_total": 35.0})
    found = server_numbers([make_outcome(TEN, scrapes=scrapes), make_outcome(TEN, scrapes=grown), make_outcome(TEN)])
    assert found is not None
    assert found.num_steps == 10
    assert found.segments_per_step == pytest.approx(3.0)


def test_nothing_scraped() -> None:
    assert server_numbers([]) is None
    assert server_numbers([make_outcome(TEN)]) is None
    assert server_numbers([make_outcome(TEN, scrapes=[{"heddle_engine_steps_total": 5.0}])]) is None


def test_no_steps_have_no_segments_per_step() -> None:
    still = {"heddle_engine_steps_total": 5.0, "heddle_segments_total": 5.0}
    found = numbers(TEN, still, still)
    assert (found.num_steps, found.segments_per_step) == (0, None)


def test_counter_that_falls_began_again() -> None:
    """100 to 130, restart, 0 to 20: as Prometheus's increase() takes it."""
    increases = Increases(make_outcome(TEN, scrapes=[{"c_total": value} for value in (100.0, 130.0, 5.0, 20.0)]))
    assert increases.total("c_total") == pytest.approx(50.0)


def test_scrape_that_lacks_what_stood_still() -> None:
    """A result folder keeps only what changed since the line before."""
    scrapes = [{"a_total": 1.0, "b_total": 1.0}, {"b_total": 2.0}, {"a_total": 4.0}]
    increases = Increases(make_outcome(TEN, scrapes=scrapes))
    assert (increases.total("a_total"), increases.total("b_total"), increases.total("c_total")) == (3.0, 1.0, None)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("up", ("up", ())),
        ("vllm:x_total{}", ("vllm:x_total", ())),
        ('x{a="1",b="two words"}', ("x", (("a", "1"), ("b", "two words")))),
        ('x{a="b,c=\\"d\\"}",e="f"}', ("x", (("a", 'b,c=\\"d\\"}'), ("e", "f")))),
        ("no series {", ("no series {", ())),
    ],
)
def test_series_names(key: str, expected: tuple[str, object]) -> None:
    assert parse_series(key) == expected


def test_series_over_time() -> None:
    scrapes = [
        {'heddle_pool_pages{kind="free"}': 9.0, 'heddle_pool_pages{kind="kv"}': 1.0, "heddle_pool_pages_x": 7.0},
        {'heddle_pool_pages{kind="kv"}': 4.0},
        {'heddle_pool_pages{kind="kv"}': 4.0, 'heddle_pool_pages{kind="adapter"}': 3.0},
    ]
    found = series(make_outcome(TEN, scrapes=scrapes).scrapes, "heddle_pool_pages")
    assert found == {
        "free": [9.0, 9.0, 9.0],
        "kv": [1.0, 4.0, 4.0],
        "adapter": [0.0, 0.0, 3.0],
    }
    assert series(make_outcome(TEN, scrapes=[{"up": 1.0}]).scrapes, "up") == {"": [1.0]}
